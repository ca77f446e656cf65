"""Steps of low-precision weights that lose nothing: the weight is p + r, p as the model holds it, r what rounding took.

    w = p + r  (float32)      w ← optimizer(w)      p ← round(w)      r ← w − p

bfloat16 has 8 bits: without r, a step below 1/512 of a weight is rounded away, however often it is repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ROUNDED_OFF = "rounded_off"  # in optimizer.state[parameter]: r above, absent before the first step


@contextmanager
def in_float32(parameters: Iterable[torch.Tensor], state: Any) -> Iterator[None]:
    """Within, each float16 or bfloat16 parameter with a gradient holds w and its gradient in float32; after, p."""
    low = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16) and p.grad is not None]
    before = [(p.data, p.grad) for p in low]
    for p, (rounded, grad) in zip(low, before, strict=True):
        _hold(p, rounded.float() + state[p].pop(ROUNDED_OFF, 0), None if grad is None else grad.float())
    try:
        yield
    finally:
        for p, (rounded, grad) in zip(low, before, strict=True):
            wide = p.data
            _hold(p, rounded.copy_(wide), grad)
            state[p][ROUNDED_OFF] = wide - rounded.float()


def _hold(p: torch.Tensor, values: torch.Tensor, grad: torch.Tensor | None) -> None:
    p.grad = None  # torch refuses a gradient of another dtype than the parameter's
    p.data = values
    p.grad = grad
