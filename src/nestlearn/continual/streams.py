"""Labelled texts as a stream of tasks that bring new classes each (class-incremental learning)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from nestlearn.continual.labelled import Row
from nestlearn.errors import UserError

PARTS = ("train", "valid", "test")
HELD_OUT = {"test": 0.2, "valid": 0.1}  # of a class that comes without that part
DEFAULT_TASKS = 10


@dataclass(frozen=True)
class Labelled:
    """Texts and the numbers of their classes, equally long."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Task:
    """The classes (numbers) that one task brings, and its texts."""

    name: str
    classes: tuple[int, ...]
    train: Labelled
    valid: Labelled
    test: Labelled


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they come; ``classes`` are the names of all classes, by number."""

    classes: tuple[str, ...]
    tasks: tuple[Task, ...]


def class_incremental(
    rows: Sequence[Row],
    *,
    seed: int,
    tasks: int | None = None,
    train: int | None = None,
    valid: int | None = None,
    test: int | None = None,
) -> Stream:
    """A stream of tasks with classes of their own, in an order drawn by ``seed``.

    tasks               how many, where the rows name none: the classes are dealt out in the order they appear in;
                        None: the rows' own, or 10
    train, valid, test  at most so many texts of a class, drawn by ``seed``; None: all

    A class without test or validation texts gives up a part of its training texts for them, drawn anew by each seed.
    Raises UserError for fewer than 2 classes, more tasks than classes, and a class with too few texts.
    """
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row.label, []).append(row)
    names = tuple(by_class)
    if len(names) < 2:
        raise UserError(f"the text has the classes {list(names)}: at least 2 are needed")
    draw = random.Random(seed)
    limits = {"train": train, "valid": valid, "test": test}
    split = {name: _split(name, own, limits, draw) for name, own in by_class.items()}
    groups = _groups(by_class, tasks)
    order = sorted(groups)
    draw.shuffle(order)
    number = {name: n for n, name in enumerate(names)}
    return Stream(names, tuple(_task(name, groups[name], number, split) for name in order))


def _groups(by_class: dict[str, list[Row]], tasks: int | None) -> dict[str, list[str]]:
    """The classes of each task: those the rows name, else equal shares in the order of appearance."""
    own = {name: rows[0].task for name, rows in by_class.items()}
    if tasks is None and all(task is not None for task in own.values()):
        groups: dict[str, list[str]] = {}
        for name, task in own.items():
            groups.setdefault(str(task), []).append(name)
        return groups
    count = min(DEFAULT_TASKS, len(by_class)) if tasks is None else tasks
    if not 1 <= count <= len(by_class):
        raise UserError(f"tasks is {count}: must lie within 1 and the {len(by_class)} classes")
    names = list(by_class)
    ends = [len(names) * i // count for i in range(count + 1)]
    return {f"task {i + 1:0{len(str(count))}}": names[ends[i] : ends[i + 1]] for i in range(count)}


def _split(name: str, rows: list[Row], limits: dict[str, int | None], draw: random.Random) -> dict[str, list[str]]:
    """The texts of one class by part."""
    texts = {part: [row.text for row in rows if (row.split or "train") == part] for part in PARTS}
    for part in PARTS:
        draw.shuffle(texts[part])
    for part, share in HELD_OUT.items():
        if not texts[part]:
            count = max(1, round(share * len(texts["train"])))
            texts[part], texts["train"] = texts["train"][:count], texts["train"][count:]
    if not texts["train"]:
        raise UserError(f"class {name!r} has {len(rows)} texts, too few to learn and to test it: leave it out")
    return {part: own[: limits[part]] for part, own in texts.items()}


def _task(name: str, classes: list[str], number: dict[str, int], split: dict[str, dict[str, list[str]]]) -> Task:
    parts = {}
    for part in PARTS:
        pairs = [(text, number[label]) for label in classes for text in split[label][part]]
        parts[part] = Labelled(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))
    return Task(name, tuple(number[label] for label in classes), parts["train"], parts["valid"], parts["test"])
