"""Truths for optimizers: one matrix at a time, in float64, from objectives, closed sums and decompositions.

Each takes a matrix W (out, in) and the list of its gradients, and returns W after all of these steps. No state is
carried except W and what a rule cannot be written without; averages are written as the sums that they stand for.
``jointly`` makes of such an oracle one of several matrices, as the contract asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def jointly(oracle: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """weights: list of matrices; gradients: for each step a list of matrices."""

    def together(weights: list[Tensor], gradients: list[list[Tensor]], **settings) -> list[Tensor]:
        return [oracle(w, [step[i] for step in gradients], **settings) for i, w in enumerate(weights)]

    return together


def average(terms: list[Tensor], beta: float) -> Tensor:
    """Of a moving average that starts at zero: (1 − β) Σ β^(n − i) term_i."""
    return (1 - beta) * sum(beta ** (len(terms) - 1 - i) * term for i, term in enumerate(terms))


def orthogonal(x: Tensor, steps: int) -> Tensor:
    """What the quintic does to the singular values, done to the singular values."""
    a, b, c = QUINTIC
    u, s, v = torch.linalg.svd(x / (x.square().sum().sqrt() + 1e-7), full_matrices=False)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


def adam_scaled(gradients: list[Tensor], beta: float, eps: float) -> Tensor:
    """The last gradient over the root of the weighted mean of all squared ones."""
    weights = [beta ** (len(gradients) - 1 - i) for i in range(len(gradients))]
    mean = sum(w * g.square() for w, g in zip(weights, gradients, strict=True)) / sum(weights)
    return gradients[-1] / (mean.sqrt() + eps)


def written(memory: Tensor, objective: Callable[[Tensor], Tensor], decay: float) -> Tensor:
    """One explicit gradient step on what the memory is to learn, which also forgets: α m − ∇objective(m)."""
    return decay * memory - torch.func.grad(objective)(memory)


def delta_momentum(
    w, gradients, *, lr, decay=0.9, key="normalized", values=None, beta=0.999, eps=1e-8, weight_decay=0.0
):
    """Each step learns that the key reads back nothing but the new value: ½ |m kᵀ|² + lr <m, P g>."""
    m = torch.zeros_like(w)
    for t, g in enumerate(gradients, start=1):
        value = valued(gradients[:t], values, beta, eps)
        k = g / g.square().sum().sqrt() if key == "normalized" else g
        m = written(m, lambda m, k=k, v=value: 0.5 * (m @ k.mT).square().sum() + lr * (m * v).sum(), decay)
        w = (1 - lr * weight_decay) * w + m
    return w


def valued(gradients: list[Tensor], values, beta: float, eps: float) -> Tensor:
    g = gradients[-1]
    if values is None:
        return g
    if isinstance(values, str):
        return adam_scaled(gradients, beta, eps)
    return values(g)


def preconditioned(
    w, gradients, *, lr, decay=0.9, preconditioner="diagonal", beta=0.999, eps=1e-8, period=10, ns_steps=5,
    weight_decay=0.0,
):  # fmt: skip
    m, roots = torch.zeros_like(w), None
    for t, g in enumerate(gradients, start=1):
        past = gradients[:t]
        if preconditioner == "diagonal":
            value = adam_scaled(past, beta, eps)
        elif preconditioner == "newton_schulz":
            value = orthogonal(g, ns_steps)
        else:
            if t % period == 1 or period == 1:
                left, right = average([g @ g.mT for g in past], beta), average([g.mT @ g for g in past], beta)
                roots = [fourth_root(f / (1 - beta**t), eps) for f in (left, right)]
            value = roots[0] @ g @ roots[1]
        m = written(m, lambda m, v=value: lr * (m * v).sum(), decay)
        w = (1 - lr * weight_decay) * w + m
    return w


def fourth_root(factor: Tensor, eps: float) -> Tensor:
    """(F + ε λ I)^(−1/4), λ its spectral norm; by scipy's Schur method, no eigenvectors."""
    shifted = factor + eps * torch.linalg.matrix_norm(factor, 2) * torch.eye(len(factor), dtype=factor.dtype)
    return torch.from_numpy(scipy.linalg.fractional_matrix_power(shifted.numpy(), -0.25).real)


def m3(
    w, gradients, *, lr, betas=(0.95, 0.95, 0.9), slow_weight=0.2, slow_period=16, ns_steps=5, eps=0.3,
    weight_decay=0.0, style="ema",
):  # fmt: skip
    """Algorithm 1, every memory as the sum over the gradients that it has seen."""
    beta1, beta2, beta3 = betas
    for t in range(1, len(gradients) + 1):
        past, g = gradients[:t], gradients[t - 1]
        periods = [sum(past[i : i + slow_period]) for i in range(0, t - t % slow_period, slow_period)]
        squares = [g.square() for g in past]
        if style == "paper":
            ahead, variance = beta1 * sum(past), beta2 * sum(squares)
            slow = beta3 * sum(periods)
        else:
            ahead = beta1 * average(past, beta1) + (1 - beta1) * g
            variance = average(squares, beta2) / (1 - beta2**t)
            slow = average([p / slow_period for p in periods], beta3)
        direction = orthogonal(ahead, ns_steps)
        if periods:
            direction = direction + slow_weight * orthogonal(slow, ns_steps)
        if style == "ema":
            step = direction / (variance.sqrt() + eps * variance.mean().sqrt())
            step = 0.2 * step / step.square().mean().sqrt()
        else:
            step = direction / (variance.sqrt() + eps)
        w = (1 - lr * weight_decay) * w - lr * step
    return w


def adamw(w, gradients, *, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    for t in range(1, len(gradients) + 1):
        past, (beta1, beta2) = gradients[:t], betas
        mean = average(past, beta1) / (1 - beta1**t)
        variance = average([g.square() for g in past], beta2) / (1 - beta2**t)
        w = (1 - lr * weight_decay) * w - lr * mean / (variance.sqrt() + eps)
    return w
