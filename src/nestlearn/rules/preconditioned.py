"""Values for the momentum: a gradient g is written as P g, P what the past says about its scale (NL Eq. 46–47).

m ← α m − lr · P g                                                         rules/momentum.py

diagonal       v ← β v + (1 − β) g²                P g = g / (√v̂ + ε)                            Adam
kronecker      L ← β L + (1 − β) g gᵀ              P g = L̂^(−1/4) g R̂^(−1/4)                     Shampoo
               R ← β R + (1 − β) gᵀ g
Newton–Schulz  P g = NS(g)                         ops/newton_schulz.py (NL Eq. 42–44)           Muon's, before m

g, v (…, out, in)      L (…, out, out)      R (…, in, in)      ^ over a letter: divided by 1 − βᵗ
Roots are those of L̂ + ε λ_max I: ε is relative to the largest eigenvalue, so that no scale of g matters.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # keeps the root of a matrix of zeros finite


def second_moment(variance: Tensor, g: Tensor, beta: float) -> Tensor:
    """v ← β v + (1 − β) g²."""
    return (beta * variance).addcmul_(g, g, value=1 - beta)


def diagonal(g: Tensor, variance: Tensor, correction: float | Tensor, eps: float) -> Tensor:
    """g / (√(v / correction) + ε), correction = 1 − βᵗ."""
    root = (variance / correction).sqrt_().add_(eps)
    return torch.div(g, root, out=root)


def kronecker_factors(left: Tensor, right: Tensor, g: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(L, R) after one gradient."""
    return torch.lerp(left, g @ g.mT, 1 - beta), torch.lerp(right, g.mT @ g, 1 - beta)


def inverse_fourth_root(factor: Tensor, eps: float) -> Tensor:
    """(F + ε λ_max I)^(−1/4) of a symmetric positive semi-definite F (…, n, n)."""
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp(min=0)
    values = values + eps * values[..., -1:] + TINY
    return (vectors * values.pow(-0.25)[..., None, :]) @ vectors.mT
