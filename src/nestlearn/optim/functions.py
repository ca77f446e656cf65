"""Functions as hyperparameters: a parameter group, and so every checkpoint, holds their names and not their code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nestlearn.errors import UserError
from nestlearn.optim.checks import check_choice


class Functions:
    """For each option the ready-made functions by name, and those that the user gave. An optimizer that loads a state
    with functions in it must have been given functions of the same names."""

    def __init__(self, ready: Mapping[str, Mapping[str, Callable[..., Any]]]) -> None:
        self._known = {option: dict(functions) for option, functions in ready.items()}
        self._ready = {option: frozenset(functions) for option, functions in ready.items()}

    def name(self, where: str, option: str, value: Any) -> str:
        """The name to keep in a group: of a ready-made function as it is, of a given one its own."""
        known = self._known[option]
        if not callable(value):
            check_choice(where, option, value, known)
            return value
        base = name = f"given:{getattr(value, '__qualname__', type(value).__name__)}"
        count = 1
        while known.get(name, value) is not value:
            count += 1
            name = f"{base}#{count}"
        known[name] = value
        return name

    def is_given(self, option: str, name: str) -> bool:
        return name not in self._ready[option]

    def __call__(self, option: str, name: str) -> Callable[..., Any]:
        if name not in self._known[option]:
            raise UserError(f"{option} is {name!r}, as the loaded state says: give that function to the new optimizer")
        return self._known[option][name]
