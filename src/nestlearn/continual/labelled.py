"""Labelled text from files, whatever its fields are called: .jsonl .json .csv .tsv, each also with .gz or .xz.

A row needs a text and a label; a task and a split are used where they are there. A folder is read whole: its files
together, and a JSON object {task: [labels]} among them gives the tasks (CLINC150's domains.json is one).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nestlearn.data.formats import COMPRESSIONS, decompressed
from nestlearn.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
TEXT = ("text", "sentence", "utterance", "query", "input", "content", "description", "question")
LABEL = ("label", "intent", "category", "class", "output", "target", "label_text", "labels")
TASK = ("task", "domain", "scenario")
SPLIT = ("split",)
SPLITS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid",
          "dev": "valid", "test": "test", "testing": "test"}  # fmt: skip
OUTSIDE = ("oos", "oos_train", "oos_val", "oos_test")  # CLINC150's queries that belong to no class


class Row(NamedTuple):
    """One labelled text; ``task`` and ``split`` are None where the file says nothing."""

    text: str
    label: str
    task: str | None
    split: str | None


def read_labelled(path: Path) -> list[Row]:
    """The rows of a file or folder, in order. Raises UserError for what is not labelled text."""
    path = Path(path)
    files = sorted(p for p in path.rglob("*") if _suffix(p)) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"{path} does not exist: name a labelled text file or a folder of them")
    rows: list[Row] = []
    tasks: dict[str, str] = {}
    for file in files:
        for value in _values(file):
            if path.is_dir() and _is_task_table(value):
                tasks |= {label: task for task, labels in value.items() for label in labels}
            else:
                rows += _rows(file, value)
    rows = [row for row in rows if row.label not in OUTSIDE and row.split not in OUTSIDE]
    if not rows:
        raise UserError(f"{path} holds no labelled text: give {' '.join(SUFFIXES)} with a text and a label in each row")
    return [row._replace(task=tasks.get(row.label, row.task)) for row in rows]


def _suffix(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES and path.name != "MANIFEST.json" else None


def _values(path: Path) -> Iterator[Any]:
    """What a file holds: one JSON value of a .json, or a list of all rows."""
    suffix = _suffix(path)
    if suffix is None:
        raise UserError(f"{path}: the suffix is not one of {' '.join(SUFFIXES)}, also with {' or '.join(COMPRESSIONS)}")
    try:
        text = decompressed(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    if suffix == ".json":
        yield _json(path, text)
    elif suffix == ".jsonl":
        yield [_json(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        yield _table(path, text, "\t" if suffix == ".tsv" else ",")


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error})") from None


def _table(path: Path, text: str, delimiter: str) -> list[dict[str, str]]:
    """Rows of a CSV by their names; without a header, the label is the column with the fewest values."""
    lines = [line for line in csv.reader(io.StringIO(text), delimiter=delimiter) if line]
    if not lines:
        return []
    width = len(lines[0])
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise UserError(f"{path}, row {number}: has {len(line)} columns, the first has {width}: quote the text")
    names = [name.strip().lower() for name in lines[0]]
    if not (set(names) & set(TEXT)) or not (set(names) & set(LABEL)):
        if width < 2:
            raise UserError(f"{path}: has one column, must have a text and a label")
        label = min(range(width), key=lambda c: len({line[c] for line in lines}))
        return [{"label": line[label], "text": " ".join(v for c, v in enumerate(line) if c != label)} for line in lines]
    return [dict(zip(names, line, strict=True)) for line in lines[1:]]


def _is_task_table(value: Any) -> bool:
    """{task: [label, …]}, and no table of splits."""
    lists = value.values() if isinstance(value, dict) and not set(value) & (set(SPLITS) | set(OUTSIDE)) else ()
    return bool(lists) and all(isinstance(v, list) and v and all(isinstance(w, str) for w in v) for v in lists)


def _rows(path: Path, value: Any, split: str | None = None) -> list[Row]:
    """The rows of one JSON value: a list of rows, or an object that holds such lists (CLINC150: one for each split)."""
    if isinstance(value, list):
        default = split or SPLITS.get(path.name.split(".")[0].split("_")[-1].lower())
        return [_row(f"{path}, row {number}", entry, default) for number, entry in enumerate(value, 1)]
    lists = {key: v for key, v in value.items() if isinstance(v, list) and v and isinstance(v[0], list | dict)} \
        if isinstance(value, dict) else {}  # fmt: skip
    if not lists:
        return []
    return [row for key, v in lists.items() for row in _rows(path, v, key if key in OUTSIDE else SPLITS.get(key))]


def _row(where: str, entry: Any, split: str | None) -> Row:
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"text": entry[0], "label": entry[1]}
    if not isinstance(entry, Mapping):
        raise UserError(f'{where}: is a {type(entry).__name__}, must be an object such as {{"text": …, "label": …}}')
    text, label = _field(where, entry, TEXT, "text"), _field(where, entry, LABEL, "label")
    task = next((str(entry[name]) for name in TASK if entry.get(name) is not None), None)
    own = next((str(entry[name]).lower() for name in SPLIT if entry.get(name)), None)
    return Row(text, label, task, split if own is None else SPLITS.get(own, own))


def _field(where: str, entry: Mapping[str, Any], names: Iterable[str], kind: str) -> str:
    for name in names:
        value = entry.get(name)
        if isinstance(value, str) and value.strip():
            return value.strip()
        if kind == "label" and isinstance(value, int):
            return str(value)
    raise UserError(f"{where}: has the fields {list(entry)}, none of which is its {kind}: name it {kind!r}")
