"""`nestlearn train` with ``meta``: runs, resumes bit for bit, saves what it learned, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from nestlearn import HopeConfig, HopeForCausalLM, OnlineLearner, online_levels
from nestlearn.continual.meta_training import meta_gradient
from nestlearn.data.tokens import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.recipes import load_recipe
from nestlearn.train import loop
from nestlearn.train.build import build_model, load_data
from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint
from nestlearn.train.display import Display
from tests.train.tiny import STEP, assert_same_end, config

MODEL = {
    "mixer": "window_attention", "window": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32,
    "levels": [{"name": "fast", "period": 1, "hidden_size": 8, "layers": 0.25},
               {"name": "mlp", "period": 1, "hidden_size": 24}],
}  # fmt: skip
META = {"order": "exact", "warmup": 0.25, "levels": {"fast": {"period": 8, "lr": 0.1, "bound": "inf"}}}


def settings(folder, **changes):
    return config(folder, **{"model": MODEL, "meta": META, "tokens": 6 * STEP, "checkpoint_every": 2 * STEP, **changes})


def run(told, folder, start=None):
    checkpoint = None if start is None else load_checkpoint(find_checkpoint(start))
    data = load_data(told, load_tokenizer(told.tokenizer))
    return loop.train(told, data, folder, checkpoint, Display(Console(quiet=True)), meta_gradient(told))


@pytest.mark.parametrize("order", ["first", "exact"])
def test_a_resumed_run_is_bit_equal(tmp_path, monkeypatch, order):
    told = settings(tmp_path, meta={**META, "order": order})
    run(told, tmp_path / "whole")
    step, count = loop.train_step, iter(range(100))

    def stopped(*args):
        if next(count) == 3:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", stopped)
        run(told, tmp_path / "cut")
    run(told, tmp_path / "cut", start=tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_the_rates_are_learned_and_saved_with_the_model(tmp_path):
    model, _ = run(settings(tmp_path), tmp_path / "run")
    loaded = HopeForCausalLM.from_pretrained(find_checkpoint(tmp_path / "run"))
    (level,) = online_levels(loaded)
    assert level.weights == tuple(f"model.blocks.1.cms.blocks.fast.{name}" for name in ("gate", "up", "down"))
    assert (level.period, level.bound) == (8, float("inf"))
    assert level.lr == pytest.approx(float(model.inner_rates.log_rate.detach().exp())) != pytest.approx(0.1, abs=1e-6)
    learner = OnlineLearner(loaded)
    learner.read(torch.arange(20)[None])
    assert learner.state.levels[0].deltas[0].norm() > 0


def test_nested_levels_are_trained_through_their_restarts(tmp_path):
    model = MODEL | {"levels": [4, 8], "intermediate_size": 32}
    levels = {"every-4": {"period": 4}, "every-8": {"period": 8}}
    ends = {}
    for connection in ("sequential", "nested"):
        meta = {"order": "exact", "levels": levels, "connection": connection}
        ends[connection], _ = run(settings(tmp_path, model=model, meta=meta), tmp_path / connection)
    first, second = (list(m.parameters()) for m in ends.values())
    assert not all(map(torch.equal, first, second))
    read = [OnlineLearner(ends["nested"], connection=c).read(torch.arange(20)[None]) for c in ends]
    assert not torch.equal(read[0][:, 1:], read[1][:, 1:])


def test_the_recipe_is_a_complete_model():
    told = load_recipe("ttt-e2e")
    model = build_model(told, 256)
    (level,) = online_levels(model)
    assert (level.period, level.rule) == (1024, "sgd") and level.lr == pytest.approx(0.1)
    assert {path.split(".")[2] for path in level.weights} == {"3"}  # the last quarter of four layers
    assert sum(row.parameters for row in model.level_table()) == sum(p.numel() for p in model.parameters())


def test_a_small_run_of_the_recipe(tmp_path):
    small = [
        "sequence_length=48", "meta.levels.fast.period=16", "tokens=192", "batch_size=2", "model.hidden_size=16",
        "model.intermediate_size=136", "model.window=8", f"text={[str(tmp_path / 'text')]}",
    ]  # fmt: skip
    config(tmp_path)  # writes the text
    told = load_recipe("ttt-e2e").replace(small)
    told = told.replace(['model.levels=[["fast",1,8,1.0,0.25],["mlp",1,128]]'])
    model, progress = run(told, tmp_path / "run")
    assert progress.tokens == 192 and model.inner_rates is not None


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="unknown key 'meta.ordr' .did you mean 'order'"):
        settings(tmp_path, meta={**META, "ordr": "first"})
    with pytest.raises(UserError, match="meta.order is 'second'"):
        settings(tmp_path, meta={**META, "order": "second"})
    with pytest.raises(UserError, match="meta.levels is None"):
        settings(tmp_path, meta={"order": "first"})
    with pytest.raises(UserError, match="meta.levels.fast.period is 17, but sequence_length 16"):
        meta_gradient(settings(tmp_path, meta={"levels": {"fast": {"period": 17}}}))
    with pytest.raises(UserError, match="meta.connection is 'nestd', must be one of .*did you mean 'nested'"):
        meta_gradient(settings(tmp_path, meta={**META, "connection": "nestd"}))
    with pytest.raises(UserError, match="give gradient="):
        told = settings(tmp_path)
        loop.train(told, load_data(told, load_tokenizer("bytes")), tmp_path / "x", None, Display(Console(quiet=True)))
    for given, message in (
        ({"fats": {"period": 8}}, "names the level 'fats'"),
        ({"fast": {"period": 0}}, "in_context.fast.period is 0"),
        ({"fast": {"period": 8, "lr": 0}}, "in_context.fast.lr is 0"),
        ({"fast": {"period": 8, "rate": 1}}, "unknown key 'rate'"),
    ):
        with pytest.raises(UserError, match=message):
            HopeConfig(**MODEL, in_context=given)
    with pytest.raises(UserError, match="at least one is 1"):
        HopeConfig(levels=[{"name": "a", "period": 1, "hidden_size": 384, "layers": 0.5}])


@pytest.mark.parametrize("switch", ["carry_state", "pack_documents"])
def test_each_sequence_is_one_stream(tmp_path, switch):
    with pytest.raises(UserError, match=f"{switch} is true, but each sequence of meta"):
        settings(tmp_path, **{switch: True})
