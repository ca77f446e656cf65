"""Newton–Schulz: the orthogonal factor of a matrix, from matrix products alone (NL Eq. 42–44).

    X ← X / (‖X‖_F + ε)
    T times:  A = X Xᵀ,   X ← a X + (b A + c A²) X           (a, b, c) = (3.4445, −4.7750, 2.0315)

    X  (…, out, in), transposed while it is tall, so that A is the smaller Gram matrix
    T  steps; five bring every singular value that is not tiny into about [0.7, 1.2] (Jordan et al., Muon, 2024)

The singular vectors stay as they are: with X = U S Vᵀ the result is U p(S) Vᵀ, p the quintic applied T times.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; it does not converge to one, it stays near it
EPS = 1e-7
CPU_BATCHED = 2**16  # entries from which a CPU multiplies one matrix at a time faster than a batch


def newton_schulz(x: Tensor, steps: int = 5, *, eps: float = EPS) -> Tensor:
    """Orthogonalises every matrix of x (…, out, in), in the dtype of x: nothing is cast. Zero stays zero.

    steps  T, >= 1        eps  ε, > 0, keeps a matrix of zeros finite
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    batch = wide.reshape(-1, *wide.shape[-2:])
    one_by_one = batch.device.type == "cpu" and batch[0].numel() >= CPU_BATCHED
    done = torch.stack([_iterate(m, steps, eps) for m in batch]) if one_by_one else _iterate(batch, steps, eps)
    done = done.reshape(wide.shape)
    return done.mT if tall else done


def _iterate(x: Tensor, steps: int, eps: float) -> Tensor:
    """x (out, in) or (n, out, in), out <= in."""
    (a, b, c), multiply_add = QUINTIC, torch.addmm if x.ndim == 2 else torch.baddbmm
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonal(x: Tensor, steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """``newton_schulz`` with its products in ``product_dtype``, and a result in that dtype."""
    return newton_schulz(x.to(product_dtype(x, dtype)), steps)


def product_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """dtype, or where it is None: bfloat16, in which Muon publishes the iteration, but float64 for x in float64."""
    if dtype is not None:
        return dtype
    return torch.float64 if x.dtype == torch.float64 else torch.bfloat16
