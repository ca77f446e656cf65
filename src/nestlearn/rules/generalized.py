"""Generalized gradient descent and momentum: what to learn and what to keep are arguments (NL Eq. 58–60).

    S⁺ = argmin_S  L̃(S; what is seen) + Ret(S; history)

    S = W, the weights:    L̃ = η s Σ_b ℓ(W x_b, v_b),  v_b = value(u_b, W_t x_b)          NL Eq. 58, 59
    S = m, a momentum:     L̃ = ℓ(m; g, v),  v = η P(g);  then W ← W + m                    NL Eq. 60

    ready-made ℓ           of the weights                  of a momentum
    "dot"                  −⟨W x, v⟩                       ⟨m, v⟩
    "l2"                   ½ ‖W x − v‖²                    ⟨m, v⟩ + ½ ‖m kᵀ‖²,  k = g or g/‖g‖_F
    ready-made Ret         ½ ‖S − H‖²,  H = α mean(history): the last c states; c = 1, α = 1 is the proximal term

"l2" of a momentum is ½ ‖m kᵀ + V‖² (NL Eq. 48) without its constant, for V k = v: with k = g, V = η P (out, out).

**Solved** ("exact"), with D = (I + η s XᵀX)⁻¹ for weights and (I + kᵀk)⁻¹ for a momentum:
    S⁺ = (H + pull) D for "l2", H + pull for "dot";   pull = η s Σ_b v_b x_bᵀ, or −v
**Descended** ("gradient"): n steps of size ρ on L̃ + Ret from S, for any ℓ and Ret; NL Eq. 33 and 49 are n = ρ = 1.

GD is ("dot", exact), DGD ("l2", exact) of the weights with v = −u; momentum ("dot") and Delta Momentum ("l2") are one
descended step of a momentum.
Letters: W, m, g (…, out, in); x (N, in); u, v (N, out); s 1/N for the mean of N samples; η rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestlearn.rules.dgd_batch import Proximal

Energy = Callable[[Tensor], Tensor]


def dot_loss(predicted: Tensor, value: Tensor) -> Tensor:
    """−⟨W x, v⟩ of each sample."""
    return -(predicted * value).sum(-1)


def l2_loss(predicted: Tensor, value: Tensor) -> Tensor:
    """½ ‖W x − v‖² of each sample."""
    return 0.5 * (predicted - value).square().sum(-1)


def dot_energy(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """⟨m, v⟩ of each matrix."""
    return (memory * value).sum((-2, -1))


def l2_energy(memory: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """⟨m, v⟩ + ½ ‖m kᵀ‖² of each matrix."""
    return dot_energy(memory, key, value) + 0.5 * (memory @ key.mT).square().sum((-2, -1))


def error_value(error: Tensor, predicted: Tensor) -> Tensor:
    """v = −u: the map is to answer x with the negative of its surprise (NL Eq. 56)."""
    return -error


def step_value(error: Tensor, predicted: Tensor) -> Tensor:
    """v = W x − u: the map is to answer x as it does now, one step better. "l2" is then implicit gradient descent,
    which forgets nothing."""
    return predicted - error


LOSSES = {"dot": dot_loss, "l2": l2_loss}
ENERGIES = {"dot": dot_energy, "l2": l2_energy}
VALUES = {"error": error_value, "step": step_value}


def anchor(history: Sequence[Tensor], decay: float) -> Tensor:
    """H = α mean(history)."""
    if len(history) == 1:
        return history[0] if decay == 1 else decay * history[0]
    return decay * torch.stack(list(history)).mean(0)


def near(state: Tensor, history: Sequence[Tensor], decay: float) -> Tensor:
    """Ret = ½ ‖S − H‖²: up to a constant 1/(2c) Σ_i ‖S − α S_i‖²."""
    return 0.5 * (state - anchor(history, decay)).square().sum()


def solved(state: Tensor, home: Tensor, pull: Tensor, d: Proximal | None) -> Tensor:
    """S⁺ − S in closed form, for the ready-made pairs. state, home, pull (…, out, in); d: D, None for "dot"."""
    pulled = pull if d is None else d.kept(pull) - d.absorbed(home)
    return pulled if home is state else pulled + (home - state)


def descended(state: Tensor, energy: Energy, steps: int, size: float) -> Tensor:
    """S⁺ − S after that many gradient steps of that size on a differentiable energy (a scalar)."""
    slope, point = torch.func.grad(energy), state
    for _ in range(steps):
        point = point - size * slope(point)
    return point - state


def unit_key(grad: Tensor) -> Tensor:
    """g/‖g‖_F of each matrix; zero stays zero."""
    return grad / (torch.linalg.matrix_norm(grad, keepdim=True) + torch.finfo(grad.dtype).tiny)
