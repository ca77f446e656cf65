"""What a model remembers of a stream: typed, immutable, passed in and returned, never kept on a module.

A state is a frozen dataclass whose fields are tensors (batch first), other states, tuples of these, None, or plain
constants. Everything here works on that tree: detach, move, select rows, concatenate, save, load. Because states are
immutable a fork is free: continue twice from the same state.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from nestlearn.errors import UserError

_FORMAT = "nestlearn-state-1"


@dataclass(frozen=True)
class State:
    """Base class of every typed state. All tensors carry the batch in their first dimension."""

    _known: ClassVar[dict[str, type[State]]] = {}

    def __init_subclass__(cls) -> None:
        State._known[cls.__name__] = cls

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with every tensor changed."""
        return dataclasses.replace(
            self, **{f.name: _map(getattr(self, f.name), change) for f in dataclasses.fields(self)}
        )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the state, in order."""
        for field in dataclasses.fields(self):
            yield from _leaves(getattr(self, field.name))

    def detach(self) -> Self:
        """Cut from the autograd graph (truncated backpropagation)."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move as ``Tensor.to``; a floating dtype changes floating tensors only, counters stay whole numbers."""
        dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
        if dtype is None:
            return self.map(lambda t: t.to(*args, **kwargs))
        device = kwargs.get("device", next((a for a in args if not isinstance(a, torch.dtype)), None))
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else t.dtype))

    def clone(self) -> Self:
        """A copy that shares no memory with this state."""
        return self.map(Tensor.clone)

    def __getitem__(self, rows: Any) -> Self:
        """Select batch rows: a slice, a list or tensor of indices or booleans; an int keeps the batch dimension."""
        if isinstance(rows, int):
            rows = [rows]
        if isinstance(rows, list | tuple | range):
            rows = torch.as_tensor(list(rows))
        return self.map(lambda t: t[rows.to(t.device) if isinstance(rows, Tensor) else rows])

    @staticmethod
    def cat(states: Sequence[Any]) -> Any:
        """One batch from the rows of several states of one kind."""
        return _zip(list(states))

    @classmethod
    def _join(cls, states: Sequence[Any]) -> Any:
        """`cat` for this kind of state, whatever it is nested in: field by field."""
        fields = [f.name for f in dataclasses.fields(cls)]
        return dataclasses.replace(states[0], **{f: _zip([getattr(s, f) for s in states]) for f in fields})

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file; `load` gives back equal bits."""
        from safetensors.torch import save_file

        copies = (t.detach().cpu().clone(memory_format=torch.contiguous_format) for t in self.tensors())
        tensors = {str(i): t for i, t in enumerate(copies)}  # copies, because fields of a state may share memory
        numbers = iter(range(len(tensors)))
        skeleton = json.dumps(_describe(self, numbers))
        save_file(tensors, str(path), metadata={"format": _FORMAT, "skeleton": skeleton})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises UserError for a missing, truncated or foreign file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as a saved state ({error}): save the stream again") from error
        if metadata.get("format") != _FORMAT:
            raise UserError(
                f"{path} has the format {metadata.get('format')!r}, must be {_FORMAT!r}: not a state of this version"
            )
        state = _rebuild(json.loads(metadata["skeleton"]), tensors)
        if not isinstance(state, cls):
            raise UserError(f"{path} holds a {type(state).__name__}, expected a {cls.__name__}")
        return state


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, State):
        return value.map(change)
    if isinstance(value, tuple):
        return tuple(_map(item, change) for item in value)
    return value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, State):
        yield from value.tensors()
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)


def _zip(values: list[Any]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise UserError(
            f"cannot join states of the kinds {[type(v).__name__ for v in values]}: they must be of one kind"
        )
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, State):
        return type(first)._join(values)
    if isinstance(first, tuple):
        return tuple(_zip(list(items)) for items in zip(*values, strict=True))
    if any(value != first for value in values):
        raise UserError(f"cannot join states that differ in a constant: {values}")
    return first


def _describe(value: Any, numbers: Iterator[int]) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": next(numbers)}
    if isinstance(value, State):
        fields = {f.name: _describe(getattr(value, f.name), numbers) for f in dataclasses.fields(value)}
        return {"state": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return {"tuple": [_describe(item, numbers) for item in value]}
    return {"value": value}


def _rebuild(form: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in form:
        return tensors[str(form["tensor"])]
    if "tuple" in form:
        return tuple(_rebuild(item, tensors) for item in form["tuple"])
    if "state" in form:
        if form["state"] not in State._known:
            raise UserError(f"unknown kind of state {form['state']!r}: import the module that defines it first")
        return State._known[form["state"]](**{k: _rebuild(v, tensors) for k, v in form["fields"].items()})
    return form["value"]
