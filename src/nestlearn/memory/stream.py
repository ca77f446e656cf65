"""The state of chunked deep memories over a stream, and the loop that cuts a sequence at their chunk boundaries.

A memory's gradients are taken at the weights of its current chunk's start (NL Eq. 90). The state therefore holds two
copies of the weights: ``live`` (every write so far) and ``start`` (the live ones as they were when the chunk began).
With both at hand a stream may be cut anywhere, single tokens included, at a size that never grows; no pending inputs
need to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nestlearn.memory.deep import Fast, Weights
from nestlearn.memory.state import State
from nestlearn.ops.scan import Tensors, scan

Step = Callable[[Fast, Weights | None, Tensors, Tensors, int | None], tuple[Tensor, Fast, Weights]]
Loop = Callable[[Fast, Tensors, Tensors], tuple[Tensor, Fast]]


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
) -> tuple[Tensor, FastState]:
    """Fold ``step`` over a sequence, cut at multiples of ``chunk`` of each row's own stream.

    step      (live, start, inputs, constants, offset) -> (output, live, start); a piece never crosses a chunk boundary,
              offset is its first token's place in the chunk, None when ``start`` is already right for every memory
    inputs    (B, …, T, ·), batch first and time second last
    periods   (M,) chunk of each memory
    fresh     the state is at a chunk boundary for certain, so nothing needs to be looked up on the device
    loop      (live, inputs, constants) -> (output, live): all steps from a chunk boundary on in one function
    """
    length = inputs[0].shape[-2]
    if length == 1 and not fresh:
        return _one_token(step, state, inputs, constants, periods)
    offsets = [0] if fresh else torch.unique(state.seen % chunk).tolist()
    if len(offsets) > 1:
        return _by_offset(step, state, inputs, constants, periods, offsets, chunk=chunk, recompute=recompute, loop=loop)
    live, start = Fast(state.w1, state.w2, state.m1, state.m2), Weights(state.start1, state.start2)
    outputs, cut = [], 0
    if offsets[0]:
        cut = min(chunk - offsets[0], length)
        output, live, start = step(live, start, _cut(inputs, 0, cut), constants, offsets[0])
        outputs.append(output)
    whole = (length - cut) // chunk * chunk
    if whole:

        def fold(carry: Tensors, given: Tensors, fixed: Tensors) -> tuple[Tensor, Tensors]:
            output, end, _ = step(Fast(*carry), None, given, fixed, 0)
            return output, end

        given = _cut(inputs, cut, cut + whole)
        if loop is None:
            pieces = [slice(a, a + chunk) for a in range(0, whole, chunk)]
            output, carry = scan(fold, live, given, constants, pieces, recompute=recompute)
        else:
            output, carry = loop(live, given, constants)
        live, start = Fast(*carry), Weights(carry[0], carry[1])
        outputs.append(output)
    if cut + whole < length:
        given = _cut(inputs, cut + whole, length)
        if loop is None:
            output, live, start = step(live, None, given, constants, 0)
        else:
            start = live.weights
            output, live = loop(live, given, constants)
        outputs.append(output)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)
    return output, FastState(*live, *start, state.seen + length, state.names)


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
    step: Step,
    state: FastState,
    inputs: Tensors,
    constants: Tensors,
    periods: Tensor,
    offsets: list[int],
    *,
    chunk: int,
    recompute: bool,
    loop: Loop | None,
) -> tuple[Tensor, FastState]:
    """Rows at different places of their chunks: one run for each place, results put back in order."""
    rows = [torch.nonzero(state.seen % chunk == offset).flatten() for offset in offsets]
    results = [
        run_stream(
            step,
            state[r],
            tuple(t[r] for t in inputs),
            constants,
            periods,
            chunk=chunk,
            fresh=False,
            recompute=recompute,
            loop=loop,
        )
        for r in rows
    ]
    order = torch.argsort(torch.cat(rows))
    return torch.cat([output for output, _ in results])[order], State.cat([end for _, end in results])[order]
