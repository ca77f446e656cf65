"""The lean backward pass (``recompute``) and the shortcut for rate 0 change the cost and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestlearn.memory import SelfModifyingMemory
from tests.memory.test_self_modifying import build, flat, scalar, tokens

CASES = [
    {"momentum": 0.0, "chunk": 8, "memory_chunk": 8},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 8},
    {"momentum": 0.0, "chunk": 8, "memory_chunk": 4},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 2, "retain_to": "initial"},
    {"momentum": 0.0, "chunk": 8, "memory_chunk": 8, "retain_to": "initial", "adaptive": ("k", "q")},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 8, "retain_to": "initial"},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 8, "retention": False, "adaptive": ("v",)},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 4, "dgd": False},
    {"momentum": 0.6, "chunk": 8, "memory_chunk": 1, "retention": False, "adaptive": ()},
]


def outcome(memory: SelfModifyingMemory, cut: int = 0) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input and parameter, over 29 tokens; chunk 8 leaves a tail of 5."""
    given = [t.requires_grad_() for t in tokens(2, 29)]
    state, outputs = None, []
    for begin, end in ((0, cut), (cut, 29)) if cut else ((0, 29),):
        x, query, value_input = (t[:, begin:end] for t in given)
        y, state = memory(x, query, state, value_input=value_input)
        outputs.append(y)
    assert state is not None
    results = flat(torch.cat(outputs, dim=1), state.weights, state.momenta)
    leaves = {"x": given[0], "query": given[1], "value_input": given[2], **dict(memory.named_parameters())}
    gradients = torch.autograd.grad(scalar(results), list(leaves.values()), materialize_grads=True)
    return results | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("cut", [0, 11])
@pytest.mark.parametrize("objective", ["dot", "l2", "mix"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_recomputing_changes_nothing(settings, objective, cut):
    """Outputs, state and all gradients; also over two pieces of a stream that is cut inside a chunk."""
    settings = {"objective": objective, "target_norm": "l2", "scale": 0.8, **settings}
    lean, storing = (outcome(build(**settings, recompute=r), cut) for r in (True, False))
    for name, right in storing.items():
        assert (lean[name] - right).norm() <= 1e-11 * (1 + right.norm()), name


def tiny(recompute: bool) -> SelfModifyingMemory:
    return build(heads=1, width=2, hidden=2, chunk=2, memory_chunk=1, target_norm="l2", recompute=recompute)


def read(memory: SelfModifyingMemory, x: Tensor) -> Tensor:
    return memory(x, tokens(1, 3, heads=1, width=2)[1])[0]


def test_second_derivatives_without_recomputing():
    x = tokens(1, 3, heads=1, width=2)[0].requires_grad_()
    memory = tiny(recompute=False)
    assert torch.autograd.gradgradcheck(lambda x: read(memory, x), (x,))


def test_second_derivatives_are_refused_with_recomputing():
    x = tokens(1, 3, heads=1, width=2)[0].requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(read(tiny(recompute=True), x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("cut", [0, 11])
@pytest.mark.parametrize("adaptive", [("k", "v", "eta", "alpha"), ("v", "q")], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_shortcut_for_rate_zero_equals_the_general_path(momentum, adaptive, cut, monkeypatch):
    """Rate 0 without retention is one product; the general path, at the same settings, comes to the same."""
    memory = build(rate_max=0.0, retention=False, momentum=momentum, adaptive=adaptive, target_norm="l2")
    assert memory.config.constant and not replace(memory.config, retention=True).constant
    short = outcome(memory, cut)
    monkeypatch.setattr(type(memory.config), "constant", False)
    general = outcome(memory, cut)
    for name, right in general.items():
        assert (short[name] - right).norm() <= 1e-11 * (1 + right.norm()), name


def test_the_shortcut_counts_tokens_as_the_general_path():
    memory = build(rate_max=0.0, retention=False)
    x, query, _ = tokens(2, 29)
    _, state = memory(x, query)
    assert state.seen.tolist() == [29, 29] and memory(x, query, state)[1].seen.tolist() == [58, 58]
