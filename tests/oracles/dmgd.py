"""Truth for deep momentum: autograd differentiates the memory's objective, written row by row; nothing is batched.

State of one memory: {"w1": (in, hidden), "w2": (hidden, keys)}. A step of the optimizer for matrices that share it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def objective(w1: Tensor, w2: Tensor, rows: list[Tensor], features, kind: str, share: float) -> Tensor:
    """share times the sum over rows; the value of a row u is -u."""
    total = torch.zeros((), dtype=w1.dtype)
    for u in rows:
        answer = w1 @ torch.tanh(w2 @ features(u))
        value = -u
        if kind == "dot":
            total = total - torch.dot(answer, value)
        else:
            total = total + 0.5 * torch.dot(answer - value, answer - value)
    return share * total


def learned(memory: dict, start: dict, rows: list[Tensor], features, *, kind, share, rate, decay) -> dict:
    with torch.enable_grad():
        w1, w2 = (memory[name].detach().clone().requires_grad_() for name in ("w1", "w2"))
        slopes = torch.autograd.grad(objective(w1, w2, rows, features, kind, share), (w1, w2))
    new = {}
    for name, slope in zip(("w1", "w2"), slopes, strict=True):
        new[name] = start[name] + decay * (memory[name] - start[name]) - rate * slope
    return new


def orthogonalised(x: Tensor, steps: int) -> Tensor:
    """The quintic on the singular values: no matrix product of Newton-Schulz."""
    u, s, v = torch.linalg.svd(x / (x.norm() + 1e-7), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


def shaped(step: Tensor, output: str, ns_steps: int, normalised: bool) -> Tensor:
    if output == "newton_schulz":
        return orthogonalised(step, ns_steps) * (max(step.shape) ** 0.5 if normalised else 1)
    if normalised:
        step = step / step.pow(2).mean().sqrt()
    return torch.tanh(step) if output == "tanh" else step


def step(
    weights,
    grads: list[Tensor],
    memory: dict,
    start: dict,
    *,
    lr,
    hidden=64,
    decay=0.9,
    memory_lr=1.0,
    objective="l2",
    output="none",
    features=lambda u: u,
    normalised=True,
    ns_steps=5,
    weight_decay=0.0,
):
    """Weights after one step, and the memory. All have as many columns; ``start`` is the home of the decay."""
    units = []
    for g in grads:
        length = (sum(row.dot(row) for row in g) / len(g)).sqrt()
        units.append(g / length if normalised else g)
    rows = [row for u in units for row in u]
    share = 1 / (len(rows) * hidden) if normalised else 1.0
    home = start if normalised else {name: torch.zeros_like(w) for name, w in start.items()}
    memory = learned(memory, home, rows, features, kind=objective, share=share, rate=memory_lr, decay=decay)
    new = []
    for w, u in zip(weights, units, strict=True):
        answer = torch.stack([memory["w1"] @ torch.tanh(memory["w2"] @ features(row)) for row in u])
        change = lr * (0.2 if normalised else 1.0) * shaped(answer, output, ns_steps, normalised)
        new.append((1 - lr * weight_decay) * w + change)
    return new, memory


def unit(u: Tensor) -> Tensor:
    return u / u.norm()


def path(weights, gradients, *, hidden=64, seed=0, feature_map=None, scale="rms", **settings) -> list[Tensor]:
    """The weights after these steps: matrices with as many columns share a memory."""
    features = {None: lambda u: u, "unit": unit}.get(feature_map, feature_map)
    settings |= {"hidden": hidden, "features": features, "normalised": scale == "rms"}
    weights = list(weights)
    for columns in {w.shape[1] for w in weights}:
        mine = [i for i, w in enumerate(weights) if w.shape[1] == columns]
        keys = len(features(gradients[0][mine[0]][0]))
        drawn = torch.randn(hidden, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = memory = {"w1": torch.zeros(columns, hidden, dtype=torch.float64), "w2": drawn}
        for grads in gradients:
            own = [weights[i] for i in mine]
            new, memory = step(own, [grads[i] for i in mine], memory, start, **settings)
            for i, w in zip(mine, new, strict=True):
                weights[i] = w
    return weights
