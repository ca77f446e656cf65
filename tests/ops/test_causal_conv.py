"""The causal convolution against torch's, its gradients against finite differences and torch's, twice."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nestlearn.ops.causal_conv import causal_conv


def case(width: int, length: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    padded = torch.randn(2, width - 1 + length, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, 3, generator=generator, dtype=torch.float64)
    return padded.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def by_torch(padded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.conv1d(padded.mT, weight.T[:, None], groups=padded.shape[-1]).mT


@pytest.mark.parametrize("width, length", [(1, 1), (1, 5), (4, 1), (4, 9)])
def test_values_and_gradients_are_torchs(width, length):
    inputs = case(width, length)
    ours, theirs = causal_conv(*inputs), by_torch(*inputs)
    assert (ours - theirs).abs().max() <= 1e-13
    weights = torch.linspace(-1, 2, ours.numel(), dtype=ours.dtype).view_as(ours)
    for own, right in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(theirs, inputs, weights), strict=True
    ):
        assert (own - right).abs().max() <= 1e-12


def test_first_and_second_derivatives():
    inputs = case(4, 6)
    assert torch.autograd.gradcheck(causal_conv, inputs)
    assert torch.autograd.gradgradcheck(causal_conv, inputs)


def test_bfloat16_stays_bfloat16():
    inputs = case(4, 6, torch.bfloat16)
    out = causal_conv(*inputs)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and all(t.grad is not None and t.grad.dtype == t.dtype for t in inputs)
