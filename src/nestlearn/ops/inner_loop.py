"""The whole inner loop of a self-modifying memory over all its chunks, as one function with a backward pass by hand.

`inner_chunk.py` has the mathematics of one chunk. Here its pieces are folded, cut and chained: only the state at every
``keep``-th chunk is stored; the backward pass runs a group of chunks again from there and then walks it backwards. Or
all that it needs is stored and nothing is run twice. The gradients are exact, and the same; first derivatives only.

Letters: B batch, H heads, T tokens, M memories, G written ones, d head width, h hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from nestlearn.ops.first_order import first_order
from nestlearn.ops.inner_chunk import Chunk, Frame, LoopSpec, StateGrads, Totals, chunk_back, run_chunk
from nestlearn.ops.inner_layer import last_write


class LoopInputs(NamedTuple):
    """All (B, H, T, d)."""

    x: Tensor
    value: Tensor
    query: Tensor


class LoopState(NamedTuple):
    """Live weights w1 (B, M, H, d, h), w2 (B, M, H, h, d), and their momenta."""

    w1: Tensor
    w2: Tensor
    m1: Tensor
    m2: Tensor


class LoopTrained(NamedTuple):
    """Initial w1 (M, H, d, h), w2 (M, H, h, d); rate scales (G, H); read-outs (H, d) and (H,); λ (G, H), None for 0."""

    w1: Tensor
    w2: Tensor
    scales: Tensor
    rate_weight: Tensor
    rate_bias: Tensor
    retain_weight: Tensor
    retain_bias: Tensor
    mix: Tensor | None = None


STORED = 8  # chunks: longer pieces are run again even inside `storing`, since what is stored grows with them
Pair = tuple[Tensor, Tensor]  # the folded state, see `_fold_state`
_STORE: ContextVar[bool] = ContextVar("nestlearn_store_chunks", default=False)


@contextmanager
def storing() -> Iterator[None]:
    """Loops inside of up to ``STORED`` chunks run none twice: for a short piece whose backward pass follows at once."""
    token = _STORE.set(True)
    try:
        yield
    finally:
        _STORE.reset(token)


def inner_loop(inputs: LoopInputs, state: LoopState, trained: LoopTrained, spec: LoopSpec) -> tuple[Tensor, LoopState]:
    """y (B, H, T, d) and the state after the last token; the first token begins a chunk, the last may be short."""
    if torch.compiler.is_compiling():
        from nestlearn.ops.inner_loop_op import inner_loop_op

        return inner_loop_op(inputs, state, trained, spec._replace(keep=max(1, spec.keep)), in_cpp=False)
    if not torch.is_grad_enabled():
        y, after, _ = run_loop(inputs, state, trained, spec._replace(keep=0))
        return y, LoopState(*after)
    if _STORE.get() and inputs.x.shape[2] <= STORED * spec.chunk:
        spec = spec._replace(keep=0)
    y, *after = _InnerLoop.apply(spec, *inputs, *state, *trained)  # pyright: ignore[reportGeneralTypeIssues]
    return y, LoopState(*after)


class _InnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: LoopSpec, *tensors: Tensor) -> tuple[Tensor, ...]:
        done: list[tuple[Pair, Chunk]] | None = None if spec.keep else []
        y, after, kept = run_loop(*parts(tensors), spec, done)
        stored, ctx.tree = tree_flatten(done)
        ctx.places = [place for place, leaf in enumerate(stored) if isinstance(leaf, Tensor)]
        ctx.plain = [None if isinstance(leaf, Tensor) else leaf for leaf in stored]
        ctx.spec, ctx.given, ctx.kept = spec, len(tensors), len(kept)
        ctx.save_for_backward(*tensors, *kept, *(stored[place] for place in ctx.places))
        return y, *after

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, *d_state: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing each reading recomputes
        kept, stored = saved[ctx.given : ctx.given + ctx.kept], saved[ctx.given + ctx.kept :]
        leaves = list(ctx.plain)
        for place, leaf in zip(ctx.places, stored, strict=True):
            leaves[place] = leaf
        done = tree_unflatten(leaves, ctx.tree)
        return None, *loop_back(*parts(saved[: ctx.given]), kept, dy, LoopState(*d_state), ctx.spec, done)


def parts(tensors: Sequence[Tensor]) -> tuple[LoopInputs, LoopState, LoopTrained]:
    """What was given, from one sequence."""
    return LoopInputs(*tensors[:3]), LoopState(*tensors[3:7]), LoopTrained(*tensors[7:])


def run_loop(
    inputs: LoopInputs,
    state: LoopState,
    trained: LoopTrained,
    spec: LoopSpec,
    done: list[tuple[Pair, Chunk]] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """y, the state after, and the folded state at every ``keep``-th chunk, two tensors each.

    done  collects the state before each chunk and what happened in it
    """
    batch, heads, length, width = inputs.x.shape
    frame = _frame(state, trained, spec, batch)
    pair = _fold_state(state, spec)
    kept: list[Tensor] = []
    y = inputs.x.new_empty(batch, length, heads, width).transpose(1, 2)
    last: Chunk | None = None
    for number, piece in enumerate(_pieces(length, spec.chunk)):
        if spec.keep and number % spec.keep == 0:
            kept.extend(pair)
        after = torch.empty_like(pair[0]), torch.empty_like(pair[1])
        out, last = run_chunk(_cut(inputs, piece), *pair, frame, *after)
        y[:, :, piece] = out.unflatten(0, (batch, heads))
        if done is not None:
            done.append((pair, last))
        pair = after
    assert last is not None
    return y, _unfold_state(state, pair, last, spec), kept


def loop_back(
    inputs: LoopInputs,
    state: LoopState,
    trained: LoopTrained,
    kept: Sequence[Tensor],
    dy: Tensor,
    d_state: LoopState,
    spec: LoopSpec,
    done: list[tuple[Pair, Chunk]] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of everything given, in its order; None for initial weights that retention does not pull towards.

    done  what `run_loop` collected; otherwise each group of chunks is run again from the state that was kept
    """
    frame = _frame(state, trained, spec, len(inputs.x))
    totals = Totals.zeros(frame)
    grads, d_inputs = _fold_grads(d_state, spec), tuple(torch.empty_like(t) for t in inputs)
    pieces = _pieces(inputs.x.shape[2], spec.chunk)
    size = spec.keep or len(pieces)
    for group in reversed(range(0, len(pieces), size)):
        part, begin = pieces[group : group + size], group // size * 2
        again = done if done is not None else _again(inputs, part, (kept[begin], kept[begin + 1]), frame)
        grads = _walk_back(dy, part, again, grads, frame, totals, d_inputs)
    return *d_inputs, *_state_grads(grads, d_state, totals, spec), *_trained_grads(totals, trained)


def _again(inputs: LoopInputs, pieces: list[slice], pair: Pair, frame: Frame) -> list[tuple[Pair, Chunk]]:
    """Run a group of chunks from the state before it: the state before each, and what happened."""
    done: list[tuple[Pair, Chunk]] = []
    for piece in pieces:
        after = torch.empty_like(pair[0]), torch.empty_like(pair[1])
        done.append((pair, run_chunk(_cut(inputs, piece), *pair, frame, *after)[1]))
        pair = after
    return done


def _walk_back(
    dy: Tensor,
    pieces: list[slice],
    done: list[tuple[Pair, Chunk]],
    grads: StateGrads,
    frame: Frame,
    totals: Totals,
    d_inputs: tuple[Tensor, ...],
) -> StateGrads:
    """Through a group of chunks backwards; what happened in each is dropped as soon as it was used."""
    batch, heads = dy.shape[:2]
    for piece in reversed(pieces):
        before, happened = done.pop()
        found, grads = chunk_back(dy[:, :, piece].flatten(0, 1), grads, happened, before, frame, totals)
        for total, part in zip(d_inputs, found, strict=True):
            total[:, :, piece] = part.unflatten(0, (batch, heads))
    return grads


def _pieces(length: int, chunk: int) -> list[slice]:
    return [slice(begin, min(begin + chunk, length)) for begin in range(0, length, chunk)]


def _cut(inputs: LoopInputs, piece: slice) -> tuple[Tensor, ...]:
    return tuple(t[:, :, piece].flatten(0, 1) for t in inputs)


def _frame(state: LoopState, trained: LoopTrained, spec: LoopSpec, batch: int) -> Frame:
    """Fold what does not change; rows of the batch repeat what is per head."""

    def wide(t: Tensor) -> Tensor:  # (G, H, …) to (G · B · H, …)
        return t[:, None].expand(len(t), batch, *t.shape[1:]).flatten(0, 2)

    def each(t: Tensor) -> Tensor:  # (H, …) to (B · H, …)
        return t.expand(batch, *t.shape).flatten(0, 1)

    first, anchored = len(spec.names) - spec.written, spec.anchored and spec.retention
    static1, static2 = (
        _fold(t[:, :first]).unflatten(0, (first, -1)) if first else t.new_empty(0) for t in (state.w1, state.w2)
    )
    anchor1, anchor2 = (wide(t[first:]) if anchored else None for t in (trained.w1, trained.w2))
    return Frame(
        spec,
        static1,
        static2,
        anchor1,
        anchor2,
        wide(trained.scales)[:, None, None],
        each(trained.rate_weight)[..., None],
        each(trained.rate_bias)[:, None],
        each(trained.retain_weight)[..., None],
        each(trained.retain_bias)[:, None],
        None if trained.mix is None else wide(trained.mix)[:, None, None],
    )


def _fold(t: Tensor) -> Tensor:
    """(B, M, H, …) to (M · B · H, …)."""
    return t.transpose(0, 1).flatten(0, 2)


def _unfold(t: Tensor, like: Tensor) -> Tensor:
    """(G · B · H, …) to (B, G, H, …)."""
    return t.unflatten(0, (-1, len(like), like.shape[2])).transpose(0, 1)


def _fold_state(state: LoopState, spec: LoopSpec) -> tuple[Tensor, Tensor]:
    """[w1; m1] (F, 2d, h) and [w2; m2] (F, 2h, d) of the written memories, without m at μ = 0."""
    first = len(spec.names) - spec.written
    w1, w2, m1, m2 = (_fold(t[:, first:]) for t in state)
    if spec.momentum == 0:
        return w1, w2
    return torch.cat([w1, m1], dim=1), torch.cat([w2, m2], dim=1)


def _unfold_state(state: LoopState, pair: tuple[Tensor, Tensor], last: Chunk, spec: LoopSpec) -> tuple[Tensor, ...]:
    """The state after the loop; static memories as they were."""
    (d, h), first = state.w1.shape[-2:], len(spec.names) - spec.written
    if spec.momentum == 0:
        ends = (*pair, last_write(last.layer1), last_write(last.layer2))
    else:
        ends = (pair[0][:, :d], pair[1][:, :h], pair[0][:, d:], pair[1][:, h:])
    return tuple(torch.cat([old[:, :first], _unfold(new, old)], dim=1) for old, new in zip(state, ends, strict=True))


def _fold_grads(grads: LoopState, spec: LoopSpec) -> StateGrads:
    first = len(spec.names) - spec.written
    w1, w2, m1, m2 = (_fold(t[:, first:]) for t in grads)
    if spec.momentum == 0:
        return StateGrads(w1, w2, m1, m2)
    return StateGrads(torch.cat([w1, m1], dim=1), torch.cat([w2, m2], dim=1))


def _state_grads(grads: StateGrads, d_state: LoopState, totals: Totals, spec: LoopSpec) -> tuple[Tensor, ...]:
    """Of the state before the loop: what passes by the static memories included."""
    first = len(spec.names) - spec.written
    (d, h), out = d_state.w1.shape[-2:], []
    moved = (None, None) if spec.momentum == 0 else (grads.s1[:, d:], grads.s2[:, h:])
    written = (grads.s1[:, :d], grads.s2[:, :h], *moved)
    for number, (end, new) in enumerate(zip(d_state, written, strict=True)):
        static = end[:, :first]
        if first and number < 2:
            static = static + _unfold((totals.static1, totals.static2)[number].flatten(0, 1), end)
        rest = torch.zeros_like(end[:, first:]) if new is None else _unfold(new, end)
        out.append(torch.cat([static, rest], dim=1))
    return tuple(out)


def _trained_grads(totals: Totals, trained: LoopTrained) -> tuple[Tensor | None, ...]:
    """Of `LoopTrained`, summed over the rows of the batch."""

    def each(t: Tensor, like: Tensor) -> Tensor:
        return t.reshape(-1, *like.shape).sum(0)

    def wide(t: Tensor, like: Tensor) -> Tensor:
        return t.reshape(len(like), -1, *like.shape[1:]).sum(1)

    anchors: list[Tensor | None] = []
    for total, like in ((totals.anchor1, trained.w1), (totals.anchor2, trained.w2)):
        if total is None:
            anchors.append(None)
            continue
        found = torch.zeros_like(like)
        written = len(total) // (len(totals.rate_bias))
        found[-written:] = wide(total, like[-written:])
        anchors.append(found)
    return (
        *anchors,
        wide(totals.scales, trained.scales),
        each(totals.rate_weight, trained.rate_weight),
        each(totals.rate_bias, trained.rate_bias),
        each(totals.retain_weight, trained.retain_weight),
        each(totals.retain_bias, trained.retain_bias),
        None if trained.mix is None or totals.mix is None else wide(totals.mix, trained.mix),
    )
