"""The state of chunked deep memories over a stream, and the loop that cuts a sequence at their chunk boundaries.

A memory's gradients are taken at the weights of its current chunk's start (NL Eq. 90). The state therefore holds two
copies of the weights: ``live`` (every write so far) and ``start`` (the live ones as they were when the chunk began).
With both at hand a stream may be cut anywhere, single tokens included, at a size that never grows; no pending inputs
need to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from nestlearn.memory.deep import Fast, Weights
from nestlearn.memory.state import State
from nestlearn.ops.scan import Tensors, scan

Step = Callable[[Fast, Weights | None, Tensors, Tensors, int | None], tuple[Tensor, Fast, Weights]]
Loop = Callable[[Fast, Tensors, Tensors], tuple[Tensor, Fast]]
Anywhere = Callable[[Fast, Weights, int, Tensors, Tensors], tuple[Tensor, Fast, Weights]]


@dataclass(frozen=True)
class FastState(State):
    """Fast weights of M memories: live w1 (B, M, H, d, h), w2 (B, M, H, h, d), their momenta, chunk-start copies.

    seen (B,) int64 tokens read by each row;  names of the M memories
    """

    w1: Tensor
    w2: Tensor
    m1: Tensor
    m2: Tensor
    start1: Tensor
    start2: Tensor
    seen: Tensor
    names: tuple[str, ...]

    @property
    def weights(self) -> Mapping[str, Weights]:
        """Live weights by memory: w1 (B, H, d, h), w2 (B, H, h, d)."""
        return {name: Weights(self.w1[:, i], self.w2[:, i]) for i, name in enumerate(self.names)}

    @property
    def momenta(self) -> Mapping[str, Weights]:
        """Momenta by memory, shaped as the weights."""
        return {name: Weights(self.m1[:, i], self.m2[:, i]) for i, name in enumerate(self.names)}

    @classmethod
    def fresh(cls, initial: Weights, batch: int, names: tuple[str, ...]) -> FastState:
        """Before the first token, from initial weights (M, H, ·, ·)."""
        w1, w2 = (w.expand(batch, *w.shape) for w in initial)
        zero1, zero2 = (torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in (w1, w2))
        seen = torch.zeros(batch, dtype=torch.long, device=w1.device)
        return cls(w1, w2, zero1, zero2, w1, w2, seen, names)


def run_stream(
    step: Step,
    state: FastState,
    inputs: Tensors,
    constants: Tensors,
    periods: Tensor,
    *,
    chunk: int,
    fresh: bool,
    recompute: bool,
    loop: Loop | None = None,
    anywhere: Anywhere | None = None,
    truncate: int | None = None,
    static: int = 0,
) -> tuple[Tensor, FastState]:
    """Fold ``step`` over a sequence, cut at multiples of ``chunk`` of each row's own stream.

    step      (live, start, inputs, constants, offset) -> (output, live, start); a piece never crosses a chunk boundary,
              offset is its first token's place in the chunk, None when ``start`` is already right for every memory
    inputs    (B, …, T, ·), batch first and time second last
    periods   (M,) chunk of each memory
    fresh     the state is at a chunk boundary for certain, so nothing needs to be looked up on the device
    loop      (live, inputs, constants) -> (output, live): all steps from a chunk boundary on in one function
    anywhere  (live, start, offset, inputs, constants) -> (output, live, start): all of it in one function, from any
              place in a chunk; not with ``truncate``
    truncate  no gradient passes the boundary before a chunk whose number in its row's stream is a multiple of this,
              number 0 excepted; the first ``static`` memories, which do not change, keep their gradients
    """
    length = inputs[0].shape[-2]
    period = chunk * (truncate or 1)
    if truncate is not None and not fresh and torch.is_grad_enabled():
        state = _severed_rows(state, period, static)
    if length == 1 and not fresh:
        return _one_token(step, state, inputs, constants, periods)
    offsets = [0] if fresh else torch.unique(state.seen % period).tolist()
    if len(offsets) > 1:
        again = partial(
            run_stream, step, constants=constants, periods=periods, chunk=chunk, fresh=False, recompute=recompute,
            loop=loop, anywhere=anywhere, truncate=truncate, static=static,
        )  # fmt: skip
        return _by_offset(again, state, inputs, offsets, period)
    live, start = Fast(state.w1, state.w2, state.m1, state.m2), Weights(state.start1, state.start2)
    if anywhere is not None and truncate is None:
        output, live, start = anywhere(live, start, offsets[0] % chunk, inputs, constants)
        return output, FastState(*live, *start, state.seen + length, state.names)
    outputs, cut = [], 0
    if offsets[0] % chunk:
        cut = min(chunk - offsets[0] % chunk, length)
        output, live, start = step(live, start, _cut(inputs, 0, cut), constants, offsets[0] % chunk)
        outputs.append(output)
    whole = (length - cut) // chunk * chunk
    edges = _edges(cut, cut + whole, offsets[0], None if truncate is None else period)
    for begin, end in pairwise(edges):
        if begin > cut or (cut and truncate is not None and (offsets[0] + cut) % period == 0):
            live = _severed(live, static)
        output, live = _whole(step, live, _cut(inputs, begin, end), constants, chunk, recompute, loop)
        start = live.weights
        outputs.append(output)
    if cut + whole < length:
        if truncate is not None and cut + whole and (offsets[0] + cut + whole) % period == 0:
            live = _severed(live, static)
        given = _cut(inputs, cut + whole, length)
        if loop is None:
            output, live, start = step(live, None, given, constants, 0)
        else:
            start = live.weights
            output, live = loop(live, given, constants)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
    return output, FastState(*live, *start, state.seen + length, state.names)


def _whole(
    step: Step, live: Fast, given: Tensors, constants: Tensors, chunk: int, recompute: bool, loop: Loop | None
) -> tuple[Tensor, Fast]:
    """Whole chunks, from a chunk boundary on."""
    if loop is not None:
        return loop(live, given, constants)

    def fold(carry: Tensors, given: Tensors, fixed: Tensors) -> tuple[Tensor, Tensors]:
        output, end, _ = step(Fast(*carry), None, given, fixed, 0)
        return output, end

    pieces = [slice(a, a + chunk) for a in range(0, given[0].shape[-2], chunk)]
    output, carry = scan(fold, live, given, constants, pieces, recompute=recompute)
    return output, Fast(*carry)


def _edges(begin: int, end: int, offset: int, period: int | None) -> list[int]:
    """``begin``, the boundaries of ``period`` between it and ``end``, and ``end``; ``offset`` is token 0's place."""
    if begin == end:
        return []
    inner = [] if period is None else range(begin + period - (offset + begin) % period, end, period)
    return [begin, *inner, end]


def _severed(live: Fast, static: int) -> Fast:
    """Equal numbers without a gradient, but for the first ``static`` memories."""
    if not static:
        return Fast(*(t.detach() for t in live))
    return Fast(*(torch.cat([t[:, :static], t[:, static:].detach()], dim=1) for t in live))


def _severed_rows(state: FastState, period: int, static: int) -> FastState:
    """Without gradients in the rows that stand at a boundary of ``period`` and have read something."""
    at = ((state.seen % period == 0) & (state.seen > 0))[:, None, None, None, None]
    live = Fast(state.w1, state.w2, state.m1, state.m2)
    live = Fast(*(torch.where(at, cut, t) for t, cut in zip(live, _severed(live, static), strict=True)))
    return replace(state, **live._asdict())


def _cut(inputs: Tensors, begin: int, end: int) -> Tensors:
    return tuple(t[..., begin:end, :] for t in inputs)


def _one_token(
    step: Step, state: FastState, inputs: Tensors, constants: Tensors, periods: Tensor
) -> tuple[Tensor, FastState]:
    """Rows may stand at different places of their chunks: each memory of each row starts its chunk when that is due."""
    due = (state.seen[:, None] % periods == 0)[..., None, None, None]
    start = Weights(torch.where(due, state.w1, state.start1), torch.where(due, state.w2, state.start2))
    live = Fast(state.w1, state.w2, state.m1, state.m2)
    output, live, start = step(live, start, inputs, constants, None)
    return output, FastState(*live, *start, state.seen + 1, state.names)


def _by_offset(
    again: Callable[..., tuple[Tensor, FastState]], state: FastState, inputs: Tensors, offsets: list[int], period: int
) -> tuple[Tensor, FastState]:
    """Rows at different places: one run for each place, results put back in order."""
    rows = [torch.nonzero(state.seen % period == offset).flatten() for offset in offsets]
    results = [again(state=state[r], inputs=tuple(t[r] for t in inputs)) for r in rows]
    order = torch.argsort(torch.cat(rows))
    return torch.cat([output for output, _ in results])[order], State.cat([end for _, end in results])[order]
