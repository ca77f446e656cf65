"""Single tokens of a stream: the same numbers as the general path, whatever the settings, and a path to capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestlearn.memory.state import State
from nestlearn.ops.registry import forcing
from tests.memory.test_self_modifying import build, tokens

SETTINGS = [
    {"chunk": 4, "memory_chunk": 4},
    {"chunk": 4, "memory_chunk": 2, "momentum": 0.0, "objective": "dot"},
    {"chunk": 6, "memory_chunk": 2, "objective": "mix", "retain_to": "initial"},
    {"chunk": 4, "memory_chunk": 1, "retain_to": "initial", "adaptive": ("k", "q"), "objective": "dot"},
    {"chunk": 3, "memory_chunk": 3, "adaptive": (), "momentum": 0.0, "objective": "l2"},
    {"chunk": 4, "memory_chunk": 2, "adaptive": ("v", "alpha"), "retention": False, "target_norm": "none"},
    {"chunk": 4, "memory_chunk": 2, "dgd": False, "objective": "mix"},
    {"chunk": 4, "memory_chunk": 2, "read": "after", "adaptive": ("v", "q")},
    {"chunk": 1, "memory_chunk": 1, "dtype": torch.float32},
    {"chunk": 4, "memory_chunk": 4, "dtype": torch.float32, "objective": "mix", "retain_to": "initial"},
]


def memory_of(settings: dict) -> tuple[torch.nn.Module, torch.dtype]:
    """A memory of bounded writes, and its dtype."""
    dtype = settings.get("dtype", torch.float64)
    kept = {name: value for name, value in settings.items() if name != "dtype"}
    return build(**{"target_norm": "l2", "scale": 0.9, **kept}).to(dtype), dtype


def read_by_token(memory: torch.nn.Module, given: list[Tensor], state: State) -> tuple[Tensor, State]:
    """All tokens, one at a time."""
    out = []
    for t in range(given[0].shape[1]):
        x, query, value = (g[:, t : t + 1] for g in given)
        y, state = memory(x, query, state, value_input=value)
        out.append(y)
    return torch.cat(out, dim=1), state


def error(ours: Tensor, right: Tensor) -> float:
    """Relative to the right one."""
    return ((ours - right).norm() / (right.norm() + 1e-30)).item()


def staggered(memory: torch.nn.Module, given: list[Tensor]) -> State:
    """Rows that stand at different places of their chunks."""
    rows = range(len(given[0]))
    return State.cat([memory(*(g[r : r + 1, : 5 + r] for g in given[:2]))[1] for r in rows])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_as_the_general_path(settings):
    """Reads and every tensor of the state, rows at different places, over several chunks; the state given stays."""
    memory, dtype = memory_of(settings)
    given = [t.to(dtype) for t in tokens(3, 13)]
    with torch.no_grad():
        before = staggered(memory, given)
        copy = before.clone()
        y, state = read_by_token(memory, given, before)
        with forcing("reference"):
            right, after = read_by_token(memory, given, before)
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    assert error(y, right) <= limit
    for ours, theirs in zip(state.tensors(), after.tensors(), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert error(ours.double(), theirs.double()) <= limit
    assert all(torch.equal(a, b) for a, b in zip(before.tensors(), copy.tensors(), strict=True))


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_the_same_gradients(settings):
    memory, _ = memory_of(settings)
    given = tokens(2, 9)
    parameters = list(memory.parameters())

    def gradients() -> list[Tensor]:
        _, state = memory(*(g[:, :3] for g in given[:2]))
        y, end = read_by_token(memory, [g[:, 3:] for g in given], state)
        loss = y.square().sum() + end.w1.square().sum() + end.m2.sum()
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True))

    ours = gradients()
    with forcing("reference"):
        right = gradients()
    for a, b in zip(ours, right, strict=True):
        assert (a - b).norm() <= 1e-10 * (1 + b.norm())


def test_no_graph_breaks_and_no_new_graph_at_another_position():
    """One graph, whatever the position: nothing is looked up on the device, so a GPU can capture it."""
    memory, _ = memory_of({"chunk": 4, "memory_chunk": 2, "objective": "mix"})
    given = tokens(2, 12)
    graphs: list[int] = []

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(memory, backend=count, fullgraph=True, dynamic=False)
    with torch.no_grad():
        _, state = memory(*(g[:, :5] for g in given[:2]))
        right, _ = read_by_token(memory, [g[:, 5:] for g in given], state)
        ours, _ = read_by_token(step, [g[:, 5:] for g in given], state)
    assert error(ours, right) <= 1e-12
    assert len(graphs) == 1
