"""Depthwise causal convolution over time in few passes over memory, its backward pass written by hand.

    y_t = Σ_i w_i ∘ p_{t+i}            dp_{t+i} += w_i ∘ dy_t            dw_i = Σ_t p_{t+i} ∘ dy_t

p (B, width − 1 + T, channels): what came before, then the input; w (width, channels); y (B, T, channels).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(padded: Tensor, weight: Tensor) -> Tensor:
    """y for p and w above. Differentiable any number of times."""
    if len(weight) == padded.shape[1]:  # one token
        return (padded * weight).sum(1, keepdim=True)
    return _CausalConv.apply(padded, weight)  # pyright: ignore[reportReturnType]


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        pieces = _windows(padded, len(weight))
        out = weight[0] * pieces[0]
        for w, piece in zip(weight[1:], pieces[1:], strict=True):
            out.addcmul_(w, piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        width = len(weight)
        d_weight = torch.stack([(piece * grad).sum((0, 1)) for piece in _windows(padded, width)])
        if torch.is_grad_enabled():  # a second derivative is asked for: nothing in place
            return sum(F.pad(w * grad, (0, 0, i, width - 1 - i)) for i, w in enumerate(weight)), d_weight  # pyright: ignore[reportReturnType]
        d_padded = torch.zeros_like(padded)
        for w, piece in zip(weight, _windows(d_padded, width), strict=True):
            piece.addcmul_(w, grad)
        return d_padded, d_weight


def _windows(padded: Tensor, width: int) -> list[Tensor]:
    """p_{t+i} for i = 0 … width − 1, as views (B, T, channels)."""
    length = padded.shape[1] - width + 1
    return [padded[:, i : i + length] for i in range(width)]
