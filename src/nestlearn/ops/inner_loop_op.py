"""The inner loop as two operators that torch.compile takes whole: one node in its graph, whatever the number of chunks.

    nestlearn::inner_loop(given, spec) -> y, the state after, what is kept        nestlearn::inner_loop_backward

An operator takes tensors and plain values, so the names travel as one text; its results share no memory with what it
was given. It runs the loop in plain torch or in C++; outside of compiled code `inner_loop.py` and `native/loop.py` call
the same functions themselves, without an operator's overhead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained, loop_back, parts, run_loop
from nestlearn.ops.native import loop as native

# The fields of LoopSpec; a whole number may depend on a length that the compiler leaves open.
SPEC = (
    "bool in_cpp, str names, SymInt written, SymInt chunk, float momentum, float rate_max, bool normalise, "
    "bool anchored, bool retention, bool after, SymInt keep"
)
RESULTS = 5  # y and the four tensors of the state; two stacks of kept states follow, or one tensor of the C++ loop


def inner_loop_op(
    inputs: LoopInputs, state: LoopState, trained: LoopTrained, spec: LoopSpec, *, in_cpp: bool
) -> tuple[Tensor, LoopState]:
    """As `inner_loop.inner_loop`."""
    given = [t for t in (*inputs, *state, *trained) if t is not None]  # λ, the last, may be missing
    y, *after = _forward(given, in_cpp, ",".join(spec.names), *spec[1:])[:RESULTS]
    return y, LoopState(*after)


def _spec(names: str, *others: Any) -> LoopSpec:
    return LoopSpec(tuple(names.split(",")), *others)


@torch.library.custom_op("nestlearn::inner_loop", mutates_args=(), schema=f"(Tensor[] given, {SPEC}) -> Tensor[]")
def _forward(given: list[Tensor], in_cpp: bool, *spec: Any) -> list[Tensor]:
    if in_cpp:
        y, after, memory = native.run_loop(*parts(given), _spec(*spec))
        return [y.contiguous(), *(t for t in after[:4] if t is not None), memory]
    y, after, kept = run_loop(*parts(given), _spec(*spec))
    return [y.contiguous(), *after, torch.stack(kept[::2]), torch.stack(kept[1::2])]


@_forward.register_fake
def _(given: list[Tensor], in_cpp: bool, *spec: Any) -> list[Tensor]:
    constants, (x, _, _), state = _spec(*spec), given[:3], given[3:7]
    results = [x.new_empty(x.shape), *(t.new_empty(t.shape) for t in state)]
    if in_cpp:
        return [*results, x.new_empty(native.kept_numbers(x.shape, state[0].shape, constants))]
    batch, memories, heads, d, h = state[0].shape
    chunks = (x.shape[2] + constants.chunk - 1) // constants.chunk
    stored = (chunks + constants.keep - 1) // constants.keep
    maps, double = constants.written * batch * heads, 2 if constants.momentum else 1
    kept = [x.new_empty(stored, maps, double * d, h), x.new_empty(stored, maps, double * h, d)]
    return [*results, *kept]


@torch.library.custom_op(
    "nestlearn::inner_loop_backward",
    mutates_args=(),
    schema=f"(Tensor[] given, Tensor[] kept, Tensor[] grads, {SPEC}) -> Tensor[]",
)
def _backward(given: list[Tensor], kept: list[Tensor], grads: list[Tensor], in_cpp: bool, *spec: Any) -> list[Tensor]:
    dy, *d_state = grads
    if in_cpp:
        found = native.loop_back(*parts(given), kept[0], dy, [*d_state, None, None], _spec(*spec))
        found = (*found[:7], *found[9:])  # no start was given
    else:
        states = [t for pair in zip(*kept, strict=True) for t in pair]
        found = loop_back(*parts(given), states, dy, LoopState(*d_state), _spec(*spec))
    return [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(found, given, strict=False)]


@_backward.register_fake
def _(given: list[Tensor], kept: list[Tensor], grads: list[Tensor], *spec: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in given]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    given, *ctx.spec = inputs
    ctx.given = len(given)
    ctx.save_for_backward(*given, *output)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor] | None, ...]:
    given, results = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
    known = [torch.zeros_like(t) if g is None else g for g, t in zip(grads[:RESULTS], results, strict=False)]
    return _backward(list(given), list(results[RESULTS:]), known, *ctx.spec), *(None for _ in ctx.spec)


_forward.register_autograd(_differentiate, setup_context=_keep)
