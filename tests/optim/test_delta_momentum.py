"""What delta momentum is for, beyond the contract: it forgets where the gradient points and nowhere else."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.optim import DeltaMomentum
from nestlearn.rules.delta_momentum import delta_momentum, normalized, read_back
from tests.contracts.optimizer import gap, gradient, parameters


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_orthogonal_to_the_gradient_is_only_decayed():
    """m in the row space of the gradient is read back and removed, the rest keeps its α."""
    u, v = torch.linalg.qr(random(5, 5))[0], torch.linalg.qr(random(6, 6, seed=1))[0]
    g = torch.outer(u[:, 0], v[:, 0])
    inside, outside = torch.outer(u[:, 1], v[:, 0]), torch.outer(u[:, 1], v[:, 1])
    after = delta_momentum((inside + outside)[None], normalized(g[None]), 0 * g[None], 0.9, 1.0)[0]
    assert torch.allclose(after, (0.9 - 1) * inside + 0.9 * outside, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_both_orders_of_the_product_are_m_kt_k(shape):
    m, k = random(2, *shape), random(2, *shape, seed=1)
    assert torch.allclose(read_back(m, k), torch.einsum("noi,npi,npj->noj", m, k, k), atol=1e-12)


def test_a_normalised_key_is_bounded_for_every_scale_of_gradient():
    """The literal key diverges under a large gradient, the default does not."""
    norms = {}
    for key in ("normalized", "literal"):
        (p,) = parameters([(4, 5)])
        optimizer = DeltaMomentum([p], lr=1e-3, key=key)
        for n in range(30):
            p.grad = 100 * gradient(n, 0, p)
            optimizer.step()
        norms[key] = optimizer.state[p]["momentum"].norm().item()
    assert norms["normalized"] < 10 and not norms["literal"] < 1e6


def test_a_tensor_of_values_multiplies_as_a_matrix_or_entry_by_entry():
    matrix, entries, rows = random(4, 4), random(4, 5), random(4, 1)
    for values, expected in (
        (matrix, lambda g: matrix @ g), (entries, lambda g: entries * g), (rows, lambda g: rows * g),
        (random(5, 5, seed=3)[:4, :5], lambda g: random(5, 5, seed=3)[:4, :5] * g),
    ):  # fmt: skip
        runs = []
        for given in (values, expected):
            (p,) = parameters([(4, 5)])
            optimizer = DeltaMomentum([p], lr=0.01, values=given)
            for n in range(5):
                p.grad = gradient(n, 0, p)
                optimizer.step()
            runs.append([p])
        assert gap(*runs) <= 1e-14
    (p,) = parameters([(4, 5)])
    p.grad = gradient(0, 0, p)
    with pytest.raises(UserError, match=r"parameter 0 of group 0: values give a P g of shape \(4, 5\)"):
        DeltaMomentum([p], lr=0.01, values=lambda g: g[0]).step()


def test_a_function_is_not_saved_and_not_lost():
    (p,) = parameters([(4, 5)])
    optimizer = DeltaMomentum([p], lr=0.01, values=torch.tanh)
    saved = optimizer.state_dict()
    assert "values" not in saved["param_groups"][0]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["values"] is torch.tanh


def test_bfloat16_products_are_close_and_not_the_default():
    runs = {}
    for dtype in (None, torch.float64, torch.bfloat16):
        ps = parameters([(16, 24)])
        optimizer = DeltaMomentum(ps, lr=0.01, matmul_dtype=dtype)
        for n in range(10):
            ps[0].grad = gradient(n, 0, ps[0])
            optimizer.step()
        runs[dtype] = ps
    assert gap(runs[None], runs[torch.float64]) == 0
    assert 1e-8 < gap(runs[None], runs[torch.bfloat16]) < 1e-4
