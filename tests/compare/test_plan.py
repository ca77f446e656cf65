"""The same settings go on in a folder; others, and strangers, are refused in one line."""

import json
import shlex

import pytest

from nestlearn.cli import main
from nestlearn.compare import run
from nestlearn.compare.plan import locked, open_folder, parse_rates
from nestlearn.errors import UserError
from tests.compare.small import SETTINGS, plan

SUMS = {"train_sha256": "1", "held_out_sha256": "2"}


def test_what_is_not_said_follows_from_what_is(tmp_path):
    made = plan(tmp_path, tokens=5_000, tune_tokens=None, overrides=())
    assert (made.tune_tokens, made.base.log_every, made.base.checkpoint_every) == (1_000, 50, 500)
    assert plan(tmp_path, overrides=("log_every=7",)).base.log_every == 7


def test_the_command_makes_the_same_plan(tmp_path, monkeypatch):
    made, seen = plan(tmp_path), []
    monkeypatch.setattr(run, "run_comparison", lambda *args: seen.append(args[:2]))
    assert main(shlex.split(made.command(tmp_path / "out"))[1:]) == 0
    assert seen == [(made, tmp_path / "out")]


def test_the_same_plan_and_a_longer_one_go_on(tmp_path):
    open_folder(tmp_path / "out", plan(tmp_path), SUMS)
    open_folder(tmp_path / "out", plan(tmp_path), SUMS)
    open_folder(tmp_path / "out", plan(tmp_path, models=("transformer", "retnet", "titans"), seeds=5), SUMS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 512}, "tokens 256, not 512"),
        ({"tune_tokens": 32}, "tune_tokens 64, not 32"),
        ({"rates": (1e-3,)}, "rates [0.001, 0.002, 0.004], not [0.001]"),
        ({"overrides": (*SETTINGS, "optimizer=muon")}, "optimizer 'adamw', not 'muon'"),
    ],
)
def test_other_settings_are_refused(changes, message, tmp_path):
    open_folder(tmp_path / "out", plan(tmp_path), SUMS)
    with pytest.raises(UserError) as error:
        open_folder(tmp_path / "out", plan(tmp_path, **changes), SUMS)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_other_text_is_refused(tmp_path):
    open_folder(tmp_path / "out", plan(tmp_path), SUMS)
    with pytest.raises(UserError, match="train_sha256 '1', not '3'"):
        open_folder(tmp_path / "out", plan(tmp_path), SUMS | {"train_sha256": "3"})


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds no comparison"):
        open_folder(tmp_path / "out", plan(tmp_path), SUMS)


def test_one_at_a_time(tmp_path):
    with locked(tmp_path / "out"), pytest.raises(UserError, match="in use"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds is 0"),
        ({"rates": (2e-3, 1e-3)}, "must be increasing"),
        ({"rates": (0.0, 1e-3)}, "must be increasing numbers above 0"),
        ({"tune_tokens": 1000}, "more than the 256 of --tokens"),
        ({"overrides": ("model.intermediate_size=8",)}, "it is solved for --params"),
        ({"overrides": ("learning_rate=1",)}, "--rates names"),
        ({"overrides": ("model.mixer=titans",)}, "--models names it"),
        ({"overrides": ("bach_size=8",)}, "did you mean 'batch_size'?"),
    ],
)
def test_bad_plans(changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        plan(tmp_path, **changes)
    assert message in str(error.value)


def test_rates_are_read(tmp_path):
    assert parse_rates(("1e-3,2e-3", "0.004")) == (1e-3, 2e-3, 4e-3)
    with pytest.raises(UserError, match="must be numbers"):
        parse_rates(("fast",))


def test_settings_are_json(tmp_path):
    made = plan(tmp_path).settings()
    assert json.loads(json.dumps(made)) == made
