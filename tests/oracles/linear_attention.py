"""Truths for the linear-attention baselines, in the forms of their papers: one row and one head at a time, float64.

retention         y = (Q Kᵀ ∘ D) V / √d with D[t,r] = γ^(t−r) for r ≤ t, all tokens at once (arXiv 2307.08621)
gated delta rule  S ← α S;  S ← S + β (v − S k) kᵀ;  y = S q / √d, token by token (arXiv 2412.06464; S is (out, in))
delta rule        the same at α = 1 (arXiv 2406.06484)
"""

from __future__ import annotations

import torch
from torch import Tensor


def retention(query: Tensor, key: Tensor, value: Tensor, gamma: float) -> Tensor:
    """query, key (T, d), rotated already; value (T, out). Returns (T, out)."""
    steps = torch.arange(len(query))
    age = steps[:, None] - steps
    decay = torch.where(age >= 0, gamma ** age.clamp_min(0).to(query.dtype), 0)
    return (query @ key.T * query.shape[1] ** -0.5 * decay) @ value


def rotated(x: Tensor, theta: float) -> Tensor:
    """Row t of x (T, d), seen as d/2 complex numbers (first half real, second imaginary), turned by t θ^(−2i/d)."""
    half = x.shape[1] // 2
    turn = torch.exp(1j * torch.outer(torch.arange(len(x)), theta ** (-torch.arange(half) / half)).to(torch.float64))
    turned = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([turned.real, turned.imag], dim=1)


def gated_delta(
    query: Tensor, key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """query, key (T, in), value (T, out), alpha, beta (T,), state (out, in). Returns reads (T, out), state."""
    reads = []
    for q, k, v, a, b in zip(query, key, value, alpha, beta, strict=True):
        state = a * state
        state = state + b * torch.outer(v - state @ k, k)
        reads.append(state @ q * len(q) ** -0.5)
    return torch.stack(reads), state
