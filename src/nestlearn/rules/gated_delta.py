"""Gated delta rule: forget first, then store what the rest does not predict (Gated DeltaNet, arXiv 2412.06464).

    M ← α M (I − η k kᵀ) + η v kᵀ           one gradient step on ½ ‖M k − v‖², taken at α M

`delta` (NL Eq. 65) with the retention on both terms: a write takes away what the *retained* memory predicts, so that
η ‖k‖² = 1 stores the pair exactly at every α. With unit keys, keep η in (0, 1].
"""

from __future__ import annotations

from torch import Tensor

from nestlearn.rules.delta import delta


def gated_delta(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write. state (…, out, in); key (…, in); value (…, out); rate ≥ 0 and retain in (0, 1] (…)."""
    return delta(retain[..., None, None] * state, key, value, rate, retain.new_ones(retain.shape))
