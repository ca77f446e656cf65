"""A stream's state: saved, loaded, forked, merged, forgotten, compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nestlearn import OnlineLearner, OnlineState
from nestlearn.errors import UserError
from nestlearn.memory.state import State
from tests.continual.models import MODELS, hope, levels, llama, text


def learner_of(kind: str = "llama", **settings) -> OnlineLearner:
    return OnlineLearner(MODELS[kind]().double(), levels(kind, **settings))


def matrices(state: OnlineState) -> list[torch.Tensor]:
    return [delta.matrix() for level in state.levels for delta in level.deltas]


def same(a: OnlineState, b: OnlineState) -> bool:
    return all(torch.equal(x, y) for x, y in zip(matrices(a), matrices(b), strict=True))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("cut", [8, 11])
def test_saved_and_loaded_it_goes_on_the_same(tmp_path: Path, kind: str, cut: int):
    """Also inside a period, where the file holds the open segment's tokens and not its graph."""
    tokens, learner, other = text(2, 24), learner_of(kind, rule="momentum"), learner_of(kind, rule="momentum")
    learner.read(tokens[:, :cut])
    learner.state.save(tmp_path / "stream.safetensors")
    other.state = OnlineState.load(tmp_path / "stream.safetensors")
    assert same(learner.state, other.state)
    ours, theirs = learner.read(tokens[:, cut:]), other.read(tokens[:, cut:])
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(matrices(learner.state), matrices(other.state), strict=True):
        assert (a - b).abs().max() < 1e-12
    assert learner.state.changes(1)[-1].token == other.state.changes(1)[-1].token


def test_a_truncated_file_is_one_clear_error_and_nothing_is_lost(tmp_path: Path):
    learner, path = learner_of(), tmp_path / "stream.safetensors"
    learner.read(text(1, 12))
    learner.state.save(path)
    half = tmp_path / "half.safetensors"
    half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = learner.state
    for bad in (half, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match="cannot be read as a saved state"):
            learner.state = OnlineState.load(bad)
    assert learner.state is before
    assert not list(tmp_path.glob("*.partial"))


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learner, path = learner_of(), tmp_path / "stream.safetensors"
    learner.read(text(1, 8))
    learner.state.save(path)
    before = path.read_bytes()

    def full(self: State, to: Path) -> None:
        Path(to).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(State, "save", full)
    with pytest.raises(UserError, match="No space left"):
        learner.state.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_another_models_or_versions_stream_is_refused(tmp_path: Path):
    learner, path = learner_of(), tmp_path / "stream.safetensors"
    learner.read(text(1, 8))
    other = OnlineLearner(hope(), levels("hope"))
    with pytest.raises(UserError, match="read by another model"):
        other.state = learner.state
    torch.manual_seed(1)
    moved = llama().double()
    with torch.no_grad():
        moved.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.01)
    with pytest.raises(UserError, match="read by another model"):
        OnlineLearner(moved, levels("llama")).state = learner.state
    with pytest.raises(UserError, match="other levels"):
        learner_of(lr=0.25).state = learner.state
    with pytest.raises(UserError, match="must be an OnlineState"):
        learner.state = None  # pyright: ignore
    replace(learner.state, version=99).save(path)
    with pytest.raises(UserError, match="of version 99, this is version 1"):
        OnlineState.load(path)


@pytest.mark.parametrize("cut", [8, 10])
def test_forks_do_not_interfere(cut: int):
    tokens, learner = text(1, 24), learner_of()
    learner.read(tokens[:, :cut])
    fork = learner.fork()
    fork.read(text(1, 14, seed=3))
    losses = learner.read(tokens[:, cut:])
    alone = learner_of()
    assert torch.allclose(alone.read(tokens)[:, cut:], losses, atol=1e-6)
    assert not same(fork.state, learner.state)


def test_forget_goes_back_to_a_mark():
    tokens, learner = text(2, 30), learner_of()
    learner.read(tokens[:, :10])
    learner.mark("first")
    learner.read(tokens[:, 10:20])
    learner.mark("second")
    learner.read(tokens[:, 20:])
    learner.forget("first")
    again = learner.read(tokens[:, 10:20])
    alone = learner_of()
    assert torch.allclose(alone.read(tokens[:, :20])[:, 10:], again, atol=1e-6)
    for a, b in zip(matrices(learner.state), matrices(alone.state), strict=True):
        assert (a - b).abs().max() < 1e-12
    with pytest.raises(UserError, match=r"no mark 'second': it has \['first'\]"):
        learner.forget("second")


def test_marks_are_saved(tmp_path: Path):
    learner = learner_of()
    learner.read(text(1, 8))
    learner.mark("start")
    before = matrices(learner.state)
    learner.read(text(1, 8, seed=2))
    learner.state.save(tmp_path / "s")
    other = learner_of()
    other.state = OnlineState.load(tmp_path / "s")
    other.forget("start")
    assert other.state.tokens == 8
    assert all(torch.equal(a, b) for a, b in zip(before, matrices(other.state), strict=True))


def test_merge_is_the_weighted_mean():
    one, two = learner_of(), learner_of()
    one.read(text(1, 16))
    two.read(text(1, 16, seed=4))
    merged = OnlineState.merge([one.state, two.state], [3, 1])
    for m, a, b in zip(matrices(merged), matrices(one.state), matrices(two.state), strict=True):
        assert (m - (0.75 * a + 0.25 * b)).abs().max() < 1e-14
    one.state = merged
    assert one.read(text(1, 4)).isfinite().all()
    with pytest.raises(UserError, match="one each, >= 0 and not all 0"):
        OnlineState.merge([one.state, two.state], [0, 0])
    with pytest.raises(UserError, match="read by another model"):
        OnlineState.merge([one.state, OnlineLearner(hope(), levels("hope")).state])


def test_diff_says_which_levels_moved_how_far_and_when():
    learner = learner_of()
    learner.read(text(2, 8))
    before = learner.state
    learner.read(text(2, 4, seed=1))
    fast, _, slow, _ = learner.state.diff(before)
    assert (fast.level, fast.row, slow.level) == ("every-4", 0, "every-8")
    assert slow.distance == 0 and slow.changes == ()
    (change,) = fast.changes
    assert change.token == 12 and change.verdict == "applied" and 0 < change.step == pytest.approx(fast.distance)
    assert change.gradient > 0 and change.loss > 0
    assert [c.token for c in learner.state.changes(1) if c.level == "every-4"] == [4, 8, 12]
    moved = learner.state.diff()
    norms = [sum(float(d.norm()[0]) ** 2 for d in level.deltas) ** 0.5 for level in learner.state.levels]
    assert [m.distance for m in moved if m.row == 0] == pytest.approx(norms)


def test_rows_are_selected_and_joined():
    tokens, both = text(2, 16), learner_of()
    both.read(tokens)
    alone = learner_of()
    alone.state = State.cat([both.state[1], both.state[0]])
    assert same(alone.state[0], both.state[1])
    alone.state = both.state[1]
    assert torch.allclose(alone.read(text(1, 4)), both.read(text(1, 4).repeat(2, 1))[1:], atol=1e-6)


def test_size_does_not_grow_with_what_was_read():
    learner = OnlineLearner(hope(), levels("hope"))
    learner.read(text(1, 64))
    sizes = learner.state.sizes()
    learner.read(text(1, 512, seed=1))
    assert learner.state.sizes() == sizes
    adapting = sum(p.numel() * 4 for n, p in learner.model.named_parameters() if ".cms." in n)
    assert 0 < sizes["deltas"] <= adapting
