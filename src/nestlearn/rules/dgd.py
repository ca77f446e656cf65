"""Delta gradient descent: a gradient step that also forgets what the map held at its input (NL Eq. 56–57, 88).

    gain = η / (1 + η ‖x‖²)
    m ← μ m − gain · g xᵀ
    M ← M (α I − gain · x xᵀ) + m           g = ∇_y L, the gradient at the map's output y = M x

It is the exact proximal step towards the target −g, argmin_P ½ ‖P x + g‖² + 1/(2η) ‖P − M‖² (α = 1, μ = 0), hence
stable for every rate. As a memory of key–value pairs, x = k and g = −v (the gradient of −⟨M k, v⟩): the gated
delta rule. The momentum is the paper's ablation "momentum" (Table 6) and is not printed in Eq. 88.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.ops.dgd_chunk import dgd_write


def dgd_momentum(
    state: Tensor, momentum: Tensor, key: Tensor, error: Tensor, rate: Tensor, retain: Tensor, mu: float
) -> tuple[Tensor, Tensor]:
    """One write of any error g, with momentum: (state, momentum), both (…, out, in).

    key (…, in); error (…, out); rate ≥ 0 and retain in (0, 1] (…); mu in [0, 1).
    """
    return dgd_write(state, momentum, key, error, rate, retain, mu)


def dgd(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write of a pair, without momentum. state (…, out, in); key (…, in); value (…, out); rate, retain (…)."""
    return dgd_write(state, torch.zeros_like(state), key, -value, rate, retain, 0.0)[0]
