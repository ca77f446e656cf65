"""The pointwise functions and their hand-written backward passes, against finite differences and plain autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nestlearn.ops.pointwise import gated, l2norm, rms_norm, silu_and_slope

FUNCTIONS = {"l2norm": l2norm, "silu_and_slope": silu_and_slope}


def values(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def both(function, z: torch.Tensor):
    """(results, gradient) without and with the hand-written backward, every entry weighted differently."""
    for fused in (False, True):
        leaf = z.clone().requires_grad_()
        results = function(leaf, fused=fused)
        results = results if isinstance(results, tuple) else (results,)
        weighted = sum((r * torch.linspace(-1, 2, r.numel(), dtype=r.dtype).view(r.shape) ** n).sum()
                       for n, r in enumerate(results, start=1))  # fmt: skip
        yield results, torch.autograd.grad(weighted, leaf)[0]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name, fused):
    z = values(2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(partial(FUNCTIONS[name], fused=fused), (z,))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_fused_form_is_the_plain_one(name, scale):
    (plain, gradient), (fused, fused_gradient) = both(FUNCTIONS[name], values(3, 5, 7, scale=scale))
    for ours, right in zip(fused, plain, strict=True):
        assert (ours - right).abs().max() <= 1e-13 * (1 + right.abs().max())
    assert (fused_gradient - gradient).norm() <= 1e-11 * (1 + gradient.norm())


@pytest.mark.parametrize("fused", [False, True])
def test_zero_has_a_finite_direction_and_gradient(fused):
    z = torch.zeros(2, 4, requires_grad=True)
    y = l2norm(z, fused=fused)
    y.sum().backward()
    assert not y.any() and z.grad is not None and torch.allclose(z.grad, torch.full_like(z, 1e3))


def test_the_slope_is_the_derivative_of_silu():
    z = values(50, scale=4).requires_grad_()
    hidden, slope = silu_and_slope(z)
    assert torch.allclose(hidden, torch.nn.functional.silu(z), atol=1e-14)
    assert torch.allclose(slope, torch.autograd.grad(torch.nn.functional.silu(z).sum(), z)[0], atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivatives_are_refused_where_hand_written_and_exact_where_not(name):
    z = values(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], (z,))
    fused = FUNCTIONS[name](z, fused=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad((fused if name == "l2norm" else fused[0]).square().sum(), z, create_graph=True)


def test_gated_and_rms_norm_to_the_second_derivative():
    x, gate, weight = (values(*shape).requires_grad_() for shape in ((2, 3, 4), (2, 3, 4), (4,)))
    for function, given in (
        (gated, (gate, x)),
        (partial(rms_norm, eps=1e-3), (x, weight)),
        (lambda x: rms_norm(x, None, 1e-3), (x,)),
    ):
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_and_rms_norm_are_the_plain_ones(dtype):
    """Results bit for bit, gradients up to rounding."""
    x, gate, weight = (values(*shape, scale=3).to(dtype) for shape in ((5, 2, 8), (5, 2, 8), (8,)))
    plain_gated = lambda gate, x: torch.nn.functional.silu(gate) * x  # noqa: E731
    plain_norm = lambda x, weight: torch.nn.functional.rms_norm(x, (8,), weight, 1e-6)  # noqa: E731
    for ours, plain, given in (
        (gated, plain_gated, (gate, x)),
        (partial(rms_norm, eps=1e-6), plain_norm, (x, weight)),
    ):
        first, second = ([t.clone().requires_grad_() for t in given] for _ in range(2))
        out, right = ours(*first), plain(*second)
        assert torch.equal(out, right) and out.dtype == right.dtype
        for a, b in zip(torch.autograd.grad(out.sum(), first), torch.autograd.grad(right.sum(), second), strict=True):
            assert a.dtype == b.dtype and (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * (1 + b.norm())


def test_gated_and_rms_norm_under_functional_transforms():
    """Gradients row by row, as a meta-learner may ask for them."""
    x, gate, weight = values(4, 6), values(4, 6, scale=2), values(6)

    def loss(gate, x, weight):
        return rms_norm(gated(gate, x), weight, 1e-3).square().sum()

    rows = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, 0, None))(gate, x, weight)
    leaves = [t.clone().requires_grad_() for t in (gate, x)]
    for ours, right in zip(rows, torch.autograd.grad(loss(*leaves, weight), leaves), strict=True):
        assert (ours - right).abs().max() <= 1e-12
