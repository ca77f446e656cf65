"""Pointwise functions of the inner loop with hand-written backward passes: fewer passes over memory, first derivatives.

Forward and backward, d· marking a gradient:

    l2norm           y = z r, r = (‖z‖² + ε)^(−1/2)         dz = r (dy − y ⟨y, dy⟩)
    silu_and_slope   a = z s, a' = s (1 + z (1 − s))        dz = da a' + da' a'',  a'' = s (1 − s) (2 + z (1 − 2 s))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.ops.first_order import first_order

EPS = 1e-6


def l2norm(z: Tensor, *, fused: bool = False) -> Tensor:
    """z / sqrt(‖z‖² + 1e-6) over the last dimension."""
    return _L2Norm.apply(z) if fused else z * torch.rsqrt(z.square().sum(-1, keepdim=True) + EPS)  # pyright: ignore[reportReturnType]


def silu_and_slope(z: Tensor, *, fused: bool = False) -> tuple[Tensor, Tensor]:
    """SiLU and its derivative."""
    if fused:
        return _SiluAndSlope.apply(z)  # pyright: ignore[reportReturnType]
    gate = torch.sigmoid(z)
    hidden = z * gate
    return hidden, gate + hidden * (1 - gate)


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        inverse = torch.linalg.vecdot(z, z)[..., None].add_(EPS).rsqrt_()
        y = z * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(y, grad)[..., None]
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse)


class _SiluAndSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        gate = torch.sigmoid(z)
        hidden = z * gate
        slope = gate + hidden - hidden * gate
        ctx.save_for_backward(z, gate, slope)
        return hidden, slope

    @staticmethod
    @first_order
    def backward(ctx: Any, d_hidden: Tensor, d_slope: Tensor) -> Tensor:
        z, gate, slope = ctx.saved_tensors
        curve = torch.addcmul(z, z, gate, value=-2).add_(2)  # 2 + z (1 − 2 s)
        curve.mul_(gate - gate * gate).mul_(d_slope)
        return curve.addcmul_(d_hidden, slope)
