"""Delta momentum: a memory of gradients that corrects what it holds instead of adding to it (NL Eq. 48–49).

    m ← m (α I − kᵀ k) − lr · P g            then  W ← W + m

    m  momentum (…, out, in)        g  gradient (…, out, in)        P g  value (…, out, in)
    k  key: g literally, or g / ‖g‖_F, which bounds the decay: no eigenvalue of kᵀ k exceeds 1

A gradient step on ½ ‖m gᵀ − P‖² is m − (m gᵀ − P) g: the decay acts on the right of m, on the rows' directions that
the gradient uses, and leaves the others alone. The paper prints it on the left, where the shapes of a matrix W
(out, in) do not allow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30  # a gradient of zeros has a key of zeros


def normalized(g: Tensor) -> Tensor:
    """Every matrix divided by its Frobenius norm; zero stays zero."""
    return g / torch.linalg.matrix_norm(g, keepdim=True).clamp(min=TINY)


def read_back(memory: Tensor, key: Tensor) -> Tensor:
    """m kᵀ k, through the smaller of the two Gram matrices, in the dtype of the arguments."""
    out, into = key.shape[-2:]
    return (memory @ key.mT) @ key if out <= into else memory @ (key.mT @ key)


def delta_momentum(
    memory: Tensor, key: Tensor, value: Tensor, decay: float, lr: float | Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """m after one write; memory, key, value (…, out, in); decay α in [0, 1); lr >= 0 a number or 0-d.

    dtype: of the two matrix products of the decay; None keeps that of the memory.
    """
    dtype = dtype or memory.dtype
    return (decay * memory).sub_(read_back(memory.to(dtype), key.to(dtype))).sub_(lr * value)
