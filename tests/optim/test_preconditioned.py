"""What the preconditioners do, beyond the contract."""

from __future__ import annotations

import pytest
import torch

from nestlearn.optim import PreconditionedMomentum
from nestlearn.rules.preconditioned import inverse_fourth_root
from tests.contracts.optimizer import gap, gradient, parameters


def run(steps, shapes=((4, 5),), **settings):
    ps = parameters(list(shapes))
    optimizer = PreconditionedMomentum(ps, **{"lr": 0.01} | settings)
    for n in range(steps):
        for i, p in enumerate(ps):
            p.grad = gradient(n, i, p)
        optimizer.step()
    return ps, optimizer


def test_diagonal_without_a_past_is_the_sign_of_the_gradient():
    (p,), _ = run(1, lr=0.5, eps=1e-12)
    (start,) = parameters([(4, 5)])
    assert gap([p], [start - 0.5 * gradient(0, 0, p).sign()]) <= 1e-9


def test_kronecker_of_one_gradient_is_its_orthogonal_factor():
    """(g gᵀ)^(−1/4) g (gᵀ g)^(−1/4) = U Vᵀ: Shampoo without a past is Muon without Newton–Schulz."""
    (p,), _ = run(1, [(4, 5)], preconditioner="kronecker", eps=1e-14, lr=1.0)
    (start,) = parameters([(4, 5)])
    u, _, v = torch.linalg.svd(gradient(0, 0, p), full_matrices=False)
    assert gap([p], [start - u @ v]) <= 1e-5


def test_roots_are_computed_once_per_period():
    held, changes = None, []
    for steps in range(1, 9):
        (p,), optimizer = run(steps, preconditioner="kronecker", period=3)
        now = optimizer.state[p]["left_root"]
        changes.append(held is None or not torch.equal(held, now))
        held = now
    assert changes == [(number - 1) % 3 == 0 for number in range(1, 9)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fourth_root_of_a_singular_matrix_is_finite_and_of_a_regular_one_exact(dtype):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert inverse_fourth_root((x @ x.mT)[None], 1e-6).isfinite().all()
    assert inverse_fourth_root(torch.zeros(2, 3, 3, dtype=dtype), 1e-6).isfinite().all()
    regular = (x.mT @ x)[None]
    root = inverse_fourth_root(regular, 0.0)
    eye = root @ root @ root @ root @ regular
    assert (eye - torch.eye(3, dtype=dtype)).abs().max() <= (1e-11 if dtype == torch.float64 else 1e-3)


def test_state_is_what_the_docstring_says():
    """Per entry m and v, or per matrix L, R and their roots; nothing else."""
    shape = (2, 3, 4)
    for preconditioner, entries in (
        ("diagonal", 2 * 24), ("newton_schulz", 24), ("kronecker", 24 + 2 * 2 * (9 + 16))
    ):  # fmt: skip
        (p,), optimizer = run(1, [shape], preconditioner=preconditioner)
        assert sum(v.numel() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)) == entries
