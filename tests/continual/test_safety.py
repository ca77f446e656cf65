"""Bounds, spikes, gradients that are not finite: a level goes back to its last good state, says so, and goes on."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from nestlearn import OnlineLearner, RolledBack, online_levels
from nestlearn.continual.learning import ALWAYS
from tests.continual.models import MODELS, hope, levels, llama, text


def deltas(learner, level=0):
    return [delta.matrix() for delta in learner.state.levels[level].deltas]


def test_no_stream_moves_a_weight_beyond_its_bound():
    model = llama()
    learner = OnlineLearner(model, levels("llama", lr=100.0, bound=0.1))
    learner.read(text(2, 64))
    for level, state in zip(learner.levels, learner.state.levels, strict=True):
        for path, delta in zip(level.weights, state.deltas, strict=True):
            assert (delta.norm() <= 0.1 * model.get_submodule(path).weight.norm() * (1 + 1e-5)).all()
    assert {c.verdict for c in learner.state.changes()} >= {"bounded"}


def test_bounds_are_on_by_default():
    assert all(level.bound < math.inf and level.clip < math.inf and level.spike < math.inf for level in levels("llama"))


def repeated(times: int) -> torch.Tensor:
    return text(1, 4).repeat(1, times)


def test_a_spike_rolls_back_to_the_last_good_state_and_goes_on():
    """A stream that has become easy, then a document that is nothing like it, in one of two rows."""
    model = llama()
    calm, shock = repeated(30), (text(1, 4) + 11) % 31
    learner = OnlineLearner(model, levels("llama", lr=0.5, spike=1.0, bound=math.inf))
    learner.read(calm.repeat(2, 1))
    good = [d.clone() for d in deltas(learner)]
    before = [delta.matrix() for delta in learner.state.levels[0].good]
    with pytest.warns(RolledBack, match="'every-4' of stream 1 was rolled back .* token 124 .spike"):
        learner.read(torch.cat([text(1, 4), shock]))
    after = deltas(learner)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(after, before, strict=True))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(after, good, strict=True))  # the other row goes on
    last = learner.state.changes(1)[-1]
    assert last.verdict == "spike" and last.token == 124 and last.loss > learner.state.changes(0)[-1].loss + ALWAYS
    with warnings.catch_warnings():  # the slower level meets the same document at the end of its own period
        warnings.simplefilter("ignore", RolledBack)
        losses = learner.read(calm[:, :40].repeat(2, 1))
    assert losses.isfinite().all() and learner.state.changes(1)[-1].verdict in ("applied", "bounded")


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_not_finite_rolls_back_and_the_stream_goes_on(kind):
    """A layer that says nan for one row of one segment."""
    model = MODELS[kind]()
    learner = OnlineLearner(model, levels(kind))
    tokens = text(2, 8)
    learner.read(tokens)
    before = [delta.matrix() for delta in learner.state.levels[0].good]
    first = next(m for n, m in model.named_modules() if n == learner.levels[0].weights[0])

    def break_row(module, args, output):
        return output.index_fill(0, torch.tensor([1]), math.nan)

    handle = first.register_forward_hook(break_row)
    with pytest.warns(RolledBack, match="stream 1 .*not finite"):
        learner.read(text(2, 4, seed=1))
    handle.remove()
    assert all(torch.equal(a[1], b[1]) for a, b in zip(deltas(learner), before, strict=True))
    assert learner.state.changes(1)[-1].verdict == "not finite"
    assert learner.state.changes(0)[-1].verdict == "applied"
    with warnings.catch_warnings():  # the slower levels saw the broken segment too, and say so
        warnings.simplefilter("ignore", RolledBack)
        later = learner.read(text(2, 36, seed=2))
    assert later[:, 1:].isfinite().all() and learner.state.changes(1)[-1].verdict == "applied"
    assert all(d.isfinite().all() for i in range(len(learner.levels)) for d in deltas(learner, i))


def poisoned(state, row: int):
    """The state with one stream's memory so large that all that is read with it overflows; it is finite itself."""
    grown = torch.full((state.rows,), 1.0)
    grown[row] = 1e30
    context = state.context.map(lambda t: t * grown.view(-1, *[1] * (t.dim() - 1)) if t.is_floating_point() else t)
    return replace(state, context=context)


@pytest.mark.parametrize("lr", [0.5, 0.0])
def test_a_memory_that_would_overflow_for_ever_starts_a_new_context(lr):
    """What is restored after the first broken segment is the cause of the second; a stream that only reads, too."""
    model = hope(mixer="titans", levels=[4])
    learner = OnlineLearner(model, online_levels(model, lr=lr))
    learner.read(text(2, 9))
    learner.state = poisoned(learner.state, 1)
    with pytest.warns(RolledBack, match="stream 1 starts a new context"):
        losses = torch.cat([learner.read(text(2, 4, seed=i)) for i in range(1, 5)], dim=1)
    assert losses[0].isfinite().all() and losses[1, -4:].isfinite().all() and not losses[1].isfinite().all()
    expected = OnlineLearner(model, online_levels(model, lr=lr))
    expected.read(text(2, 9))
    assert (losses[0] - torch.cat([expected.read(text(2, 4, seed=i))[0] for i in range(1, 5)])).abs().max() <= 1e-5


def test_without_spikes_no_second_copy_is_kept():
    learner = OnlineLearner(llama(), levels("llama", spike=math.inf))
    learner.read(text(1, 32))
    assert learner.state.levels[0].good is None and learner.state.sizes()["last good"] == 0
