"""Oja's rule: Hebb with a decay that keeps the weights bounded (NL Eq. 66–67).

    M ← α M + gain · v (k − Mᵀ v)ᵀ          gain = η / (1 + η ‖v‖²)

Oja's subspace rule for y = M x is ΔM = η y (x − Mᵀ y)ᵀ; in an associative memory the output is clamped to the value,
y = v. The bracket is −∇ of ½ ‖Mᵀ v − k‖²: where the delta rule lets a key predict its value, Oja's lets a value
reconstruct its key, and the decay v vᵀ acts on M from the left.

Deviations from the paper, which prints the bracket with shapes that do not match: the orientation above is the only
one in which M (out, in), v (out) and k (in) multiply; and the step is the exact proximal one,

    argmin_P ½ ‖Pᵀ v − k‖² + 1/(2η) ‖P − M‖²,

which is bounded for every rate. To first order in η it is Oja's.
"""

from __future__ import annotations

from torch import Tensor

from nestlearn.ops.dgd_chunk import dgd_gain


def oja(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """One write. state (…, out, in); key (…, in); value (…, out); rate ≥ 0 and retain in (0, 1] (…)."""
    unexplained = key - (state.mT @ value[..., None]).squeeze(-1)
    gain = dgd_gain(value, rate)
    return retain[..., None, None] * state + (gain[..., None] * value)[..., None] * unexplained[..., None, :]
