"""The blocked inverse of a unit lower triangular matrix."""

from __future__ import annotations

import pytest
import torch

from nestlearn.ops.triangular import invert_unit_lower


def system(size: int, batch: int = 3, dtype: torch.dtype = torch.float64, bound: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    entries = 2 * torch.rand(batch, size, size, generator=generator, dtype=torch.float64) - 1
    return (bound * entries).tril(-1).to(dtype)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 17, 33, 64, 100])
def test_is_the_inverse(size):
    """Bound 1/2 keeps the inverse itself small, so that the residual measures rounding alone."""
    strict = system(size, bound=0.5)
    inverse = invert_unit_lower(strict)
    identity = torch.eye(size, dtype=torch.float64)
    scale = inverse.abs().amax().clamp(min=1)
    assert ((identity + strict) @ inverse - identity).abs().max() <= 1e-13 * size * scale
    assert inverse.shape == strict.shape and not inverse.triu(1).any() and (inverse.diagonal(dim1=1, dim2=2) == 1).all()


def test_the_argument_is_left_alone():
    strict = system(20)
    before = strict.clone()
    invert_unit_lower(strict)
    assert torch.equal(strict, before)


def test_matrices_of_a_batch_are_independent():
    strict = system(24, batch=4, bound=0.5)
    whole = invert_unit_lower(strict)
    for row in range(4):
        assert (invert_unit_lower(strict[row : row + 1])[0] - whole[row]).abs().max() <= 1e-12


@pytest.mark.parametrize("size", [8, 64, 256])
def test_repeated_unit_keys_lose_no_digits_in_float32(size):
    """All entries 1: the inverse is 1 on the diagonal, −1 below it and 0 elsewhere, exactly."""
    strict = torch.ones(1, size, size).tril(-1)
    truth = torch.eye(size) - torch.ones(size - 1).diag(-1)
    assert torch.equal(invert_unit_lower(strict)[0], truth)


def test_float32_is_as_good_as_a_triangular_solve():
    strict = system(64, dtype=torch.float32, bound=0.2)
    truth = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + strict.double())
    identity = torch.eye(64).expand(3, 64, 64)
    solved = torch.linalg.solve_triangular(strict, identity, upper=False, unitriangular=True)
    ours, theirs = ((x.double() - truth).norm() for x in (invert_unit_lower(strict), solved))
    assert ours <= 10 * theirs + 1e-6 * truth.norm()
