"""Momentum: the memory of gradients that a gradient step writes (NL Eq. 33).

m ← α m − lr · u            then  W ← W + m

m  momentum (…, out, in)        u  what is written: the gradient, or a value P g (NL Eq. 46–47)
α  decay in [0, 1): 99 % of what m holds comes from the last ln 0.01 / ln α gradients
"""

from __future__ import annotations

from torch import Tensor


def momentum(memory: Tensor, written: Tensor, decay: float, lr: float | Tensor) -> Tensor:
    """The memory after one write; memory and written (…, out, in), lr >= 0 a number or 0-d."""
    return (decay * memory).sub_(lr * written)
