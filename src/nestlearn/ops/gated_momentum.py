"""Gradient descent whose momentum and forgetting change from token to token, over a chunk, read *after* each write.

For a map S (out, in), input x, update u (−step · output gradient), momentum μ_t and retention α_t in (0, 1]
(Titans, arXiv 2501.00663, Eq. 13–14, where 1 − α is what is forgotten):

    m_t = μ_t m_{t−1} + u_t x_tᵀ
    S_t = α_t S_{t−1} + m_t

The same over a chunk of C tokens, with γ_t = Π_{s≤t} α_s, R[t,r] = γ_t/γ_r for r ≤ t, ν_t = Π_{s≤t} μ_s,
L[t,r] = ν_t/ν_r for r ≤ t, W = R L and w0 = R ν:

    read of q_t after its own write = γ_t S₀ q_t + w0_t m₀ q_t + [(Q Xᵀ ∘ W) U]_t
    S_C = γ_C S₀ + w0_C m₀ + Σ_r W[C,r] u_r x_rᵀ
    m_C = ν_C m₀ + Σ_r L[C,r] u_r x_rᵀ

These are the reads and ends of `dgd_chunk` without its gain · x xᵀ term, so `chunk_read` and `chunk_end` do the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.ops.dgd_chunk import Decays, Write

LEAST = 1e-13  # a factor below this keeps nothing either, and sums of its logarithm keep their precision


def momentum_decays(retain: Tensor, momentum: Tensor) -> Decays:
    """All factors of a chunk from α and μ (…, C), for reads after the write. Ratios are taken in log space."""
    log_kept, log_moved = (t.clamp_min(LEAST).log().cumsum(-1) for t in (retain, momentum))
    kept, moved = log_kept.exp()[..., None], log_moved.exp()[..., None]
    ratio, power = _ratios(log_kept), _ratios(log_moved)
    moment, leak = ratio @ power, ratio @ moved
    return Decays(
        kept, kept[..., -1:, :], ratio, ratio[..., -1, :, None],
        leak, leak[..., -1:, :], moment, moment[..., -1, :, None],
        power[..., -1, :, None], moved[..., -1:, :],
    )  # fmt: skip


def momentum_write(inputs: Tensor, updates: Tensor, decays: Decays) -> Write:
    """A chunk's writes of u_t x_tᵀ: inputs (…, C, in), updates (…, C, out)."""
    added, moved = ((share * updates).mT @ inputs for share in (decays.moment_end, decays.power_end))
    return Write(inputs, updates, None, added, moved)


def _ratios(logs: Tensor) -> Tensor:
    """exp(log_t − log_r) for r ≤ t, else 0: (…, C, C)."""
    differences = logs[..., :, None] - logs[..., None, :]
    future = torch.ones(differences.shape[-2:], dtype=torch.bool, device=logs.device).triu(1)
    return differences.masked_fill(future, float("-inf")).exp()
