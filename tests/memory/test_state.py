"""The typed state: moving, joining, saving; and one clear line for what cannot be joined or read."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory.state import State


@dataclass(frozen=True)
class Inner(State):
    weight: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Outer(State):
    layers: tuple[State, ...]
    tail: Tensor | None
    name: str


def outer(batch: int = 3, name: str = "a") -> Outer:
    shared = torch.randn(batch, 2)
    inner = Inner(shared, torch.arange(batch))
    return Outer((inner, Inner(shared[:, :1].expand(-1, 4), torch.arange(batch))), None, name)


def equal(first: State, second: State) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


def test_saves_shared_and_expanded_tensors_bit_for_bit(tmp_path):
    state = outer()
    state.save(tmp_path / "s")
    loaded = Outer.load(tmp_path / "s")
    assert equal(state, loaded) and loaded.name == "a" and loaded.tail is None


def test_counters_stay_whole_numbers():
    moved = outer().to(torch.float64)
    assert [t.dtype for t in moved.tensors()] == [torch.float64, torch.int64] * 2


def test_rows_and_joining_are_inverse():
    state = outer()
    assert equal(State.cat([state[0], state[1:]]), state)
    assert equal(state[torch.tensor([True, False, True])], state[[0, 2]])
    assert equal(state[-1], state[2:])


def test_states_cannot_be_changed():
    with pytest.raises(AttributeError):
        outer().name = "b"  # pyright: ignore[reportAttributeAccessIssue]


def test_what_cannot_be_joined_is_named():
    with pytest.raises(UserError, match="differ in a constant"):
        State.cat([outer(), outer(name="b")])
    with pytest.raises(UserError, match="must be of one kind"):
        State.cat([outer(), outer().layers[0]])


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(UserError, match="cannot be read"):
        Outer.load(path)
    outer().save(path)
    with pytest.raises(UserError, match="holds a Outer, expected a Inner"):
        Inner.load(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cannot be read"):
        Outer.load(path)
    path.write_bytes(b"not a state at all")
    with pytest.raises(UserError, match="cannot be read"):
        Outer.load(path)
