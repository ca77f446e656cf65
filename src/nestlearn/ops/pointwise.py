"""Pointwise functions with hand-written backward passes: fewer passes over memory, and less to keep for them.

Forward and backward, d· marking a gradient:

    l2norm           y = z r, r = (‖z‖² + ε)^(−1/2)         dz = r (dy − y ⟨y, dy⟩)
    silu_and_slope   a = z s, a' = s (1 + z (1 − s))        dz = da a' + da' a'',  a'' = s (1 − s) (2 + z (1 − 2 s))
    gated            y = silu(g) x                          dx = silu(g) dy, dg = silu'(g) x dy
    rms_norm         y = w x r, r = (mean x² + ε)^(−1/2)    dx = r (w dy − x r ⟨w dy, x r⟩ / n), dw = Σ dy x r

The first two serve the inner loop and have first derivatives only. The last two may be differentiated any number of
times; of what they compute they keep nothing (r excepted), where plain autograd keeps silu(g) and x r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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


def gated(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) ∘ x."""
    return _Gated.apply(gate, x) if torch.is_grad_enabled() else F.silu(gate) * x  # pyright: ignore[reportReturnType]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) over the last dimension, times ``weight``. Except on the CPU torch has the lean form itself."""
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]
    return torch.rms_norm(x, x.shape[-1:], weight, eps)


class _Gated(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, x: Tensor) -> Tensor:
        return F.silu(gate) * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, x = ctx.saved_tensors
        d_hidden = (grad * x).to(gate.dtype)
        if torch.is_grad_enabled():  # a second derivative is asked for, which torch's function does not have
            share = torch.sigmoid(gate)
            d_gate = d_hidden * share * (1 + gate * (1 - share))
        else:
            d_gate = torch.ops.aten.silu_backward(d_hidden, gate)
        return d_gate, (F.silu(gate) * grad).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + ctx.eps)
        unit = wide * inverse
        d_weight = None if weight is None else (grad * unit).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        d_unit = grad if weight is None else grad * weight
        along = (d_unit * unit).mean(-1, keepdim=True)
        return (torch.addcmul(d_unit.to(unit.dtype), unit, along, value=-1) * inverse).to(x.dtype), d_weight, None


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
