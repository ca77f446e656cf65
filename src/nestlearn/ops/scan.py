"""A recurrence over pieces of a sequence whose backward pass recomputes instead of storing.

Only the carry at the start of each piece is kept; everything inside a piece is computed again when its gradient is
needed. The gradients are exact (they flow through the carry from the last piece to the first); the price is one more
forward pass, the gain is that memory no longer grows with what happens inside a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.first_order import first_order

Tensors = tuple[Tensor, ...]
Step = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, Tensors]]


def scan(
    step: Step, carry: Tensors, inputs: Tensors, constants: Tensors, pieces: Sequence[slice], *, recompute: bool
) -> tuple[Tensor, Tensors]:
    """Fold ``step(carry, inputs of the piece, constants) -> (output, carry)`` over ``pieces`` of the time dimension.

    inputs and the output carry time in their second last dimension. ``recompute`` selects the lean backward pass,
    which supports one backward only; without it autograd stores everything and higher derivatives work. In compiled
    code the compiler decides what is computed again.
    """
    if recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        flat = _Scan.apply(step, len(carry), len(inputs), tuple(pieces), *carry, *inputs, *constants)
        return flat[0], tuple(flat[1:])
    outputs = []
    for piece in pieces:
        output, carry = step(carry, tuple(t[..., piece, :] for t in inputs), constants)
        outputs.append(output)
    return torch.cat(outputs, dim=-2), carry


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, carried: int, given: int, pieces: tuple[slice, ...], *tensors: Tensor) -> Tensors:
        carry, inputs = tensors[:carried], tensors[carried : carried + given]
        constants = tensors[carried + given :]
        kept: list[Tensor] = []
        outputs = []
        for piece in pieces:
            kept.extend(carry)
            output, carry = step(carry, tuple(t[..., piece, :] for t in inputs), constants)
            outputs.append(output)
        ctx.save_for_backward(*kept, *inputs, *constants)
        ctx.step, ctx.carried, ctx.given, ctx.pieces = step, carried, given, pieces
        return torch.cat(outputs, dim=-2), *carry

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: under activation checkpointing each reading recomputes
        held = len(ctx.pieces) * ctx.carried
        kept, inputs = saved[:held], saved[held : held + ctx.given]
        constants = saved[held + ctx.given :]
        grad_output, grad_carry = grads[0], tuple(grads[1:])
        grad_inputs = tuple(torch.zeros_like(t) for t in inputs)
        grad_constants = tuple(torch.zeros_like(t) for t in constants)
        constants = tuple(t.detach().requires_grad_() for t in constants)
        for number in reversed(range(len(ctx.pieces))):
            piece = ctx.pieces[number]
            carry = tuple(t.detach().requires_grad_() for t in kept[number * ctx.carried : (number + 1) * ctx.carried])
            local = tuple(t[..., piece, :].detach().requires_grad_() for t in inputs)
            with torch.enable_grad():
                output, end = ctx.step(carry, local, constants)
            found = _gradients((output, *end), (grad_output[..., piece, :], *grad_carry), (*carry, *local, *constants))
            grad_carry = found[: ctx.carried]
            for total, part in zip(grad_inputs, found[ctx.carried : ctx.carried + ctx.given], strict=True):
                total[..., piece, :] = part
            for total, part in zip(grad_constants, found[ctx.carried + ctx.given :], strict=True):
                total += part
        return None, None, None, None, *grad_carry, *grad_inputs, *grad_constants


def _gradients(outputs: Tensors, grads: Tensors, leaves: Tensors) -> Tensors:
    live = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    return torch.autograd.grad(
        [o for o, _ in live], leaves, [g for _, g in live], allow_unused=True, materialize_grads=True
    )
