"""Delta gradient descent for a batch: the proximal step of all samples at once (NL Eq. 56–57).

    W⁺ = argmin_P  Σ_b s ½ ‖P x_b + u_b‖² + 1/(2η) ‖P − W‖²
       = (W − η G) D,     D = (I + η s XᵀX)⁻¹,     G = s Σ_b u_b x_bᵀ = Uᵀ X s

With momentum, as in ``rules/dgd.py``:    m ← μ m − η G D,    W ← W D + m    (one sample: exactly that rule)

    W, m, G  (out, in)      X inputs (N, in)      u_b  ∇_y of sample b's own loss, (out)      η rate >= 0
    s        1/N where the loss is the mean of N samples, 1 where it is their sum. Either way G is the ordinary gradient
             ``.grad``: what autograd hands to a layer's output is s u_b, not u_b. So only X is needed besides it.

Nothing of size in × in is solved where N < in (Woodbury): with c = η s,

    I − D = c Xᵀ (I + c X Xᵀ)⁻¹ X = c XᵀX (I + c XᵀX)⁻¹

is what a write takes away. It is computed as it stands, since W D − W would cancel for a small η; a jitter of a few
roundings of the trace keeps the Cholesky factor real for a huge one, and leaves D = I outside the span of X. The step
is bounded for every η, up to η times the rounding errors of G outside that span.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.rules.dgd import dgd_momentum

JITTER = 8  # roundings of the trace


class Proximal(NamedTuple):
    """D of a batch: the Cholesky factor of I + c X Xᵀ with c and X (…, N, in), or of I + c XᵀX with that as gram."""

    factor: Tensor
    inputs: Tensor | None = None
    c: float | Tensor = 0.0
    gram: Tensor | None = None

    def absorbed(self, rows: Tensor) -> Tensor:
        """rows (…, k, in) times I − D."""
        if self.gram is not None:
            return self._solve(rows @ self.gram)
        assert self.inputs is not None
        return self._solve(self.c * (rows @ self.inputs.mT)) @ self.inputs

    def kept(self, rows: Tensor) -> Tensor:
        """rows (…, k, in) times D."""
        return rows - self.absorbed(rows) if self.gram is None else self._solve(rows)

    def _solve(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.mT, self.factor).mT


def proximal(inputs: Tensor, c: float | Tensor) -> Proximal:
    """For inputs X (…, N, in) and c = η s >= 0; the smaller of N and in is the size of the system."""
    if inputs.shape[-2] >= inputs.shape[-1]:
        return proximal_of_gram(c * (inputs.mT @ inputs))
    return Proximal(_factor(c * (inputs @ inputs.mT)), inputs, c)


def proximal_of_gram(gram: Tensor) -> Proximal:
    """For c XᵀX (…, in, in), of batches spread over processes: a sum of Grams is a Gram."""
    return Proximal(_factor(gram), gram=gram)


def _factor(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    jitter = JITTER * torch.finfo(gram.dtype).eps * diagonal.sum(-1, keepdim=True)
    return torch.linalg.cholesky_ex(gram + torch.diag_embed((1 + jitter).expand_as(diagonal)))[0]


def dgd_batch(
    weight: Tensor, momentum: Tensor, grad: Tensor, rate: float | Tensor, mu: float, d: Proximal
) -> tuple[Tensor, Tensor]:
    """(W⁺ − W, m⁺). weight, momentum, grad (…, out, in); mu in [0, 1); d: D at this rate."""
    momentum = mu * momentum - d.kept(rate * grad)
    return momentum - d.absorbed(weight), momentum


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
