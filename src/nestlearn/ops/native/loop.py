"""The inner loop of a self-modifying memory in C++: the twin of `ops/inner_loop.py` on CPUs.

One program takes one head of one row through all its chunks and memories; what it works on stays in the core's caches,
where plain torch passes whole batches through memory between any two operations. Only the entries below the diagonal of
a chunk's matrices are computed, and its systems are solved by substitution. Programs need no word from one another, so
results do not depend on the batch or the number of threads. Threads are Python's: the library holds no lock of theirs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.first_order import first_order
from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained, parts
from nestlearn.ops.native.call import address, ready, run, structure

NUMBERS = (
    "batch", "heads", "length", "memories", "written", "width", "hidden", "chunk", "keep", "offset",
    "key", "value", "rate", "retain", "query", "retention", "normalise", "anchored", "mixed",
)  # fmt: skip
ENDS = ("w1", "w2", "m1", "m2")
STARTS = ("start1", "start2")
TRAINED = ("initial1", "initial2", "scales", "rate_weight", "rate_bias", "retain_weight", "retain_bias", "mix")


class View(ctypes.Structure):
    """As in inner_loop.cpp."""

    _fields_ = [("base", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "token"))]

    @classmethod
    def of(cls, t: Tensor) -> View:
        return cls(t.data_ptr(), *t.stride()[:3])


def _views(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, View)


def _pointers(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, ctypes.c_void_p)


# As in record.h and inner_loop.cpp.
Spec = structure(
    "Spec", dict.fromkeys(NUMBERS, ctypes.c_int64) | dict.fromkeys(("momentum", "rate_max"), ctypes.c_double)
)
Given = structure("Given", _views("x", "value", "query") | _pointers(*ENDS, *TRAINED, *STARTS, "kept"))
After = structure("After", _views("y") | _pointers(*ENDS, *STARTS))
Back = structure(
    "Back",
    _views("dy")
    | _pointers(*ENDS, *STARTS)
    | _views("dx", "d_value", "d_query")
    | _pointers(*(f"d_{n}" for n in (*ENDS, *STARTS)), *TRAINED),
)
Start = tuple[Tensor | None, Tensor | None]
NOWHERE: Start = (None, None)


def inner_loop(inputs: LoopInputs, state: LoopState, trained: LoopTrained, spec: LoopSpec) -> tuple[Tensor, LoopState]:
    """As `ops.inner_loop.inner_loop`, but for keep 0, which is taken as 1: it is faster, in less memory."""
    spec = spec._replace(keep=max(1, spec.keep))
    if torch.compiler.is_compiling():
        from nestlearn.ops.inner_loop_op import inner_loop_op

        return inner_loop_op(inputs, state, trained, spec, in_cpp=True)
    return anywhere(inputs, state, NOWHERE, trained, spec, 0)[:2]


def anywhere(
    inputs: LoopInputs, state: LoopState, start: Start, trained: LoopTrained, spec: LoopSpec, offset: int
) -> tuple[Tensor, LoopState, Start]:
    """From anywhere in a chunk, of which ``offset`` tokens went before, with the weights that it started from.

    Also returns the weights that the last chunk started from, None where it is at its end. ``start`` is not read at
    offset 0.
    """
    spec, start = spec._replace(keep=max(1, spec.keep)), start if offset else NOWHERE
    if torch.is_grad_enabled():
        y, *ends = _InnerLoop.apply(spec, offset, *inputs, *state, *start, *trained)  # pyright: ignore[reportGeneralTypeIssues]
    else:
        y, ends, _ = run_loop(inputs, state, trained, spec, start, offset, kept=False)
    *after, start1, start2 = ends
    return y, LoopState(*after), (start1, start2)  # pyright: ignore[reportArgumentType]


class _InnerLoop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: LoopSpec, offset: int, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        inputs, state, trained = parts((*tensors[:7], *tensors[9:]))
        y, after, kept = run_loop(inputs, state, trained, spec, (tensors[7], tensors[8]), offset)
        ctx.spec, ctx.offset = spec, offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, kept)
        return y, *after

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor | None, *d_state: Tensor | None) -> tuple[Any, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs, state, trained = parts((*tensors[:7], *tensors[9:]))
        dy, start = torch.zeros_like(inputs.x) if dy is None else dy, (tensors[7], tensors[8])
        found = loop_back(inputs, state, trained, kept, dy, d_state, ctx.spec, start, ctx.offset)
        return None, None, *found


def run_loop(
    inputs: LoopInputs,
    state: LoopState,
    trained: LoopTrained,
    spec: LoopSpec,
    start: Start = NOWHERE,
    offset: int = 0,
    *,
    kept: bool = True,
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor]:
    """y; the state after and what its last chunk started from; the state at every ``keep``-th chunk."""
    call = _Call(inputs, state, trained, spec, start, offset)
    memory = inputs.x.new_empty(kept_numbers(inputs.x.shape, state.w1.shape, spec, offset) if kept else 0)
    call.point_to(memory)
    batch, heads, length, width = inputs.x.shape
    y = inputs.x.new_empty(batch, length, heads, width).transpose(1, 2)
    wanted = (*state, *state[:2]) if (offset + length) % spec.chunk else (*state, None, None)
    ends = [t if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in wanted]
    call.run("forward", After(View.of(y), *map(address, ends)))
    return y, tuple(ends), memory


def loop_back(
    inputs: LoopInputs,
    state: LoopState,
    trained: LoopTrained,
    kept: Tensor,
    dy: Tensor,
    d_state: Sequence[Tensor | None],
    spec: LoopSpec,
    start: Start = NOWHERE,
    offset: int = 0,
) -> tuple[Tensor | None, ...]:
    """Gradients of inputs, state, start and trained; None where they are 0 for certain, as those given may be.

    d_state  of w1, w2, m1, m2 and the two weights that the last chunk started from
    """
    call = _Call(inputs, state, trained, spec, start, offset)
    call.point_to(kept)
    batch, written = len(dy), spec.written
    dtype = inputs.x.dtype
    dy, d_after = ready(dy, dtype, strided=True), [t if t is None else ready(t, dtype) for t in d_state]
    d_inputs = [dy.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in inputs]
    forgotten = spec.momentum == 0 and written == len(spec.names)  # the momenta given
    d_before = [
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*state, *start)
    ]
    if forgotten:
        d_before[2:4] = None, None
    d_initial = [t.new_empty(batch, *t[-written:].shape) if call.anchored else None for t in trained[:2]]
    others = [None if t is None else t.new_empty(batch, *t.shape) for t in trained[2:]]
    results = (*d_before, *d_initial, *others)
    call.run("backward", Back(View.of(dy), *map(address, d_after), *map(View.of, d_inputs), *map(address, results)))
    anchors = (None if t is None else _whole(_rows(t), like) for t, like in zip(d_initial, trained[:2], strict=True))
    return *d_inputs, *d_before, *anchors, *(None if t is None else _rows(t) for t in others)


def _rows(t: Tensor) -> Tensor:
    """Summed over the batch."""
    return t[0] if len(t) == 1 else t.sum(0)


def _whole(found: Tensor, like: Tensor) -> Tensor:
    """With zeros for the memories that are not written, in front."""
    return found if len(found) == len(like) else torch.cat([torch.zeros_like(like[: -len(found)]), found])


def kept_numbers(inputs: Sequence[int], weights: Sequence[int], spec: LoopSpec, offset: int = 0) -> int:
    """How many numbers keep the states, for inputs (B, H, T, d) and w1 (B, M, H, d, h)."""
    (batch, heads, length, width), hidden = inputs, weights[-1]
    padded = (width + 15) // 16 * 16 * ((hidden + 15) // 16 * 16)  # PAD of tiles.h
    chunks = (offset + length + spec.chunk - 1) // spec.chunk
    groups = (chunks + spec.keep - 1) // spec.keep
    return batch * heads * groups * (4 if spec.momentum else 2) * len(spec.names) * padded


class _Call:
    """One problem as C++ sees it. Holds the tensors whose memory it points to."""

    def __init__(
        self, inputs: LoopInputs, state: LoopState, trained: LoopTrained, spec: LoopSpec, start: Start, offset: int
    ) -> None:
        batch, heads, length, width = inputs.x.shape
        self.anchored, self.dtype = spec.anchored and spec.retention, inputs.x.dtype
        place = {name: number for number, name in enumerate(spec.names)}
        self.programs = batch * heads
        self.spec = Spec(
            batch, heads, length, len(spec.names), spec.written, width, state.w1.shape[-1], spec.chunk, spec.keep,
            offset, place["k"], place["v"], place["eta"], place["alpha"], place.get("q", -1),
            spec.retention, spec.normalise, self.anchored, trained.mix is not None, spec.momentum, spec.rate_max,
        )  # fmt: skip
        views = [ready(t, self.dtype, strided=True) for t in inputs]
        others = [t if t is None else ready(t, self.dtype) for t in (*state, *trained, *start)]
        self.held = [*views, *others]
        self.given = Given(*map(View.of, views), *map(address, others), None)

    def point_to(self, kept: Tensor) -> None:
        """Where the states are kept; nowhere if it has no numbers."""
        self.held.append(kept)
        self.given.kept = kept.data_ptr() if kept.numel() else None

    def run(self, name: str, results: Any) -> None:
        """All programs, forwards or backwards."""
        run(name, self.dtype, self.programs, self.spec, self.given, results)
