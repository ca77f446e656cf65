"""M3, multi-scale momentum Muon: two memories of gradients, a fast and a slow one (NL Eq. 75, Algorithm 1).

    every step      M1 ← M1 + β1 g                V ← V + β2 g²               O1 = NS(M1)
    every f steps   M2 ← M2 + β3 Σ(last f g)                                  O2 = NS(M2), held until the next time
                    W ← W − lr (O1 + a O2) / (√V + ε)                                                    "paper"

    every step      M1 ← β1 M1 + (1 − β1) g       V ← β2 V + (1 − β2) g²      O1 = NS(β1 M1 + (1 − β1) g)
    every f steps   M2 ← β3 M2 + (1 − β3) mean(last f g)                      O2 = NS(M2), held until the next time
                    D = (O1 + a O2) / (√V + ε rms(√V)),    W ← W − lr · 0.2 D / rms(D)                     "ema"

    g gradient; M1, M2, V, O1, O2, D (…, out, in)      NS  Newton–Schulz (ops/newton_schulz.py)
    a  weight of the slow memory, >= 0      rms(·)  root of the mean square of one matrix's entries

The letter's memories never decay, so that its steps shrink as AdaGrad's do, and an orthogonal numerator over a small
√V explodes. The practical form forgets, looks one step ahead (Nesterov, as Muon does) and has a step of known size:
0.2 is the root mean square of an AdamW step. Only the direction of D counts there: Adam's bias correction of V, one
factor for all of a matrix, would cancel, and so does the scale of the loss. ε is relative because √V is zero where an
input is dead, where Newton–Schulz leaves something that is not quite: at a tiny ε that alone would fill the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.rules.preconditioned import TINY, second_moment

STEP_RMS = 0.2


def paper_fast(fast: Tensor, variance: Tensor, g: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """(M1, V) after one gradient, to the letter: sums that never decay."""
    return torch.add(fast, g, alpha=beta1), torch.addcmul(variance, g, g, value=beta2)


def paper_slow(slow: Tensor, total: Tensor, beta3: float) -> Tensor:
    """M2 after a period; total: the sum of its gradients."""
    return torch.add(slow, total, alpha=beta3)


def paper_update(direction: Tensor, variance: Tensor, lr: float | Tensor, eps: float) -> Tensor:
    """−lr (O1 + a O2) / (√V + ε), direction = O1 + a O2."""
    return -lr * direction / (variance.sqrt() + eps)


def ema_fast(fast: Tensor, variance: Tensor, g: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """(M1, V) after one gradient: moving averages."""
    return torch.lerp(fast, g, 1 - beta1), second_moment(variance, g, beta2)


def ema_slow(slow: Tensor, total: Tensor, beta3: float, steps: int) -> Tensor:
    """M2 after a period of so many steps; total: the sum of its gradients."""
    return torch.lerp(slow, total / steps, 1 - beta3)


def nesterov(fast: Tensor, g: Tensor, beta1: float) -> Tensor:
    """β1 M1 + (1 − β1) g: the fast memory one more step ahead, along the same gradient."""
    return torch.lerp(g, fast, beta1)


def ema_update(direction: Tensor, variance: Tensor, lr: float | Tensor, eps: float) -> Tensor:
    """−lr · 0.2 D / rms(D), direction = O1 + a O2; zero for a direction of zeros."""
    root = variance.sqrt()
    d = torch.div(direction, root.add_(eps * _rms(root) + TINY), out=root)
    return d.mul_(-lr * STEP_RMS / (_rms(d) + TINY))


def _rms(t: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(t, keepdim=True) / (t.shape[-2] * t.shape[-1]) ** 0.5
