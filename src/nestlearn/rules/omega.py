"""Omega rule: optimise over a window of the last c tokens rather than over the last token alone (NL Eq. 68).

    M ← α M − Σ_{i = t−c+1 … t} η_i (M k_i − v_i) k_iᵀ     one gradient step on Σ_i η_i/2 ‖M k_i − v_i‖²

η_i is the rate that token t gives to token i of its window, so c = 1 is the delta rule. An explicit step: it contracts
where the largest eigenvalue of Σ η_i k_i k_iᵀ is below 2, for which Σ η_i ‖k_i‖² < 2 is enough.
"""

from __future__ import annotations

from torch import Tensor


def omega(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write. state (…, out, in); key (…, c, in); value (…, c, out); rate ≥ 0 (…, c); retain in (0, 1] (…)."""
    surprise = key @ state.mT - value
    return retain[..., None, None] * state - (rate[..., None] * surprise).mT @ key
