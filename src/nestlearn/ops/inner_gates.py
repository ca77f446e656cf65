"""What a self-modifying memory generates at a chunk's start, with backward passes by hand.

    M(z) = z + w1 σ(w2 z)
    k = n(M_k(x))   v = M_v(value)   η = rate_max sigmoid(⟨r, M_η(x)⟩ + b)
    log α = max(logsigmoid(⟨r', M_α(x)⟩ + b'), floor)
    n(z) = z / sqrt(‖z‖² + 1e-6)

Of M_η and M_α only one number is wanted: ⟨r, M(x)⟩ = ⟨r, x⟩ + ⟨w1ᵀ r, σ(w2 x)⟩.

Letters: F folded maps or N heads and rows in front, C tokens, d head width, h hidden width; σ is SiLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.ops.pointwise import EPS

LOG_FLOOR = -30.0  # log α is kept above this: e⁻³⁰ of a write is nothing, and sums of logs keep their precision


class Map(NamedTuple):
    """M applied: input, z = w2 input, a = σ(z), result; for `score` the result is a scalar."""

    given: Tensor
    z: Tensor
    hidden: Tensor
    out: Tensor


def apply_map(given: Tensor, w1: Tensor, w2: Tensor) -> Map:
    """M(given): given (F, C, d), w1 (F, d, h), w2 (F, h, d)."""
    z = torch.bmm(given, w2.mT)
    hidden = F.silu(z)
    return Map(given, z, hidden, torch.baddbmm(given, hidden, w1.mT))


def map_back(grad: Tensor, done: Map, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d given, d w1, d w2."""
    dz = silu_back(torch.bmm(grad, w1), done.z)
    return torch.baddbmm(grad, dz, w2), torch.bmm(grad.mT, done.hidden), torch.bmm(dz.mT, done.given)


def silu_back(grad: Tensor, z: Tensor) -> Tensor:
    """d z of σ(z)."""
    return torch.ops.aten.silu_backward(grad, z)


def score(given: Tensor, w1: Tensor, w2: Tensor, read: Tensor, bias: Tensor) -> Map:
    """⟨read, M(given)⟩ + bias (N, C); read (N, d, 1), bias (N, 1)."""
    z = torch.bmm(given, w2.mT)
    hidden = F.silu(z)
    out = torch.baddbmm(torch.bmm(given, read), hidden, torch.bmm(w1.mT, read)).squeeze(-1)
    return Map(given, z, hidden, out + bias)


def score_back(grad: Tensor, done: Map, w1: Tensor, w2: Tensor, read: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d given, d w1, d w2, d read, for grad (N, C)."""
    grad = grad[..., None]
    d_inner = torch.bmm(done.hidden.mT, grad)  # of w1ᵀ read
    dz = silu_back(torch.bmm(grad, torch.bmm(w1.mT, read).mT), done.z)
    dx = torch.baddbmm(torch.bmm(grad, read.mT), dz, w2)
    d_read = torch.baddbmm(torch.bmm(done.given.mT, grad), w1, d_inner)
    return dx, torch.bmm(read, d_inner.mT), torch.bmm(dz.mT, done.given), d_read


def normalise(z: Tensor) -> tuple[Tensor, Tensor]:
    """n(z) and 1 / sqrt(‖z‖² + 1e-6)."""
    inverse = torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_().add_(EPS).rsqrt_()
    return z * inverse, inverse


def normalise_back(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """d z of y = n(z); the same for y = −n(z) and the gradient of n(z)."""
    along = (y * grad).sum(-1, keepdim=True)
    return torch.addcmul(grad, y, along, value=-1).mul_(inverse)
