"""The truth for Titans' memory and TTT-MLP: the objective, differentiated by autograd, one token at a time, float64.

    S_t = μ_t S_{t−1} − θ_t ∇ℓ(M_start; k_t, v_t),  M_t = α_t M_{t−1} + S_t,  y_t = M_t(q_t),  ℓ = ½ ‖M(k) − v‖²

with M_start the weights before the first token of the chunk. One row and one head at a time. Bounded: θ is divided by
‖∇ℓ‖² / 2ℓ where that is above 1. Anchored: M_t = α_t M_{t−1} + S_t + (1 − α_t) M_0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Network = dict[str, Tensor]  # {"w1": (d, h), "w2": (h, d)}


class Norm(NamedTuple):
    """Weight and bias (d,) of a layer norm around the inner MLP."""

    weight: Tensor
    bias: Tensor


def apply(network: Network, z: Tensor, norm: Norm | None) -> Tensor:
    inner = network["w2"] @ z
    y = network["w1"] @ (inner * torch.sigmoid(inner))
    return z + (y if norm is None else torch.nn.functional.layer_norm(y, y.shape, *norm, eps=1e-6))


def run(
    tokens: tuple[Tensor, ...],
    network: Network,
    chunk: int,
    norm: Norm | None = None,
    *,
    bounded: bool = False,
    anchored: bool = False,
):
    """tokens: key, value (T, d), rate, retain, momentum (T,), query (T, d) -> reads (T, d), network, momenta."""
    momenta = {name: torch.zeros_like(w) for name, w in network.items()}
    first, start, reads = network, network, []
    for t, (key, value, rate, retain, momentum, query) in enumerate(zip(*tokens, strict=True)):
        start = network if t % chunk == 0 else start
        loss = lambda m, k=key, v=value: 0.5 * (apply(m, k, norm) - v).square().sum()  # noqa: E731
        surprise, missed = torch.func.grad_and_value(loss)(start)
        if bounded:
            rate = rate / (sum(g.square().sum() for g in surprise.values()) / (2 * missed)).clamp(min=1)
        momenta = {name: momentum * momenta[name] - rate * surprise[name] for name in network}
        network = {name: retain * network[name] + momenta[name] for name in network}
        if anchored:
            network = {name: network[name] + (1 - retain) * first[name] for name in network}
        reads.append(apply(network, query, norm))
    return torch.stack(reads), network, momenta
