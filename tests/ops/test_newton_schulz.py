"""Newton–Schulz against the polynomial of the singular values, and the laws of an orthogonal factor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.ops.newton_schulz import newton_schulz, orthogonal
from tests.oracles import optimizers as truth


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(out=st.integers(1, 12), into=st.integers(1, 12), steps=st.integers(1, 7), scale=st.sampled_from([1e-3, 1, 1e6]))
def test_is_the_polynomial_of_the_singular_values(out, into, steps, scale):
    x = scale * matrix(out, into)
    assert (newton_schulz(x, steps) - truth.orthogonal(x, steps)).abs().max() <= 1e-11


def test_five_steps_are_nearly_orthogonal_and_keep_the_singular_vectors():
    x = matrix(6, 40)
    u, s, v = torch.linalg.svd(newton_schulz(x), full_matrices=False)
    assert s.min() > 0.6 and s.max() < 1.3
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert (u @ v - left @ right).norm() < 1e-9


def test_batches_are_independent_and_tall_is_wide_transposed():
    x = matrix(2, 3, 7, 4)
    whole = newton_schulz(x)
    assert whole.shape == x.shape
    for i in range(2):
        for j in range(3):
            assert (whole[i, j] - newton_schulz(x[i, j])).abs().max() <= 1e-13
    assert (newton_schulz(x.mT).mT - whole).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_is_cast(dtype):
    x = matrix(5, 8).to(dtype)
    before = x.clone()
    y = newton_schulz(x)
    assert y.dtype == dtype and torch.equal(x, before)
    assert (y.double() - truth.orthogonal(x.double(), 5)).abs().max() <= {8: 1e-12, 4: 1e-5, 2: 0.1}[x.element_size()]


def test_the_dtype_of_the_products():
    assert orthogonal(matrix(3, 3), 2).dtype == torch.float64
    assert orthogonal(matrix(3, 3).float(), 2).dtype == torch.bfloat16
    assert orthogonal(matrix(3, 3), 2, torch.float32).dtype == torch.float32


def test_zero_stays_zero_beside_another_matrix():
    x = torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])
    y = newton_schulz(x)
    assert not y[0].any() and y.isfinite().all() and y[1].any()


def test_is_muons_iteration():
    muon = pytest.importorskip("torch.optim._muon")
    x = matrix(24, 16).float()
    theirs = muon._zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    assert (orthogonal(x, 5).float() - theirs).abs().max() <= 0.03
