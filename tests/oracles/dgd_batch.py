"""Truths for the proximal step of a batch, argmin_P  sum_b s/2 |P x_b + u_b|^2 + 1/(2 rate) |P - W|_F^2.

``joint`` stacks the problem as one ordinary least-squares problem and hands it to a QR; ``recursive`` visits the
samples one at a time and carries the inverse of the information so far (recursive least squares); ``by_gradient``
minimises.
No Gram matrix, no Woodbury, no Cholesky factor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def joint(weight: Tensor, inputs: Tensor, errors: Tensor, rate: float, share: float) -> Tensor:
    """Rows sqrt(s) (P x_b + u_b) and (P - W)/sqrt(rate), solved by least squares. errors: u_b (N, out)."""
    eye = torch.eye(inputs.shape[1], dtype=inputs.dtype)
    design = torch.cat([share**0.5 * inputs, eye / rate**0.5])
    answers = torch.cat([-(share**0.5) * errors, weight.T / rate**0.5])
    q, r = torch.linalg.qr(design)
    return torch.linalg.solve_triangular(r, q.T @ answers, upper=True).T


def recursive(weight: Tensor, inputs: Tensor, errors: Tensor, rate: float, share: float) -> Tensor:
    """Sample by sample: after the last one, the minimiser of the whole batch."""
    covariance = rate * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    for x, u in zip(inputs, errors, strict=True):
        gain = covariance @ x / (1 / share + x @ covariance @ x)
        weight = weight - torch.outer(weight @ x + u, gain)
        covariance = covariance - torch.outer(gain, x @ covariance)
    return weight


def by_gradient(weight: Tensor, inputs: Tensor, errors: Tensor, rate: float, share: float, steps=300) -> Tensor:
    point = weight.clone()
    size = 0.9 / (1 / rate + share * float(torch.linalg.matrix_norm(inputs, 2) ** 2))
    for _ in range(steps):
        with torch.enable_grad():
            p = point.clone().requires_grad_()
            loss = share / 2 * (inputs @ p.T + errors).square().sum() + (p - weight).square().sum() / (2 * rate)
            (slope,) = torch.autograd.grad(loss, p)
        point = point - size * slope
    return point


def step(weight, momentum, inputs, errors, *, rate, share, mu=0.0, weight_decay=0.0):
    """One step of the optimizer: what forgets is the step towards nothing, what is learned that of an empty map."""
    nothing, empty = torch.zeros_like(errors), torch.zeros_like(weight)
    momentum = mu * momentum + joint(empty, inputs, errors, rate, share)
    forgotten = joint(weight, inputs, nothing, rate, share)
    return forgotten - rate * weight_decay * weight + momentum, momentum


SCALE = 32.0  # a power of two: exact in every dtype


def samples(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (N, in) and errors as autograd gives them (N, out) with this gradient, errors^T inputs. Batched."""
    eye = torch.eye(gradient.shape[-2], dtype=gradient.dtype).expand(*gradient.shape[:-2], -1, -1)
    return SCALE * gradient, eye / SCALE


def path(weight, gradients, *, lr, momentum=0.0, reduction="mean", batch="joint", weight_decay=0.0) -> Tensor:
    """One matrix after these steps, each on the ``samples`` of its gradient."""
    m = torch.zeros_like(weight)
    for g in gradients:
        inputs, errors = samples(g)
        share = 1 / len(inputs) if reduction == "mean" else 1.0
        errors = errors / share
        if batch == "joint":
            how = {"rate": lr, "share": share, "mu": momentum, "weight_decay": weight_decay}
            weight, m = step(weight, m, inputs, errors, **how)
        else:
            before = weight
            for x, u in zip(inputs, errors, strict=True):
                weight, m = step(weight, m, x[None], u[None], rate=lr * share, share=1.0, mu=momentum)
            weight = weight - lr * weight_decay * before
    return weight
