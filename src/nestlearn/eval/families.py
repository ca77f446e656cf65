"""Requests that begin alike, in families: what a family shares is read once, and its state forked for every row.

tokens read = Σ_families (shared + Σ_rows (length − shared))       instead of Σ_rows length
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 16  # tokens: what a family must share, since a fork is not free


@dataclass(frozen=True)
class Row:
    """Token ids, of which the last `scored` are to be predicted, each from all before it."""

    ids: tuple[int, ...]
    scored: int

    @property
    def free(self) -> int:
        """Tokens before the first one that predicts something: so many can be shared with other rows."""
        return len(self.ids) - self.scored - 1


@dataclass(frozen=True)
class Family:
    """Indices of rows whose first `shared` tokens are the same."""

    shared: int
    rows: tuple[int, ...]


def families(rows: Sequence[Row]) -> list[Family]:
    """Every row once: neighbours in lexicographic order join as long as that saves more tokens than it costs."""
    found: list[Family] = []
    members: list[int] = []
    shared = 0
    for index in sorted(range(len(rows)), key=lambda i: rows[i].ids):
        common = min(rows[index].free, _common(rows[members[0]].ids, rows[index].ids, shared)) if members else 0
        if members and common >= LEAST and len(members) * common > (len(members) - 1) * shared:
            members, shared = [*members, index], common
            continue
        found += _closed(members, shared)
        members, shared = [index], rows[index].free
    return [*found, *_closed(members, shared)]


def _closed(members: list[int], shared: int) -> list[Family]:
    """A row alone shares nothing."""
    return [Family(shared if len(members) > 1 else 0, tuple(members))] if members else []


def _common(a: tuple[int, ...], b: tuple[int, ...], limit: int) -> int:
    """The length of the common beginning, at most `limit`: by bisection, since equality of slices is fast."""
    low, high = 0, min(len(a), len(b), max(limit, 0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
