"""Adam is the optimal associative memory of gradients for an L2 regression onto their variance (NL App. B).

Entry by entry, the memory is one number m that maps each past gradient g_i to the spread of all of them, σ_t = √v̂_t:

    m_t = argmin_m  Σ_{i ≤ t} w_i (m g_i − σ_t)²,    w_i ∝ β^(t−i)          then  W ← W − lr m_t

Its minimum is Σ w_i g_i σ_t / Σ w_i g_i² = m̂_t/√v̂_t, Adam's step at ε = 0 with one β for both moments. Adam has two:
what is stored, the correlation of keys with their target, fades with β1; the energy of the keys, with β2:

    m_t = argmin_m  ½ m² Σ u_i g_i² − m σ_t Σ w_i g_i,    w_i ∝ β1^(t−i),  u_i ∝ β2^(t−i)

Here the objectives are minimised, by autograd in float64, and compared with what ``torch.optim.Adam`` does.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

SHAPE, STEPS, LR = (3, 4), 25, 0.1


def gradients() -> list[Tensor]:
    """Away from zero, so that plain descent finds every minimum soon."""
    generator = torch.Generator().manual_seed(0)
    draws = [0.3 + torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [g + g.sign() / 2 for g in draws]


def adam(betas: tuple[float, float]) -> list[Tensor]:
    """−ΔW / lr of every step."""
    w = torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer, steps = torch.optim.Adam([w], lr=LR, betas=betas, eps=1e-15), []
    for g in gradients():
        before, w.grad = w.detach().clone(), g
        optimizer.step()
        steps.append((before - w.detach()) / LR)
    return steps


def fading(count: int, beta: float) -> Tensor:
    """w_i ∝ β^(t−i) with sum 1, over a leading axis of gradients."""
    w = beta ** torch.arange(count - 1, -1, -1, dtype=torch.float64)
    return (w / w.sum())[:, None, None]


def minimised(objective) -> Tensor:
    """By gradient descent with momentum until nothing moves; the curvatures are of order 1."""
    m = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([m], lr=0.06, momentum=0.6)
    for _ in range(600):
        optimizer.zero_grad()
        objective(m).backward()
        optimizer.step()
    assert m.grad.abs().max() < 1e-12, "not at the minimum"
    return m.detach()


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("t", [1, 2, 7, STEPS])
def test_the_regression_onto_the_variance_is_adam(beta, t):
    seen, w = torch.stack(gradients()[:t]), fading(t, beta)
    sigma = (w * seen.square()).sum(0).sqrt()
    memory = minimised(lambda m: (w * (m * seen - sigma).square()).sum())
    assert (memory - adam((beta, beta))[t - 1]).abs().max() <= 1e-10


@pytest.mark.parametrize("t", [2, 7, STEPS])
def test_with_two_rates_of_forgetting_it_is_adam_as_it_is_used(t):
    seen, w, u = torch.stack(gradients()[:t]), fading(t, 0.9), fading(t, 0.999)
    sigma = (u * seen.square()).sum(0).sqrt()

    def objective(m: Tensor) -> Tensor:
        return (0.5 * m.square() * (u * seen.square()).sum(0) - m * sigma * (w * seen).sum(0)).sum()

    memory = minimised(objective)
    assert (memory - adam((0.9, 0.999))[t - 1]).abs().max() <= 1e-10
    alike = minimised(lambda m: (w * (m * seen - sigma).square()).sum())
    assert (alike - adam((0.9, 0.999))[t - 1]).abs().max() > 1e-3, "the two rates matter"


@pytest.mark.parametrize("target", ["one", "norm"])
def test_another_target_is_not_adam(target):
    """The variance is what makes it Adam: regression onto one gives m̂/v̂."""
    seen, w = torch.stack(gradients()), fading(STEPS, 0.9)
    goal = torch.ones(SHAPE, dtype=torch.float64) if target == "one" else (w * seen.abs()).sum(0)
    memory = minimised(lambda m: (w * (m * seen - goal).square()).sum())
    assert (memory - adam((0.9, 0.9))[-1]).abs().max() > 1e-2
