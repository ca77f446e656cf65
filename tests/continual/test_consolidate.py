"""What streams have learned goes into the slow weights of a new model; the one that was given stays as it is."""

from __future__ import annotations

import math

import pytest
import torch

from nestlearn import OnlineLearner, consolidate
from nestlearn.errors import UserError
from tests.continual.models import MODELS, gpt2, hope, levels, text


def read(kind: str, seed: int = 0, **settings):
    """A learner that has read one page of a dull book several times, and that page."""
    model = MODELS[kind]()
    learner = OnlineLearner(model, levels(kind, lr=1.0, bound=math.inf, **settings))
    page = text(2, 8, seed=seed).repeat(1, 3)
    for _ in range(3):
        learner.drop_context()
        learner.read(page)
    return model, learner.state, page


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["distill", "replay"])
def test_the_new_model_reads_the_streams_better_and_the_base_is_not_touched(kind, method):
    model, state, page = read(kind)
    before = {n: p.clone() for n, p in model.named_parameters()}
    keep = text(2, 24, seed=9)
    new, report = consolidate(state, model, chunks=page, method=method, keep=keep, steps=30, lr=3e-3, window=24)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert new is not model and report.gained is not None and report.gained > 0.05
    assert report.base is not None and report.adapted is not None and report.adapted < report.base
    assert report.kept_base is not None and report.forgotten is not None and report.moved > 0
    assert "nats per token" in str(report)
    changed = {n for n, p in new.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {f"{w}.weight" for level in levels(kind) for w in level.weights}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_average_of_one_stream_is_its_adapted_model(kind):
    model, state, page = read(kind)
    new, report = consolidate(state[0], model, chunks=page[0], method="average")
    learner = OnlineLearner(model, levels(kind, lr=1.0, bound=math.inf))
    learner.state = state[0]
    with learner.adapted():
        expected = model(page[:1]).logits
    assert torch.allclose(new(page[:1]).logits, expected, atol=1e-5)
    assert report.new == pytest.approx(report.adapted, abs=1e-5)


def test_rehearsal_holds_on_to_what_was_known():
    model, state, page = read("llama")
    keep = text(8, 24, seed=9)
    settings = {"chunks": page, "method": "replay", "keep": keep, "steps": 40, "lr": 3e-3, "window": 24}
    _, without = consolidate(state, model, **settings)
    new, held = consolidate(state, model, **settings, rehearse=keep)
    drift = [
        (m(keep).logits - model(keep).logits).abs().mean() for m in (new, consolidate(state, model, **settings)[0])
    ]
    assert drift[0] < drift[1]
    assert held.gained is not None and held.gained > 0 and without.gained is not None


def test_several_states_and_half_precision():
    model = hope()
    states, pages = [], []
    for seed in (0, 1):
        learner = OnlineLearner(model, levels("hope"))
        pages.append(text(1, 16, seed=seed))
        learner.read(pages[-1])
        states.append(learner.state)
    new, report = consolidate(states, model, chunks=pages, steps=8, window=16)
    assert report.new is not None and math.isfinite(report.new) and next(new.parameters()).dtype == torch.float32
    half = gpt2().bfloat16()
    learner = OnlineLearner(half, levels("gpt2"))
    learner.read(pages[0])
    new, _ = consolidate(learner.state, half, chunks=pages[0], steps=4, window=16)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}


BAD = [
    ({"method": "distil"}, "did you mean 'distill'"),
    ({"method": "replay"}, "needs chunks"),
    ({"chunks": text(3, 8)}, r"must be \(streams, tokens >= 2\) for \[2\]"),
    ({"chunks": text(2, 8), "steps": 0}, "steps is 0"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=[m for _, m in BAD])
def test_one_clear_error(settings, message):
    model, state, _ = read("llama")
    with pytest.raises(UserError, match=message):
        consolidate(state, model, **settings)


def test_another_models_stream_is_refused():
    _, state, page = read("llama")
    torch.manual_seed(3)
    other = MODELS["llama"]()
    with torch.no_grad():
        other.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(2)
    with pytest.raises(UserError, match="read by another model"):
        consolidate(state, other, chunks=page)
