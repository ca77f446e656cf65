"""A comparison runs, resumes where it was, trains all alike, and shows what came out."""

import json
import re
import subprocess
import sys
import time

import pytest

from nestlearn.compare.child import REFUSED, RESULT, STOPPED, UNIT, do_unit
from nestlearn.compare.run import SPEED, TRAIN, best_rate, folder_name, next_rate, run_comparison
from nestlearn.errors import NotFinite, UserError
from nestlearn.train.checkpoint import checkpoints
from tests.compare.small import Counted, Pretended, in_process, plan
from tests.train.tiny import assert_same_end, config


def silent(text):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole comparison; reading tests share it."""
    folder = tmp_path_factory.mktemp("compare")
    said = []
    results = run_comparison(plan(folder), folder / "out", said.append, in_process)
    return folder, results, "\n".join(said)


def test_it_writes_numbers_table_and_page(finished):
    folder, results, said = finished
    out = folder / "out"
    assert json.loads((out / "results.json").read_text()) == results
    table = (out / "table.md").read_text()
    assert table.strip() in said and table.count("\n") == 4
    for model in results["models"]:
        assert [run["seed"] for run in model["runs"]] == [0, 1]
        values = [run["bits_per_byte"] for run in model["runs"]]
        assert model["bits_per_byte"]["mean"] == pytest.approx(sum(values) / 2)
        assert model["bits_per_byte"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert model["runs"][0]["perplexity"] == pytest.approx(2 ** values[0], rel=1e-6)  # of bytes
        assert f"{model['bits_per_byte']['mean']:.4f} ± " in table
        assert all(
            value > 0 for key, value in model["speed"].items() if key != "train_peak_bytes"
        )  # this process holds more
        best = min(model["tuning"], key=lambda tried: tried["bits_per_byte"])
        assert model["rate"] == best["rate"]


def test_the_page_refers_to_nothing_outside_itself(finished):
    folder, results, _ = finished
    page = (folder / "out" / "compare.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!data:)|<link|src=", page)
    assert page.count('class="chart"') == 3
    assert all(page.count(f"</i>{model['model']}</li>") == 3 for model in results["models"])


def test_all_models_are_trained_alike(finished):
    """Units differ in the model alone: same text, seed, batches and budget, so the same data in the same order."""
    folder, results, _ = finished
    one, two = (
        [json.loads(path.read_text())["config"] for path in sorted((folder / "out/units" / name).glob(f"*/{UNIT}"))]
        for name in ("transformer", "retnet")
    )
    grid = [len([c for c in configs if "rate" in c["name"]]) for configs in (one, two)]
    assert min(grid) >= 3
    for a in one:
        for b in two:
            if a["tokens"] == b["tokens"] and a["seed"] == b["seed"]:
                assert {k for k in a if a[k] != b[k]} <= {"name", "model", "learning_rate"}
    sums = {run[key] for m in results["models"] for run in m["runs"] for key in ("train_sha256", "held_out_sha256")}
    assert len(sums) == 2


def test_checkpoints_of_the_seeds_stay_and_those_of_tuning_go(finished):
    folder, _, _ = finished
    kept = {path.parent.name for path in (folder / "out" / "units").glob("*/*/checkpoint-*")}
    assert kept == {"seed-0", "seed-1"}


def test_again_does_nothing_again_and_more_seeds_do_the_rest(finished):
    folder, results, _ = finished
    units = Counted()
    again = run_comparison(plan(folder), folder / "out", silent, units)
    assert units.units == [] and again["models"] == results["models"]
    run_comparison(plan(folder, seeds=3), folder / "out", silent, units)
    assert units.units == ["transformer/seed-2", "retnet/seed-2"]


def test_interrupted_between_units_it_goes_on_to_the_same_end(finished, tmp_path):
    folder, results, _ = finished
    with pytest.raises(UserError, match="go on with nestlearn compare"):
        run_comparison(plan(folder), tmp_path / "out", silent, Counted(stop_at=10))
    second = Counted()
    other = run_comparison(plan(folder), tmp_path / "out", silent, second)
    assert len(second.units) == len(list((tmp_path / "out/units").glob("*/*"))) - 10
    for a, b in zip(results["models"], other["models"], strict=True):
        assert a["tuning"] == b["tuning"]
        assert [run["bits_per_byte"] for run in a["runs"]][:2] == [run["bits_per_byte"] for run in b["runs"]]


def test_a_unit_whose_parent_is_gone_saves_and_is_resumed_exactly(tmp_path):
    """A real process: its standard input closes, as when the parent is killed."""
    settings = config(tmp_path, tokens=12_000, log_every=320, checkpoint_every=4_000)
    unit = {"config": settings.to_dict(), "keep": True}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
        (folder / UNIT).write_text(json.dumps(unit))
    child = subprocess.Popen(
        [sys.executable, "-m", "nestlearn.compare.child", TRAIN, str(killed)], stdin=subprocess.PIPE
    )
    while child.poll() is None and not (killed / "metrics.jsonl").exists():
        time.sleep(0.02)
    child.communicate()
    assert child.returncode == STOPPED and not (killed / RESULT).exists()
    assert 0 < int(checkpoints(killed)[-1].name.partition("-")[2]) < 12_000
    for folder in (killed, whole):
        do_unit(TRAIN, folder, unit, in_process)
    assert_same_end(killed, whole)
    one, two = (json.loads((folder / RESULT).read_text()) for folder in (killed, whole))
    assert one["bits_per_byte"] == two["bits_per_byte"]


def test_a_unit_of_other_settings_is_refused(tmp_path):
    unit = {"config": config(tmp_path).to_dict(), "keep": True}
    do_unit("train_unit", tmp_path / "unit", unit, Pretended(lambda model, c: 2.0))
    older = {"config": {k: v for k, v in unit["config"].items() if k != "held_out_per_document"}, "keep": True}
    (tmp_path / "unit" / UNIT).write_text(json.dumps(older))  # by a version without that setting
    assert do_unit("train_unit", tmp_path / "unit", unit, in_process)["bits_per_byte"] == 2.0
    with pytest.raises(UserError, match="not what these settings ask for"):
        do_unit("train_unit", tmp_path / "unit", unit | {"keep": False}, Pretended(lambda model, c: 2.0))


def test_what_a_unit_refuses_is_the_one_error(tmp_path):
    missing = config(tmp_path).to_dict() | {"text": [str(tmp_path / "nowhere")]}
    with pytest.raises(UserError, match="nowhere: no such file"):
        do_unit(TRAIN, tmp_path / "unit", {"config": missing, "keep": True}, in_process)
    with pytest.raises(UserError, match="signal 9"):
        do_unit(TRAIN, tmp_path / "other", {"config": config(tmp_path).to_dict()}, lambda module, folder: -9)
    assert REFUSED != STOPPED


def test_a_model_that_breaks_down_is_a_result(tmp_path):
    settings = config(tmp_path, learning_rate=10.0, clip_norm=1e30, tokens=320, warmup=0.0)
    broken = settings.to_dict() | {"epsilon": 1e-30, "adamw_scale": 1000.0, "weight_decay": 10.0}
    result = do_unit(TRAIN, tmp_path / "unit", {"config": broken, "keep": False}, in_process)
    assert result["bits_per_byte"] is None and "not finite" in result["failed"] or "is nan" in result["failed"]


# --- tuning


def best_at(best):
    """Bits that are least at one rate."""
    return lambda model, c: 2 + abs(c["learning_rate"] - best)


@pytest.mark.parametrize(
    ("best", "tried", "note"),
    [
        (2e-3, [1e-3, 2e-3, 4e-3], ""),
        (4e-3, [1e-3, 2e-3, 4e-3, 8e-3], "0.004 was the edge of the grid: 0.008 was tried too"),
        (1.0, [1e-3, 2e-3, 4e-3, 8e-3], "0.004 was the edge of the grid: 0.008 was tried too, and is still the edge"),
        (1e-3, [5e-4, 1e-3, 2e-3, 4e-3], "0.001 was the edge of the grid: 0.0005 was tried too"),
    ],
)
def test_the_grid_is_extended_by_one_where_the_best_is_at_its_edge(best, tried, note, tmp_path):
    results = run_comparison(plan(tmp_path, seeds=1), tmp_path / "out", silent, Pretended(best_at(best)))
    for model in results["models"]:
        assert [t["rate"] for t in model["tuning"]] == tried
        assert model["rate"] == min(tried, key=lambda rate: abs(rate - best))
        assert model["note"] == note


def test_one_rate_is_not_tuned(tmp_path):
    made = plan(tmp_path, seeds=1, rates=(5e-3,))
    results = run_comparison(made, tmp_path / "out", silent, Pretended(best_at(1.0)))
    assert [(m["rate"], m["tuning"]) for m in results["models"]] == [(5e-3, [])] * 2


def test_who_breaks_down_is_shown_last_and_says_so(tmp_path):
    pretended = Pretended(lambda model, c: None if model == "transformer" else 2.0)
    results = run_comparison(plan(tmp_path), tmp_path / "out", silent, pretended)
    assert results["models"][0]["note"] == "broke down at every rate"
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "retnet | 2.0000 ± 0.0000 | 4.000 ± 0.000" in table[2] and "transformer | broke down" in table[3]


def test_a_model_that_breaks_down_in_the_steps_that_are_timed_is_a_result(tmp_path, monkeypatch):
    def burst(*given):
        raise NotFinite("a gradient is not finite")

    monkeypatch.setattr("nestlearn.compare.speed_unit._training_speed", burst)
    assert in_process_unit(SPEED, tmp_path / "unit", config(tmp_path)) == {"failed": "a gradient is not finite"}
    said = []
    results = run_comparison(plan(tmp_path, seeds=1), tmp_path / "out", said.append, Pretended(best_at(1.0), "retnet"))
    assert [m["speed"].get("failed") for m in results["models"]] == [None, "a gradient is not finite"]
    assert "retnet, round 1 of 3: broke down: a gradient" in "\n".join(said)
    retnet = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if "retnet" in line)
    assert retnet.endswith(" | broke down" * 4 + " |") and results["models"][1]["bits_per_byte"]["mean"] is not None


def in_process_unit(module, folder, settings):
    return do_unit(module, folder, {"config": settings.to_dict(), "steps": 1, "decode": 0}, in_process)


def test_a_seed_that_breaks_down_is_not_averaged_away(tmp_path):
    pretended = Pretended(lambda model, c: None if c["seed"] == 1 else 2.0)
    results = run_comparison(plan(tmp_path), tmp_path / "out", silent, pretended)
    assert all(m["bits_per_byte"] == {"mean": None, "std": None, "seeds": 2} for m in results["models"])


def test_rates_that_broke_down_are_never_the_best():
    assert best_rate({1e-3: None, 2e-3: 3.0, 4e-3: 2.0}) == 4e-3
    assert best_rate({1e-3: None}) is None
    assert next_rate([1.0, 8.0], 8.0) is None  # above what a run takes
    assert next_rate([1e-3, 3e-3], 3e-3) == 9e-3


def test_labels_become_folders_that_do_not_collide():
    labels = ["hope", "hope:levels=[1]", "hope:levels=(1)", "hope:memory.dgd=false"]
    names = [folder_name(label) for label in labels]
    assert len(set(names)) == 4 and all(re.fullmatch(r"[\w.=-]+", name) for name in names)
