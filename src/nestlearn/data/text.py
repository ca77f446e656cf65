"""Text as documents, split into what is trained on and what is held out by a hash that no machine can change.

A `Corpus` is all text of a run in memory. Its sizes and sha256 sums are those of the documents joined by `SEPARATOR`:
what `xz` would compress, and what the byte tokenizer turns into one token per byte.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nestlearn.data.formats import ROW_SUFFIXES, SUPPORTED, read_rows, text_suffix
from nestlearn.errors import UserError

SEPARATOR = b"\x1c"  # ASCII "file separator"
HELD_OUT_SHARE = 0.05  # of documents, by hash
HELD_OUT_TAIL = 0.10  # of bytes, when there is only one document

# Directories of the standard library that are tests, or tables rather than code that somebody wrote.
_LIBRARY_SKIP = {"test", "tests", "idle_test", "encodings", "pydoc_data"}
_LIBRARY_TABLES = {"html/entities.py"}


@dataclass(frozen=True, slots=True)
class Document:
    """One file, or one row of a file. ``name`` is its path below what was asked for, rows as ``file.jsonl#12``."""

    name: str
    data: bytes


class Documents(tuple[Document, ...]):
    """Documents in order, with the size and sum of their bytes joined by `SEPARATOR`."""

    def joined(self) -> builtins.bytes:
        return SEPARATOR.join(document.data for document in self)

    @cached_property
    def bytes(self) -> int:
        return sum(len(document.data) for document in self) + max(0, len(self) - 1) * len(SEPARATOR)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for index, document in enumerate(self):
            digest.update(SEPARATOR * (index > 0))
            digest.update(document.data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Two disjoint splits, neither empty. ``description`` says in a line where they come from."""

    train: Documents
    held_out: Documents
    description: str

    @property
    def summary(self) -> str:
        """Three lines to print: the description, and the documents, bytes and sha256 of each split."""
        return "\n".join([self.description, _summed("train", self.train), _summed("held out", self.held_out)])


def standard_library() -> Corpus:
    """The Python standard library of this interpreter: text that every machine has.

    Taken are the .py files of the modules that ``sys.stdlib_module_names`` lists, in the order of their paths; so
    installed packages and the files of one build (``_sysconfigdata``) are out. Left out as well are test suites, and
    tables (character encodings, HTML entities, the help topics of pydoc). Raises UserError where there is no source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_library_files(root))
    if not names:
        raise UserError(f"no standard library source in {root} (zipped or stripped?): give your own text with --text")
    documents = _documents((name, root / name) for name in names)
    return _split(documents, f"source of the Python {platform.python_version()} standard library")


def read_texts(paths: Sequence[Path | str]) -> Corpus:
    """The documents of files and, recursively and in sorted order, of folders (what starts with a dot is left out).

    A document is held out if the hash of its name is below `HELD_OUT_SHARE` (of its row number where all rows are of
    one file, so that the file can be renamed); where none is, the lowest hash. Of a single document the last
    `HELD_OUT_TAIL` is held out. Raises UserError for what cannot be read, and where there is no text at all.
    """
    files, where = _found(paths), _named(paths)
    return _split(_read(files, where), f"text of {where}", one_file=len(files) == 1)


def separate_texts(paths: Sequence[Path | str], held_out: Sequence[Path | str]) -> Corpus:
    """All of ``paths`` to train on and all of ``held_out``. UserError as in `read_texts`, and where they share text."""
    train, kept = _found(paths), _found(held_out)
    for file in kept.keys() & train.keys():
        raise UserError(f"{kept[file][1]} is to be trained on and to be held out: name it in one of the two")
    documents = _read(train, _named(paths)), _read(kept, _named(held_out))
    seen = {document.data for document in documents[0]}
    for document in documents[1]:
        if document.data in seen:
            raise UserError(f"the held-out document {document.name} is also trained on: take it out of one of the two")
    return Corpus(*documents, f"text of {_named(paths)}, held out {_named(held_out)}")


def first_bytes(corpus: Corpus, count: int) -> Corpus:
    """The same with at most the first ``count`` bytes of each held-out document, whole UTF-8 characters."""
    if all(len(document.data) <= count for document in corpus.held_out):
        return corpus
    kept = Documents(Document(document.name, _first(document.data, count)) for document in corpus.held_out)
    return Corpus(corpus.train, kept, f"{corpus.description}, at most {count:,} bytes of each held-out document")


def _first(data: bytes, count: int) -> bytes:
    while 0 < count < len(data) and data[count] & 0xC0 == 0x80:  # never inside a UTF-8 character
        count -= 1
    return data[:count]


def _found(paths: Sequence[Path | str]) -> dict[Path, tuple[str, Path]]:
    """(name, file) of every file, by where it really is."""
    if not paths:
        raise UserError(f"no text was given: name at least one file or folder ({SUPPORTED})")
    files: dict[Path, tuple[str, Path]] = {}
    for path in map(Path, paths):
        for name, file in _files(path):
            files.setdefault(file.resolve(), (name, file))  # the same file twice would leak into the held-out text
    return files


def _named(paths: Sequence[Path | str]) -> str:
    return ", ".join(str(path) for path in paths)


def _read(files: dict[Path, tuple[str, Path]], where: str) -> Documents:
    documents = _documents(files.values())
    if not documents:
        raise UserError(f"{where}: holds no text at all (0 bytes): give a file or folder with some")
    return documents


def _library_files(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        at_top = Path(folder) == root
        folders[:] = [name for name in folders if name not in _LIBRARY_SKIP and (not at_top or _is_module(name))]
        modules = [name for name in files if name.endswith(".py") and (not at_top or _is_module(name[:-3]))]
        names = ((Path(folder) / name).relative_to(root).as_posix() for name in modules)
        yield from (name for name in names if name not in _LIBRARY_TABLES)


def _is_module(name: str) -> bool:
    return name in sys.stdlib_module_names


def _files(path: Path) -> list[tuple[str, Path]]:
    """(name, file) of every text file at or under ``path``; a file named by the user must have text."""
    if not os.path.exists(path):  # unlike Path.exists, also False behind a closed door
        raise UserError(f"{path}: no such file or folder, or no permission to see it: check the path")
    if path.is_dir():
        found = [(file.relative_to(path).as_posix(), file) for file in _walk(path) if text_suffix(file)]
        if not found:
            raise UserError(f"{path}: holds no file with a supported suffix ({SUPPORTED}): give another folder")
        return sorted(found)
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes): give a file with text")
    return [(path.name, path)]


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}): check its permissions") from error

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where) / name for name in files if not name.startswith("."))


def _documents(files: Iterable[tuple[str, Path]]) -> Documents:
    return Documents(document for name, file in files for document in _rows(name, file))


def _rows(name: str, file: Path) -> Iterator[Document]:
    is_table = text_suffix(file) in ROW_SUFFIXES
    for index, row in enumerate(read_rows(file)):
        yield Document(f"{name}#{index}" if is_table else name, row)


def _split(documents: Documents, description: str, one_file: bool = False) -> Corpus:
    if len(documents) == 1:
        return _split_tail(documents[0], description)
    hashes = [_hash(str(index) if one_file else document.name) for index, document in enumerate(documents)]
    bound = max(HELD_OUT_SHARE, min(hashes))
    held_out = [value <= bound for value in hashes]
    if all(held_out):  # two files may share a name, or all rows be few and low: something must be trained on
        held_out = [index == 0 for index in range(len(documents))]
    pairs = list(zip(documents, held_out, strict=True))
    train = Documents(document for document, held in pairs if not held)
    return Corpus(train, Documents(document for document, held in pairs if held), description)


def _split_tail(document: Document, description: str) -> Corpus:
    name, data = document.name, document.data
    cut = len(data) - max(1, int(len(data) * HELD_OUT_TAIL))
    cut = len(_first(data, cut))
    if cut == 0:
        raise UserError(
            f"{name}: has {len(data)} bytes, too few to train on some and hold out the rest: give more text"
        )
    return Corpus(Documents([Document(name, data[:cut])]), Documents([Document(name, data[cut:])]), description)


def _hash(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _summed(name: str, documents: Documents) -> str:
    noun = "document" if len(documents) == 1 else "documents"
    return f"{name}: {len(documents):,} {noun}, {documents.bytes:,} bytes, sha256 {documents.sha256}"
