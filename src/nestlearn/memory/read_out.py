"""Learned numbers per head, spread over the heads at the start: the gates' read-outs, and λ of the objective "mix"."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ReadOut(nn.Module):
    """A scalar per head: ⟨weight, z⟩ + bias, weight (H, d), bias (H,)."""

    def __init__(self, heads: int, width: int, start: float | tuple[float, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.start = start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """sigmoid of the output starts near ``start``, the heads along the line through its values, in logits."""
        nn.init.normal_(self.weight, std=0.1 * self.weight.shape[-1] ** -0.5)
        _spread(self.bias, self.start)


def _spread(logits: Tensor, start: float | tuple[float, ...]) -> None:
    """Fill logits (H,) so that their sigmoids lie along the line through the values of ``start``, in logits."""
    points = [math.log(s / (1 - s)) for s in (start if isinstance(start, tuple) else (start,))]
    with torch.no_grad():
        for head, logit in enumerate(_along(points, len(logits))):
            logits[head] = logit


def _along(values: list[float], count: int) -> list[float]:
    """``count`` points, evenly from the first value to the last on the line through all of them; the first for one."""
    at = [i * (len(values) - 1) / max(1, count - 1) for i in range(count)]
    pairs = [(values[int(a)], values[min(int(a) + 1, len(values) - 1)]) for a in at]
    return [low + (a - int(a)) * (high - low) for a, (low, high) in zip(at, pairs, strict=True)]


class Mix(nn.Module):
    """λ of the objective "mix", one per head: logits (H,)."""

    def __init__(self, heads: int, start: float | tuple[float, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(heads))
        self.start = start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """λ starts at ``start``, the heads along its values."""
        _spread(self.logits, self.start)
