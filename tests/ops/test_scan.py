"""A recurrence that recomputes in its backward pass has the gradients of one that stores."""

from __future__ import annotations

import pytest
import torch

from nestlearn.ops.scan import scan

PIECES = {"even": (3, 3, 3), "uneven": (4, 1, 2, 2), "one": (9,), "single tokens": (1,) * 9}


def step(carry, inputs, constants):
    """Two carries, two inputs and two constants, mixed; the second carry is written and never read."""
    (state, _), (x, y), (matrix, scale) = carry, inputs, constants
    output = torch.tanh(x @ matrix + state[:, None]) * y
    return output, ((scale * state + output.sum(1)).sin(), output.mean(1))


def leaves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4), (2, 4), (2, 9, 4), (2, 9, 4), (4, 4), (4,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def run(tensors, lengths, recompute):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    pieces = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    output, carry = scan(step, tuple(tensors[:2]), tuple(tensors[2:4]), tuple(tensors[4:]), pieces, recompute=recompute)
    return output, *carry


def weighted(results) -> torch.Tensor:
    return sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in results)


@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
def test_recomputing_changes_neither_values_nor_gradients(lengths):
    found = []
    for recompute in (False, True):
        tensors = leaves()
        results = run(tensors, lengths, recompute)
        found.append((results, torch.autograd.grad(weighted(results), tensors, materialize_grads=True)))
    for stored, recomputed in zip(*found, strict=True):
        for ours, right in zip(recomputed, stored, strict=True):
            assert torch.allclose(ours, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize("wanted", ["output", "state", "last"])
def test_gradients_of_a_part_of_the_results(wanted):
    index = ["output", "state", "last"].index(wanted)
    found = []
    for recompute in (False, True):
        tensors = leaves()
        part = run(tensors, (4, 5), recompute)[index]
        found.append(torch.autograd.grad(part.square().sum(), tensors, materialize_grads=True))
    for ours, right in zip(*found, strict=True):
        assert torch.allclose(ours, right, rtol=0, atol=1e-13)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *tensors: run(tensors, (4, 5), True), leaves())


def test_only_the_storing_pass_has_second_derivatives():
    assert torch.autograd.gradgradcheck(lambda *tensors: run(tensors, (4, 5), False)[0], leaves())
    tensors = leaves()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(run(tensors, (4, 5), True)[0].square().sum(), tensors[:1], create_graph=True)


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        output, *_ = run(leaves(), (4, 5), True)
    assert output.grad_fn is None
