"""Bad hyperparameters, parameters and gradients: one line that names the value, the rule and the fix."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from nestlearn.errors import NotFinite, UserError, suggest


def check_number(where: str, name: str, value: Any, *, low: float | None = None, above: float | None = None) -> None:
    """A finite number >= low, or > above. A 0-d tensor passes: looking into it would wait for its device."""
    if isinstance(value, Tensor):
        if value.ndim:
            raise UserError(f"{where}: {name} has the shape {tuple(value.shape)}: give a number or a 0-d tensor")
        return
    rule = f"> {above}" if low is None else f">= {low}"
    fine = isinstance(value, int | float) and math.isfinite(value)
    if not fine or (low is not None and value < low) or (above is not None and value <= above):
        raise UserError(f"{where}: {name} is {value!r}, must be a finite number {rule}")


def check_decay(where: str, name: str, value: Any) -> None:
    """A number in [0, 1)."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{where}: {name} is {value!r}, must be in [0, 1): 1 would never forget")


def check_betas(where: str, name: str, values: Any, *, count: int, decays: bool = True) -> None:
    """So many numbers: decays in [0, 1), or weights >= 0."""
    if not isinstance(values, tuple | list) or len(values) != count:
        raise UserError(f"{where}: {name} is {values!r}, must be {count} numbers")
    for i, value in enumerate(values):
        check_decay(where, f"{name}[{i}]", value) if decays else check_number(where, f"{name}[{i}]", value, low=0)


def check_count(where: str, name: str, value: Any) -> None:
    """A whole number >= 1: a period, iterations."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {name} is {value!r}, must be a whole number, at least 1")


def check_choice(where: str, name: str, value: Any, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        near = suggest(value, choices) if isinstance(value, str) else ""
        raise UserError(f"{where}: {name} is {value!r}, must be one of {', '.join(map(repr, choices))}{near}")


def check_product_dtype(where: str, name: str, value: Any) -> None:
    """None or a dtype in which matrices are multiplied."""
    if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise UserError(f"{where}: {name} is {value!r}, must be None or a dtype such as torch.bfloat16")


def check_parameter(name: str, p: Tensor, *, matrix: bool) -> None:
    if not p.is_floating_point():
        raise UserError(f"parameter {name} has the dtype {p.dtype}: only real floating-point parameters are optimised")
    if matrix and p.ndim < 2:
        raise UserError(
            f"parameter {name} has the shape {tuple(p.shape)}, but only matrices have a matrix memory: "
            "pass nestlearn.optim.parameter_groups(model), which gives such parameters to AdamW"
        )


def check_gradient(name: str, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise UserError(f"parameter {name} has a sparse gradient: make it dense, e.g. nn.Embedding(sparse=False)")
    if grad.is_complex():
        raise UserError(f"parameter {name} has a complex gradient: optimise its real and imaginary parts")


class FiniteGate:
    """Finds gradients that are not finite, and never waits for a device to do so.

    On a CPU it raises at once. On an accelerator it gives a flag that gates the whole update there, and sends the
    numbers home beside the computation; whoever steps after they have arrived gets the error.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[Any, Tensor, list[str], int]] = deque()  # arrival, largest, names, step

    @torch.compiler.disable()
    def check(self, gradients: list[tuple[str, Tensor]], step: int) -> dict[torch.device, Tensor]:
        """For each accelerator a flag, 0-d bool: all gradients on it are finite. step: the number of this one."""
        while self._pending and self._pending[0][0].query():
            _, peaks, names, earlier = self._pending.popleft()
            _raise_if_not_finite(peaks, names, earlier)
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, grad in gradients:
            by_device.setdefault(grad.device, []).append((name, grad))
        return {
            device: flag for device, own in by_device.items() if (flag := self._check_on(device, own, step)) is not None
        }

    def _check_on(self, device: torch.device, gradients: list[tuple[str, Tensor]], step: int) -> Tensor | None:
        names, grads = [name for name, _ in gradients], [grad for _, grad in gradients]
        peaks = torch.stack([_largest(g) for g in grads])
        if device.type == "cpu":
            _raise_if_not_finite(peaks, names, step)
            return None
        home = torch.empty(peaks.shape, dtype=peaks.dtype, pin_memory=True)
        home.copy_(peaks, non_blocking=True)
        arrival = torch.Event(device)
        arrival.record()
        self._pending.append((arrival, home, names, step))
        return peaks.isfinite().all()


def _largest(grad: Tensor) -> Tensor:
    """max |g|: unlike a norm it overflows for no finite gradient. The same on every rank that holds a part of g."""
    part = grad.to_local() if isinstance(grad, DTensor) else grad
    low, high = torch.aminmax(part) if part.numel() else (part.new_zeros(()), part.new_zeros(()))
    peak = torch.maximum(-low, high)
    if not isinstance(grad, DTensor):
        return peak
    peak = peak.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum over ranks may drop a nan
    return DTensor.from_local(peak, grad.device_mesh, [Partial("max")] * grad.device_mesh.ndim).full_tensor()


def _raise_if_not_finite(peaks: Tensor, names: Iterable[str], step: int) -> None:
    for name, peak in zip(names, peaks.tolist(), strict=True):
        if not math.isfinite(peak):
            raise NotFinite(
                f"parameter {name}: its gradient is not finite at step {step}; nothing was changed. "
                "Lower lr, clip gradients, or check the loss"
            )
