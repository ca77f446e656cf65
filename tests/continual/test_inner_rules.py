"""The rules that a stream's level learns by are those of the library's optimizers, stream for stream."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nestlearn import OnlineLevel, optim
from nestlearn.continual.delta import Delta
from nestlearn.continual.inner_rules import change, initial_memory

OUT, IN, STREAMS = 5, 7, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "delta_momentum": lambda p: optim.DeltaMomentum(p, lr=0.1, decay=0.9),
    "m3": lambda p: optim.M3(p, lr=0.1),
}


def gradients(steps: int) -> Tensor:
    return torch.randn(steps, STREAMS, OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_a_rule_steps_as_its_optimizer_does(rule):
    level = OnlineLevel("a", 1, ("w",), 0.1, rule=rule)
    total, memory = Delta.zero(STREAMS, OUT, IN, torch.float64), None
    memory = initial_memory(level, total)
    weights = [nn.Parameter(torch.zeros(OUT, IN, dtype=torch.float64)) for _ in range(STREAMS)]
    optimizers = [OPTIMIZERS[rule]([w]) for w in weights]
    for steps, g in enumerate(gradients(35), start=1):
        step, memory = change(level, memory, Delta(dense=g), steps)
        total = total.add(step)
        for own, w, optimizer in zip(g, weights, optimizers, strict=True):
            w.grad = own
            optimizer.step()
    expected = torch.stack([w.detach() for w in weights])
    assert (total.matrix() - expected).abs().max() < 1e-10 * (1 + expected.abs().max())


def factors(rank: int, seed: int) -> Delta:
    chance = torch.Generator().manual_seed(seed)
    left = torch.randn(STREAMS, rank, 20, dtype=torch.float64, generator=chance)
    right = torch.randn(STREAMS, rank, 30, dtype=torch.float64, generator=chance)
    return Delta.outer(left, right)


@pytest.mark.parametrize("ranks", [(2, 3), (2, 11), (12, 13), (12, 2), (0, 2), (2, 0)])
def test_sums_of_factors_are_exact(ranks):
    a, b = factors(ranks[0], 0), factors(ranks[1], 1)
    both = a.add(b)
    expected = a.matrix() + b.matrix()
    assert (both.matrix() - expected).abs().max() < 1e-12
    assert (both.dense is None) == (sum(ranks) < 12)  # 12 · 50 numbers fill a matrix of 20 · 30
    x = torch.randn(STREAMS, 4, 30, dtype=torch.float64)
    assert (both.apply(x) - x @ expected.mT).abs().max() < 1e-12
    assert torch.allclose(both.norm(), torch.linalg.matrix_norm(expected))
    factor = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    assert (both.scaled(factor).matrix() - factor[:, None, None] * expected).abs().max() < 1e-12


def test_where_removes_what_is_not_finite():
    broken = factors(3, 0).scaled(torch.tensor([1.0, math.nan, 1.0]))
    kept = broken.where(torch.tensor([True, False, True])).matrix()
    assert kept.isfinite().all() and (kept[1] == 0).all() and kept[0].norm() > 0


def test_rows_of_different_rank_are_joined():
    a, b = factors(2, 0), factors(5, 1)
    joined = Delta.cat([a, b])
    assert torch.equal(joined.matrix(), torch.cat([a.matrix(), b.matrix()]))
    assert torch.equal(joined[3:].matrix(), b.matrix())
