"""Delta rule: store what the memory does not predict yet (Widrow–Hoff, DeltaNet; NL Eq. 65).

    M ← M (α I − η k kᵀ) + η v kᵀ           one gradient step on ½ ‖M k − v‖²

An explicit step: it contracts for η ‖k‖² < 2 and stores the pair exactly at η ‖k‖² = 1 (α = 1); with unit keys, keep
η in (0, 1]. `dgd` is the same rule with a step that is stable for every rate.
The gated delta rule of the literature, `gated_delta`, multiplies α into both terms; here α is on the old state alone,
as NL Eq. 88 has it. The two agree at α = 1.
"""

from __future__ import annotations

from torch import Tensor


def delta(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write. state (…, out, in); key (…, in); value (…, out); rate ≥ 0 and retain in (0, 1] (…)."""
    surprise = (state @ key[..., None]).squeeze(-1) - value
    return retain[..., None, None] * state - (rate[..., None] * surprise)[..., None] * key[..., None, :]
