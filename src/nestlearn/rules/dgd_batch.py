"""Delta gradient descent for a batch: the proximal step of all samples at once (NL Eq. 56–57).

    W⁺ = argmin_P  Σ_b s ½ ‖P x_b + u_b‖² + 1/(2η) ‖P − W‖²
       = (W − η G) D,     D = (I + η s XᵀX)⁻¹,     G = s Σ_b u_b x_bᵀ = Uᵀ X s

With momentum, as in ``rules/dgd.py``:    m ← μ m − η G D,    W ← W D + m    (one sample: exactly that rule)

    W, m, G  (out, in)      X inputs (N, in)      u_b  ∇_y of sample b's own loss, (out)      η rate >= 0
    s        1/N where the loss is the mean of N samples, 1 where it is their sum. Either way G is the ordinary gradient
             ``.grad``: what autograd hands to a layer's output is s u_b, not u_b. So only X is needed besides it.

Nothing of size in × in is inverted where N < in (Woodbury): with c = η s,

    I − D = c Xᵀ (I + c X Xᵀ)⁻¹ X = c XᵀX (I + c XᵀX)⁻¹

is what a write takes away. It is computed as it stands, since W D − W would cancel for a small η; a jitter of a few
roundings of the trace keeps the Cholesky factor real for a huge one, and leaves D = I outside the span of X.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestlearn.rules.dgd import dgd_momentum

JITTER = 8  # roundings of the trace


def absorbed(rows: Tensor, inputs: Tensor, c: float | Tensor) -> Tensor:
    """rows (…, k, in) times I − D, for inputs X (…, N, in) and c = η s >= 0; a solve of the smaller of N and in."""
    if inputs.shape[-2] >= inputs.shape[-1]:
        return absorbed_by_gram(rows, c * (inputs.mT @ inputs))
    return _solve(c * (inputs @ inputs.mT), c * (rows @ inputs.mT)) @ inputs


def absorbed_by_gram(rows: Tensor, gram: Tensor) -> Tensor:
    """The same from gram = c XᵀX (…, in, in), for batches spread over processes: a sum of Grams is a Gram."""
    return _solve(gram, rows @ gram)


def _solve(gram: Tensor, rows: Tensor) -> Tensor:
    """rows (I + gram)⁻¹."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    jitter = JITTER * torch.finfo(gram.dtype).eps * diagonal.sum(-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed((1 + jitter).expand_as(diagonal)))
    return torch.cholesky_solve(rows.mT, factor).mT


def dgd_batch(
    weight: Tensor, momentum: Tensor, grad: Tensor, rate: float | Tensor, mu: float, absorb: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(W⁺ − W, m⁺). weight, momentum, grad (…, out, in); mu in [0, 1); absorb: rows ↦ rows (I − D), of this rate."""
    step = rate * grad
    from_weight, from_step = absorb(torch.cat([weight, step], dim=-2)).split(weight.shape[-2], dim=-2)
    momentum = mu * momentum - (step - from_step)
    return momentum - from_weight, momentum


def dgd_in_turn(
    weight: Tensor, momentum: Tensor, inputs: Tensor, errors: Tensor, rate: float | Tensor, share: float, mu: float
) -> tuple[Tensor, Tensor]:
    """(W⁺ − W, m⁺) when the samples are written one after the other, each by ``rules/dgd.py`` at the rate η s.

    inputs (…, N, in); errors s u_b (…, N, out) as autograd gives them; share s. The order matters, in η².
    """
    state, one = weight, weight.new_ones(weight.shape[:-2])
    for x, error in zip(inputs.unbind(-2), errors.unbind(-2), strict=True):
        state, momentum = dgd_momentum(state, momentum, x, error / share, rate * share * one, one, mu)
    return state - weight, momentum
