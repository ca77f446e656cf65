"""The inner loop of a self-modifying memory on a GPU: the twin of `ops/inner_loop.py`, in two Triton kernels.

One program takes one head of one row through a group of chunks, all its memories in turn. The memories depend on one
another only through k, v, η, α at a chunk's start, so one program needs no word from another; they do not fit on chip
together (five of them at d = h = 64: 160 KB in float32), so a memory is on chip while its turn lasts and lies in the L2
cache between. Per chunk of 64 that is 320 KB of L2 traffic against about 50 million FLOP: 8 µs against 22 µs where a
program has its multiprocessor for itself (H100: 42 KB/µs of L2 and 7.5 TFLOP/s of bf16 each by the datasheet, the
latter at 30 %). The grid has B · H programs; fewer than the card has multiprocessors leave some of it idle.

The state at every ``keep``-th chunk is kept, as in the plain version; the backward pass runs the forward kernel over a
group again, writing down each chunk's start, and then the backward kernel. Nothing is added atomically: results are
the same bits every time.
"""

# A kernel is launched with tuples unpacked, which this check cannot count.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.ops.first_order import first_order
from nestlearn.ops.inner_loop import LoopInputs, LoopSpec, LoopState, LoopTrained
from nestlearn.ops.kernels.backward import backward_kernel
from nestlearn.ops.kernels.forward import forward_kernel

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


class Plan(NamedTuple):
    """What the launches of one call share: sizes, the number of chunks of each row, bounds (B, 2) and constants."""

    spec: LoopSpec
    chunks: list[int]
    bounds: Tensor
    shape: tuple[int, int, int]  # heads, d, h
    strides: tuple[int, int]  # from row to row and from head to head of the inputs, in elements
    operands: torch.dtype

    def groups(self) -> list[range]:
        """The chunks, ``keep`` at a time."""
        return [range(a, min(a + self.spec.keep, max(self.chunks))) for a in range(0, max(self.chunks), self.spec.keep)]

    def ends_in(self, group: range) -> bool:
        """Whether a row's last chunk is in the group."""
        return any(count - 1 in group for count in self.chunks)

    def numbers(self, group: range, slot: int) -> tuple[Any, ...]:
        """The kernels' numbers, in their order."""
        mu = self.spec.momentum
        log_mu = math.log(mu) if mu else -1e4  # e^−10000 is 0
        return (
            group.start, len(group), self.spec.chunk, *self.shape, *self.strides, slot, log_mu, self.spec.rate_max
        )  # fmt: skip

    def constants(self, trained: LoopTrained, *, moment: bool) -> dict[str, Any]:
        """The kernels' compile-time constants."""
        spec, (_, d, h) = self.spec, self.shape
        place = {name: number for number, name in enumerate(spec.names)}
        block = max(padded(spec.chunk), padded(d), padded(h))
        return {
            "MEMORIES": len(spec.names), "WRITTEN": spec.written, "KEY": place["k"], "VALUE": place["v"],
            "RATE": place["eta"], "RETAIN": place["alpha"], "QUERY": place.get("q", -1),
            "RETENTION": spec.retention, "NORMALISE": spec.normalise, "ANCHORED": spec.anchored and spec.retention,
            "MIXED": trained.mix is not None, "MOMENT": moment,
            "C": padded(spec.chunk), "D": padded(d), "HID": padded(h), "OPERANDS": OPERANDS[self.operands],
            "PRECISION": "ieee" if self.operands == torch.float32 else "tf32",
            "num_warps": 4 if block <= 32 else 8, "num_stages": 1,
        }  # fmt: skip


def padded(size: int) -> int:
    """A tile's side: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(size))


def inner_loop(
    inputs: LoopInputs,
    state: LoopState,
    trained: LoopTrained,
    spec: LoopSpec,
    *,
    operands: torch.dtype = torch.float32,
    cu_seqlens: Sequence[int] | None = None,
) -> tuple[Tensor, LoopState]:
    """As `ops.inner_loop.inner_loop`, but for keep 0, which is taken as 1: y (B, H, T, d) and the state after.

    operands    float32, or bfloat16: what products read; sums, states and decays are float32 either way
    cu_seqlens  0, ends of documents of any lengths lying one after another in one row: inputs are then (1, H, T, d),
                the state has a row for each document

    Inputs are float32 or bfloat16, the rest float32.
    """
    spec = spec._replace(keep=max(1, spec.keep))
    y, *after = _InnerLoop.apply(spec, operands, cu_seqlens, *inputs, *state, *trained)  # pyright: ignore
    return y, LoopState(*after)


def _plan(
    inputs: LoopInputs, state: LoopState, spec: LoopSpec, operands: torch.dtype, cu_seqlens: Sequence[int] | None
) -> Plan:
    batch, heads, length, d = inputs.x.shape
    if cu_seqlens is None:
        edges = [(0, length)] * batch
    else:
        edges = list(zip(cu_seqlens, list(cu_seqlens)[1:], strict=False))
        if batch != 1 or cu_seqlens[0] != 0 or cu_seqlens[-1] != length or any(a >= b for a, b in edges):
            raise UserError(
                f"cu_seqlens is {list(cu_seqlens)} for inputs of {batch} rows of {length} tokens: it must rise from 0 "
                "to the row's length, with one row"
            )
    if len(edges) != len(state.w1):
        raise UserError(f"the state has {len(state.w1)} rows for {len(edges)} sequences: it must have one for each")
    bounds = torch.tensor(edges, dtype=torch.int32, device=inputs.x.device)
    strides = (0 if cu_seqlens is not None else heads * length * d, length * d)
    chunks = [-(-(b - a) // spec.chunk) for a, b in edges]
    return Plan(spec, chunks, bounds, (heads, d, state.w1.shape[-1]), strides, operands)


class _InnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, spec: LoopSpec, operands: torch.dtype, cu_seqlens: Sequence[int] | None, *given: Tensor
    ) -> tuple[Tensor, ...]:
        tensors = tuple(t if t is None else t.contiguous() for t in given)
        inputs, state, trained = LoopInputs(*tensors[:3]), LoopState(*tensors[3:7]), LoopTrained(*tensors[7:])
        plan = _plan(inputs, state, spec, operands, cu_seqlens)
        live = LoopState(*(t.clone() for t in state))
        y, kept = torch.empty_like(inputs.x), []
        for group in plan.groups():
            kept.extend(t.clone() for t in _weights(live, spec))
            moment = spec.momentum > 0 or plan.ends_in(group)
            _run_forward(plan, inputs, y, live, trained, group, moment=moment, read=True)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.given = plan, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return y, *live

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, *d_after: Tensor | None) -> tuple[Any, ...]:
        saved, plan = ctx.saved_tensors, ctx.plan
        tensors, kept = saved[: ctx.given], saved[ctx.given :]
        inputs, state, trained = LoopInputs(*tensors[:3]), LoopState(*tensors[3:7]), LoopTrained(*tensors[7:])
        dy = torch.zeros_like(inputs.x) if dy is None else dy.contiguous()
        grads = Grads.start(inputs, state, trained, d_after, plan.spec)
        groups, size = plan.groups(), len(_weights(state, plan.spec))
        for number, group in reversed(list(enumerate(groups))):
            starts = kept[number * size : (number + 1) * size]
            moment = (
                plan.spec.momentum > 0 or (d_after[2] is not None or d_after[3] is not None) and plan.ends_in(group)
            )
            _run_backward(
                plan, inputs, dy, _group_states(plan, inputs, starts, trained, group), trained, grads, group, moment
            )
        return None, None, None, *grads.finish(trained, plan.spec)


def _weights(state: LoopState, spec: LoopSpec) -> tuple[Tensor, ...]:
    """What a chunk's start consists of: at μ = 0 the old momenta do not matter."""
    return tuple(state) if spec.momentum > 0 else tuple(state[:2])


def _group_states(
    plan: Plan, inputs: LoopInputs, starts: Sequence[Tensor], trained: LoopTrained, group: range
) -> LoopState:
    """The state at the start of each chunk of a group: (len(group), B, M, H, ·, ·)."""
    slots = []
    for start in starts:
        slot = start.new_empty(len(group), *start.shape)
        slot[0] = start
        slots.append(slot)
    if len(slots) == 2:  # read with weight 0, so they must be finite
        slots.extend([torch.zeros_like(slots[0]), torch.zeros_like(slots[1])])
    states = LoopState(*slots)
    if len(group) > 1:
        moment = plan.spec.momentum > 0
        _run_forward(plan, inputs, inputs.x, states, trained, group[:-1], moment=moment, read=False)
    return states


def _run_forward(
    plan: Plan, inputs: LoopInputs, y: Tensor, state: LoopState, trained: LoopTrained, group: range, *, moment: bool,
    read: bool,
) -> None:  # fmt: skip
    """Writes y if ``read``, and the state in place or, where it has slots, to the next slot."""
    slot = state.w1.stride(0) if state.w1.dim() == 6 else 0
    forward_kernel[(len(plan.chunks) * plan.shape[0],)](
        *inputs, y, *state, *_fixed(trained), plan.bounds, *plan.numbers(group, slot),
        READ=read, **plan.constants(trained, moment=moment),
    )  # fmt: skip


def _run_backward(
    plan: Plan, inputs: LoopInputs, dy: Tensor, states: LoopState, trained: LoopTrained, grads: Grads, group: range,
    moment: bool,
) -> None:  # fmt: skip
    backward_kernel[(len(plan.chunks) * plan.shape[0],)](
        *inputs, dy, *states, *_fixed(trained), plan.bounds, *grads, *plan.numbers(group, states.w1.stride(0)),
        **plan.constants(trained, moment=moment),
    )  # fmt: skip


def _fixed(trained: LoopTrained) -> tuple[Tensor, ...]:
    """Anchors, scales, λ and read-outs, in the kernels' order."""
    w1, w2, scales, *reads, mix = trained
    return (w1, w2, scales, scales if mix is None else mix, *reads)


class Grads(NamedTuple):
    """Gradients being collected, in the backward kernel's order; per row of the batch where a parameter has none."""

    x: Tensor
    value: Tensor
    query: Tensor
    w1: Tensor
    w2: Tensor
    m1: Tensor
    m2: Tensor
    a1: Tensor
    a2: Tensor
    scales: Tensor
    mix: Tensor
    rate_weight: Tensor
    rate_bias: Tensor
    retain_weight: Tensor
    retain_bias: Tensor

    @classmethod
    def start(
        cls, inputs: LoopInputs, state: LoopState, trained: LoopTrained, d_after: Sequence[Tensor | None],
        spec: LoopSpec,
    ) -> Grads:  # fmt: skip
        """The gradients of the end, and zeros."""
        rows = len(state.w1)
        ends = (torch.zeros_like(s) if g is None else g.clone(memory_format=torch.contiguous_format)
                for s, g in zip(state, d_after, strict=True))  # fmt: skip
        anchors = (t.new_zeros(rows, spec.written, *t.shape[1:]) for t in (trained.w1, trained.w2))
        _, _, scales, *reads, _ = trained
        per_row = [t.new_zeros(rows, *t.shape) for t in (scales, scales, *reads)]
        return cls(*(torch.zeros_like(t) for t in inputs), *ends, *anchors, *per_row)

    def finish(self, trained: LoopTrained, spec: LoopSpec) -> tuple[Tensor | None, ...]:
        """Of every tensor given to `inner_loop`, in its order."""
        mix = None if trained.mix is None else self.mix.sum(0)
        if spec.momentum == 0:  # m was not read: only what the static memories' momenta pass on is left
            moved = [m.clone() for m in (self.m1, self.m2)]
            for m in moved:
                m[:, len(spec.names) - spec.written :] = 0
        else:
            moved = [self.m1, self.m2]
        anchors: list[Tensor | None] = [None, None]
        if spec.anchored and spec.retention:
            anchors = [
                torch.cat([t.new_zeros(t.shape[0] - spec.written, *t.shape[1:]), found.sum(0)])
                for t, found in ((trained.w1, self.a1), (trained.w2, self.a2))
            ]
        others = (t.sum(0) for t in self[11:])
        return (*self[:5], *moved, *anchors, self.scales.sum(0), *others, mix)
