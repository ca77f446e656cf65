"""Truths for the learning rules on a matrix memory M (out, in): the objective, and a step that differentiates
or solves it.

One token (or one window) at a time, no batch. rate, retain: scalars. Retention scales the old state alone,
``M <- retain M + (step(M) - M)``, but for gated_delta, where it comes before the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracles.dgd import proximal


def gradient_step(objective, state: Tensor, retain: Tensor) -> Tensor:
    """Explicit step of size one on an objective that holds the rate already."""
    return retain * state - torch.func.grad(objective)(state)


def hebbian(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    return gradient_step(lambda m: -rate * torch.dot(m @ key, value), state, retain)


def delta(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    return gradient_step(lambda m: 0.5 * rate * (m @ key - value).square().sum(), state, retain)


def gated_delta(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """Forgets first: the gradient is taken at what is left."""
    return delta(retain * state, key, value, rate, torch.ones_like(retain))


def omega(state: Tensor, keys: Tensor, values: Tensor, rates: Tensor, retain: Tensor) -> Tensor:
    """keys (c, in), values (c, out), rates (c,): one step on the weighted sum of the window's losses."""

    def loss(m: Tensor) -> Tensor:
        terms = [0.5 * r * (m @ k - v).square().sum() for k, v, r in zip(keys, values, rates, strict=True)]
        return torch.stack(terms).sum()

    return gradient_step(loss, state, retain)


def dgd(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """Proximal step on 1/2 |M k - v|^2, solved."""
    return retain * state + proximal(state, value, key, rate) - state


def oja(state: Tensor, key: Tensor, value: Tensor, rate: Tensor, retain: Tensor) -> Tensor:
    """Proximal step on 1/2 |M^T v - k|^2 (the value reconstructs its key), solved: the same problem, transposed."""
    return retain * state + proximal(state.mT, key, value, rate).mT - state
