"""The inner loop as one function with a backward pass by hand, in float32, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.memory.self_modifying import SelfModifyingConfig
from nestlearn.ops.registry import forcing
from tests.ops.memories import memory_of

BASE = SelfModifyingConfig(
    head_width=6, hidden_width=10, heads=2, chunk=32, rate_max=4.0, rate_start=0.4, slow_rate_scale=0.5,
    w1_scale=0.5, w2_scale=2.0,
)  # fmt: skip
TOKENS = 70


def outcome(config: SelfModifyingConfig, dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Output, end of the state and the gradients of every input and parameter."""
    memory = memory_of(config).to(dtype)
    generator = torch.Generator().manual_seed(11)
    shape = (2, tokens, config.heads, config.head_width)
    x, query, value, dy = (torch.randn(shape, generator=generator, dtype=torch.double).to(dtype) for _ in range(4))
    query = torch.nn.functional.normalize(query, dim=-1)
    given = [t.requires_grad_() for t in (x, query, value)]
    with forcing("torch" if config.recompute else "reference"):
        y, after = memory(x, query, None, value)
    ends = {"w1": after.w1, "w2": after.w2, "m1": after.m1, "m2": after.m2}
    ((y * dy).sum() + sum(t.square().sum() for t in ends.values())).backward()
    grads = {n: t.grad for n, t in zip(("dx", "dq", "dv"), given, strict=True)}
    grads |= {n: p.grad for n, p in memory.named_parameters()}
    return {n: t.detach().double() for n, t in {"y": y, **ends, **grads}.items() if t is not None}


@pytest.mark.parametrize("retain_to", ["zero", "initial"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("retention", [0.97, 1e-2, 1e-4])
def test_float32_equals_the_reference_at_any_retention(retention, momentum, retain_to):
    """The gradient of log α is all that is left of sums whose terms of order 1 cancel; they must be left out."""
    config = replace(BASE, retain_start=retention, momentum=momentum, retain_to=retain_to)
    right = outcome(replace(config, recompute=False), torch.float64)
    for name, found in outcome(config, torch.float32).items():
        assert (found - right[name]).norm() <= 1e-4 * right[name].norm(), name
