"""Hebbian rule: what fires together wires together (linear attention, RetNet; NL Eq. 64).

    M ← α M + η v kᵀ                        one gradient step on −⟨M k, v⟩

The paper writes φ(k) for a feature map of the key: apply it before calling. Nothing is ever overwritten, so without
retention (α = 1) the memory grows with the number of tokens.
"""

from __future__ import annotations

from torch import Tensor


def hebbian(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write. state (…, out, in); key (…, in); value (…, out); rate ≥ 0 and retain in (0, 1] (…)."""
    return retain[..., None, None] * state + (rate[..., None] * value)[..., None] * key[..., None, :]
