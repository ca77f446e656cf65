"""What every memory with a typed state must do, whatever it stores. Call ``check_memory(read, tokens, tmp_path)`` once.

read    ``read(tokens, state) -> (reads, state)``; a state of None starts new streams. float64.
tokens  a tuple of tensors, batch first and time second: B >= 3 rows of T >= 12 tokens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Tokens = tuple[Tensor, ...]
Read = Callable[[Tokens, Any], tuple[Tensor, Any]]
ROUNDING = 1e-10


def check_memory(read: Read, tokens: Tokens, tmp_path: Path) -> None:
    with torch.no_grad():
        is_causal(read, tokens)
        may_be_cut_anywhere(read, tokens)
        may_be_read_token_by_token(read, tokens)
        does_not_grow(read, tokens)
        forks_do_not_interfere(read, tokens)
        selects_and_joins_rows(read, tokens)
        rows_at_different_places_go_on_together(read, tokens)
        survives_saving(read, tokens, tmp_path)
        moves_to_another_dtype(read, tokens)


def cut(tokens: Tokens, begin: int, end: int | None = None) -> Tokens:
    return tuple(t[:, begin:end] for t in tokens)


def rows(tokens: Tokens, index: Any) -> Tokens:
    return tuple(t[index] for t in tokens)


def difference(first: Any, second: Any) -> float:
    """Largest entry-wise difference of two tensors or two states."""
    pairs = zip(leaves(first), leaves(second), strict=True)
    return max(((a - b).abs().max().item() for a, b in pairs if a.numel()), default=0.0)


def same(read: Read, tokens: Tokens, first: Any, second: Any) -> bool:
    """Two states are the same if they hold the same shapes and everything that is read from them is the same.

    Entries are not compared: what a memory is about to overwrite may differ.
    """
    shapes = [[t.shape for t in state.tensors()] for state in (first, second)]
    return shapes[0] == shapes[1] and difference(read(tokens, first)[0], read(tokens, second)[0]) <= 100 * ROUNDING


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.tensors())


def is_causal(read: Read, tokens: Tokens) -> None:
    """A token changes no read before its own; the last token's input does reach the end of the state."""
    whole, end = read(tokens, None)
    for at in range(tokens[0].shape[1]):
        changed = tuple(t.clone() for t in tokens)
        for t in changed:
            t[:, at:] *= 0.5
        after, other_end = read(changed, None)
        assert difference(whole[:, :at], after[:, :at]) <= ROUNDING
        assert difference(end, other_end) > 0


def may_be_cut_anywhere(read: Read, tokens: Tokens) -> None:
    whole, end = read(tokens, None)
    for at in range(1, tokens[0].shape[1]):
        first, state = read(cut(tokens, 0, at), None)
        second, state = read(cut(tokens, at), state)
        assert difference(torch.cat([first, second], dim=1), whole) <= ROUNDING
        assert same(read, tokens, state, end)


def may_be_read_token_by_token(read: Read, tokens: Tokens) -> None:
    whole, end = read(tokens, None)
    parts, state = [], None
    for at in range(tokens[0].shape[1]):
        part, state = read(cut(tokens, at, at + 1), state)
        parts.append(part)
    assert difference(torch.cat(parts, dim=1), whole) <= ROUNDING
    assert same(read, tokens, state, end)


def does_not_grow(read: Read, tokens: Tokens) -> None:
    _, state = read(cut(tokens, 0, 1), None)
    shapes = [t.shape for t in state.tensors()]
    for _ in range(2):
        _, state = read(tokens, state)
        assert [t.shape for t in state.tensors()] == shapes


def forks_do_not_interfere(read: Read, tokens: Tokens) -> None:
    _, state = read(cut(tokens, 0, 7), None)
    before = state.clone()
    alone, _ = read(cut(tokens, 7), state)
    other, _ = read(tuple(t.flip(1) for t in cut(tokens, 7)), state)
    again, _ = read(cut(tokens, 7), state)
    assert torch.equal(alone, again) and difference(alone, other) > 0
    assert difference(before, state) == 0


def selects_and_joins_rows(read: Read, tokens: Tokens) -> None:
    """Rows are independent, may be reordered and repeated (beams), and put together again."""
    _, state = read(cut(tokens, 0, 7), None)
    whole, end = read(cut(tokens, 7), state)
    order = [2, 0, 0]
    reads, picked = read(rows(cut(tokens, 7), order), state[order])
    assert difference(reads, whole[order]) <= ROUNDING
    assert same(read, rows(tokens, order), picked, end[order])
    single = [read(rows(tokens, slice(i, i + 1)), None) for i in range(len(tokens[0]))]
    assert same(read, tokens, type(end).cat([s for _, s in single]), end)
    changed = tuple(t.clone() for t in tokens)
    for t in changed:
        t[0] *= -2
    assert difference(read(changed, None)[0][1:], read(tokens, None)[0][1:]) <= ROUNDING


def rows_at_different_places_go_on_together(read: Read, tokens: Tokens) -> None:
    """Sessions that have read 1, 5 and 8 tokens continue in one batch, each as it would alone."""
    places = [1, 5, 8]
    states = [read(cut(rows(tokens, [i]), 0, at), None)[1] for i, at in enumerate(places)]
    following = [cut(rows(tokens, [i]), at, at + 4) for i, at in enumerate(places)]
    joined = tuple(torch.cat(parts) for parts in zip(*following, strict=True))
    alone = [read(f, s) for f, s in zip(following, states, strict=True)]
    together, state = read(joined, type(states[0]).cat(states))
    assert difference(together, torch.cat([r for r, _ in alone])) <= ROUNDING
    assert same(read, joined, state, type(state).cat([s for _, s in alone]))
    first, state = read(cut(joined, 0, 1), type(state).cat(states))
    assert difference(first, together[:, :1]) <= ROUNDING


def survives_saving(read: Read, tokens: Tokens, tmp_path: Path) -> None:
    for at in (7, 8):
        _, state = read(cut(tokens, 0, at), None)
        state.save(tmp_path / "state.safetensors")
        loaded = type(state).load(tmp_path / "state.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(state.tensors(), loaded.tensors(), strict=True))
        assert torch.equal(read(cut(tokens, at), state)[0], read(cut(tokens, at), loaded)[0])


def moves_to_another_dtype(read: Read, tokens: Tokens) -> None:
    _, state = read(tokens, None)
    moved = state.to(torch.float32)
    assert all(t.dtype == torch.float32 for t in moved.tensors() if t.is_floating_point())
    assert difference(state, moved.to(torch.float64)) <= 1e-5
