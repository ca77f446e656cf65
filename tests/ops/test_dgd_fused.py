"""The fused writes are the plain ones: results and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.ops.dgd_chunk import Write, chunk_decays, chunk_end, chunk_read, chunk_share, chunk_write, dgd_gain
from nestlearn.ops.dgd_fused import fused_write

NAMES = ("inputs", "errors", "rate", "log_retain", "state", "momentum", "query")
B, G, H, IN, OUT = 2, 3, 2, 5, 4


def case(size: int, shared: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Leaves: X, G, η over four decades, log α, S₀, m₀, Q. Retention is shared by the stack, X where ``shared``."""
    generator = torch.Generator().manual_seed(size)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    leaves = [
        random(B, 1 if shared else G, H, size, IN),
        random(B, G, H, size, OUT),
        10 ** (4 * uniform(B, G, H, size) - 2),
        -uniform(B, 1, H, size),
        random(B, G, H, OUT, IN),
        0.3 * random(B, G, H, OUT, IN),
        random(B, 1, H, size, IN),
    ]
    return [t.to(dtype).requires_grad_() for t in leaves]


def run(leaves: list[Tensor], mu: float, fused: bool, anchored: bool = False) -> tuple[Tensor, ...]:
    """Reads, S and m after one chunk: every use that is made of a chunk's writes."""
    inputs, errors, rate, log_retain, state, momentum, query = leaves
    decays, gain = chunk_decays(log_retain, mu), dgd_gain(inputs, rate)
    carried, moved = inputs @ state.mT, inputs @ momentum.mT if mu else None
    towards = inputs @ (state.mT.roll(1, -1)) if anchored else None
    if fused:
        write = fused_write(inputs, errors, gain, chunk_share(carried, moved, towards, decays), decays)
    else:
        write = chunk_write(inputs, -gain[..., None] * errors, gain, carried, moved, decays, anchored=towards)
    reads = chunk_read(write, query, query @ state.mT, query @ momentum.mT if mu else None, decays)
    return reads, *chunk_end(write, state, momentum, decays)


def weighted(results) -> Tensor:
    return sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)


@pytest.mark.parametrize("anchored", [False, True], ids=["to zero", "to an anchor"])
@pytest.mark.parametrize("shared", [False, True], ids=["own inputs", "shared inputs"])
@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_results_and_all_gradients_equal_the_plain_writes(size, mu, shared, anchored):
    found = []
    for fused in (False, True):
        leaves = case(size, shared)
        results = run(leaves, mu, fused, anchored)
        found.append((results, torch.autograd.grad(weighted(results), leaves, materialize_grads=True)))
    (results, gradients), (fused_results, fused_gradients) = found
    for name, ours, right in zip(("reads", "state", "momentum"), fused_results, results, strict=True):
        assert (ours - right).norm() <= 1e-11 * (1 + right.norm()), name
    for name, ours, right in zip(NAMES, fused_gradients, gradients, strict=True):
        assert (ours - right).norm() <= 1e-11 * (1 + right.norm()), name
    assert all(g.any() for name, g in zip(NAMES, gradients, strict=True) if mu or name != "momentum")


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(mu, shared):
    leaves = [t.detach()[:1, :, :1].clone().requires_grad_() for t in case(3, shared)]
    assert torch.autograd.gradcheck(lambda *given: run(list(given), mu, True), leaves)


@pytest.mark.parametrize("mu", [0.0, 0.6])
def test_both_twins_hold_the_same_writes(mu):
    """In both twins e xᵀ and u xᵀ are the same writes, whichever side holds the gain."""
    inputs, errors, rate, log_retain, state, momentum, _ = case(20)
    decays, gain = chunk_decays(log_retain, mu), dgd_gain(inputs, rate)
    carried, moved = inputs @ state.mT, inputs @ momentum.mT if mu else None
    plain = chunk_write(inputs, -gain[..., None] * errors, gain, carried, moved, decays)
    fused = fused_write(inputs, errors, gain, chunk_share(carried, moved, None, decays), decays)

    def outer(write: Write, values: Tensor) -> Tensor:
        return values[..., :, None] * write.inputs[..., None, :]

    assert plain.erased is not None and fused.erased is not None
    assert torch.allclose(outer(fused, fused.erased), outer(plain, plain.erased), atol=1e-11)
    assert torch.allclose(outer(fused, fused.updates), outer(plain, plain.updates), atol=1e-11)


@pytest.mark.parametrize("mu", [0.0, 0.6])
@pytest.mark.parametrize("distinct", [1, 3])
def test_repeated_keys_at_gain_near_1_stay_accurate_in_float32(mu, distinct):
    """The same few unit keys again and again, each write replacing what is stored: the system is as far from I as DGD
    can take it. Reads, state and gradients within 1e-4 of float64."""
    found = []
    for dtype in (torch.float64, torch.float32):
        leaves = [t.detach() for t in case(64)]
        keys = torch.nn.functional.normalize(leaves[0], dim=-1)[..., torch.arange(64) % distinct, :]
        leaves[0], leaves[2], leaves[3] = keys, torch.full_like(leaves[2], 1e4), torch.full_like(leaves[3], -1e-4)
        leaves = [t.to(dtype).requires_grad_() for t in leaves]
        results = run(leaves, mu, fused=True)
        found.append([*results, *torch.autograd.grad(weighted(results), leaves, materialize_grads=True)])
    names = ("reads", "state after", "momentum after", *NAMES)
    for name, right, ours in zip(names, *found, strict=True):
        # the rate's gradient is 1e-8 of the others where the gain is saturated: measured against what it is made from
        scale = right.norm() if name != "rate" else right.norm() + 1e-4 * found[0][4].norm()
        assert (ours.double() - right).norm() <= 1e-4 * scale + 1e-12, name


def test_second_derivatives_are_refused():
    leaves = case(4)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(weighted(run(leaves, 0.6, True)), leaves[:1], create_graph=True)
