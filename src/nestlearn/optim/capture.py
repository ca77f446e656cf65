"""What linear layers saw: their inputs, and on request the gradients at their outputs, between backward and step.

    with capture_inputs(model):
        loss = loss_of(model(x))
        loss.backward()
    optimizer.step()

The forward pass belongs inside: a gradient alone does not say which inputs it came from. A layer counts an input when
the *backward* pass reaches it, so evaluations inside the context leave no trace, and several backward passes (gradient
accumulation, a layer used twice) add up. Inputs of shape (…, in) count as their rows.

Memory: no copy is made. A layer's input, (rows, in), which autograd would free after the backward pass, is kept alive
until the optimizer's ``step`` or ``zero_grad``; ``errors=True`` keeps (rows, out) as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nestlearn.errors import UserError


@dataclass
class Captured:
    """Of one weight of n matrices: pieces of inputs (n, rows, in) and errors (n, rows, out), pass by pass."""

    inputs: list[Tensor] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def joined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(inputs X (n, N, in), errors (n, N, out) or None)."""
        if any(x._version != version for x, version in zip(self.inputs, self.versions, strict=True)):
            raise UserError("a captured input was overwritten before the optimizer's step: pass the model a copy of it")
        errors = torch.cat(self.errors, dim=1).to(dtype) if self.errors else None
        return torch.cat(self.inputs, dim=1).to(dtype), errors


_captured = WeakTensorKeyDictionary()  # weight → Captured; like .grad, it waits for the optimizer


@contextmanager
def capture_inputs(model: nn.Module, *, errors: bool = False) -> Iterator[None]:
    """Within, every trained ``nn.Linear`` of the model records its inputs, and its output gradients if ``errors``.

    Raises UserError for a model without such a layer.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    if not layers:
        raise UserError(f"capture_inputs: {type(model).__name__} has no trained nn.Linear, so nothing to capture")
    # The weights of now: within a forward pass fully_shard puts others in their place.
    handles = [m.register_forward_hook(_hook(m.weight, errors), with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_inputs(weight: Tensor, inputs: Tensor, errors: Tensor | None = None) -> None:
    """By hand, for a weight used outside ``nn.Linear``: inputs (…, in), and the gradients at the outputs (…, out).

    For a stack of matrices (n, out, in): (n, …, in) and (n, …, out). For a convolution, its unfolded patches.
    """
    count = weight.shape[0] if weight.ndim == 3 else 1
    if weight not in _captured:
        _captured[weight] = Captured()
    captured = _captured[weight]
    rows = inputs.detach().reshape(count, -1, inputs.shape[-1])
    captured.inputs.append(rows)
    captured.versions.append(rows._version)
    if errors is not None:
        captured.errors.append(errors.detach().reshape(count, -1, errors.shape[-1]))


@torch.compiler.disable()
def captured_for(weight: Tensor) -> Captured | None:
    return _captured.get(weight)


@torch.compiler.disable()
def forget_inputs(weight: Tensor) -> None:
    _captured.pop(weight, None)


def _hook(weight: Tensor, errors: bool) -> Any:
    def after_forward(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            seen = (args[0] if args else kwargs["input"]).detach()
            output.register_hook(lambda grad: record_inputs(weight, seen, grad if errors else None))

    return after_forward
