"""Truths for generalized gradient descent and momentum: the printed argmin, minimised or differentiated by autograd.

``minimised`` takes one Newton step with slope and curvature from autograd: exact for the quadratic pairs, and it knows
nothing of their closed form. ``descended`` takes the stated number of gradient steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.dgd_batch import samples


def minimised(energy, start: Tensor) -> Tensor:
    """One Newton step: the minimiser of a quadratic."""
    with torch.enable_grad():
        slope = torch.autograd.functional.jacobian(energy, start).flatten()
        curvature = torch.autograd.functional.hessian(energy, start).reshape(len(slope), len(slope))
    return start - torch.linalg.solve(curvature, slope).reshape(start.shape)


def descended(energy, start: Tensor, steps: int, size: float) -> Tensor:
    point = start
    for _ in range(steps):
        with torch.enable_grad():
            p = point.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(energy(p), p)
        point = point - size * slope
    return point.detach()


def distance(state: Tensor, history: list[Tensor], decay: float) -> Tensor:
    """1/(2c) sum_i |S - decay S_i|^2."""
    total = torch.zeros((), dtype=state.dtype)
    for old in history:
        total = total + (state - decay * old).pow(2).sum() / (2 * len(history))
    return total


def weights_energy(
    objective: str, value: str, weight: Tensor, inputs: Tensor, errors: Tensor, rate: float, share: float
):
    """rate times share times the sum of the samples' losses, as a function of P. errors: each sample's own u_b."""
    pairs = [(x, -u if value == "error" else weight @ x - u) for x, u in zip(inputs, errors, strict=True)]

    def energy(p: Tensor) -> Tensor:
        total = torch.zeros((), dtype=p.dtype)
        for x, v in pairs:
            total = total + (-(p @ x).dot(v) if objective == "dot" else (p @ x - v).dot(p @ x - v) / 2)
        return rate * share * total

    return energy


def momentum_energy(objective: str, key: str, grad: Tensor, value: Tensor, rate: float):
    """``value`` is P(g). For "l2" with P the identity: 1/2 |m k^T + V|^2 with V = rate |g| I for a normalised key
    (so that V k = rate g), V = rate I for the literal one; else the same with its cross term written out."""
    k = grad / grad.norm() if key == "normalized" else grad
    if objective == "l2" and value is grad:
        target = rate * (grad.norm() if key == "normalized" else 1.0) * torch.eye(len(grad), dtype=grad.dtype)
        return lambda m: (m @ k.T + target).pow(2).sum() / 2
    quadratic = 0.5 if objective == "l2" else 0.0
    return lambda m: rate * (m * value).sum() + quadratic * (m @ k.T).pow(2).sum()


def weights_path(weight, gradients, *, lr, objective="l2", value="error", retention=None, history=1, solve="exact",
                 inner_steps=1, inner_lr=1.0, weight_decay=0.0) -> Tensor:  # fmt: skip
    """One matrix after these steps, each on the ``samples`` of its gradient; the loss is their mean."""
    past = [weight] * history
    for g in gradients:
        inputs, errors = samples(g)
        errors, share = len(inputs) * errors, 1 / len(inputs)
        if callable(objective):
            seen = torch.stack([value(u, weight @ x) for x, u in zip(inputs, errors, strict=True)])

            def learn(p, inputs=inputs, seen=seen, share=share):
                return lr * share * sum(objective(p @ x, v) for x, v in zip(inputs, seen, strict=True))
        else:
            learn = weights_energy(objective, value, weight, inputs, errors, rate=lr, share=share)
        held = list(past)

        def energy(p, learn=learn, held=held):
            return learn(p) + (retention(p, held) if retention else distance(p, held, 1.0))

        if solve == "exact":
            new = minimised(energy, weight)
        else:
            new = descended(energy, weight, inner_steps, inner_lr)
        weight = new - lr * weight_decay * weight
        past = [weight, *past][:history]
    return weight


def momentum_path(weight, gradients, *, lr, decay=0.9, objective="l2", key="normalized", values=None, retention=None,
                  history=1, solve="gradient", inner_steps=1, inner_lr=1.0, weight_decay=0.0) -> Tensor:  # fmt: skip
    """One matrix after these steps."""
    past = [torch.zeros_like(weight)] * history
    for g in gradients:
        value = values(g) if values else g
        if callable(objective):
            learn = lambda m, g=g, value=value: objective(m, key(g), lr * value)  # noqa: E731
        else:
            learn = momentum_energy(objective, key, g, value, lr)
        held = list(past)

        def energy(m, learn=learn, held=held):
            return learn(m) + (retention(m, held) if retention else distance(m, held, decay))

        if solve == "exact":
            m = minimised(energy, past[0])
        else:
            m = descended(energy, past[0], inner_steps, inner_lr)
        weight = (1 - lr * weight_decay) * weight + m
        past = [m, *past][:history]
    return weight
