"""Checkpoints that survive: whole or not at all, checked by sha256, the last two kept.

RUN/checkpoint-<tokens>/ holds what ``save_pretrained`` and the tokenizer write, so that Hugging Face code can load it;
optimizer.pt (``Leveled.state_dict()``, open chunks included); training.json (config and progress); MANIFEST.json; and
stream.safetensors, the state of the batch's rows, where the run carries it from batch to batch.
It is written as checkpoint-<tokens>.partial, flushed to the disk file by file, and renamed: what has the name is whole.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nestlearn.data.batches import BatchState
from nestlearn.data.tokens import Tokenizer, load_tokenizer
from nestlearn.errors import UserError
from nestlearn.memory.state import State
from nestlearn.models.quiet import no_progress_bars
from nestlearn.train.config import TrainConfig

MANIFEST, TRAINING, OPTIMIZER, STREAM = "MANIFEST.json", "training.json", "optimizer.pt", "stream.safetensors"
KEPT = 2
_NAME = re.compile(r"checkpoint-\d+")


@dataclass
class Progress:
    """Where a run stands, besides its weights and its optimizer. All that a resumed run needs to go on bit for bit."""

    batches: BatchState
    tokens: int = 0
    seconds: float = 0.0  # of training, over all resumptions
    sums: tuple[float, float] = (0.0, 0.0)  # of loss (nats per token) and gradient norm since the last line logged
    steps: int = 0  # in these sums
    history: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl
    stream: State | None = None  # of the rows of the batch, where it is carried to the next one

    def to_dict(self) -> dict[str, Any]:
        """All but the stream, as JSON can hold it."""
        raw = dataclasses.asdict(dataclasses.replace(self, stream=None))
        del raw["stream"]
        return raw


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. ``folder`` also holds the model and the tokenizer."""

    folder: Path
    config: TrainConfig
    progress: Progress
    corpus_sha256: str
    tokenizer_fingerprint: str

    def optimizer_state(self) -> dict[str, Any]:
        return torch.load(self.folder / OPTIMIZER, weights_only=True)

    def tokenizer(self, spec: str | None = None) -> Tokenizer:
        """The tokenizer it was trained with. UserError where ``spec``, if given, is another one."""
        tokenizer = load_tokenizer(str(self.folder) if spec is None else spec)
        if tokenizer.fingerprint() != self.tokenizer_fingerprint:
            raise UserError(
                f"tokenizer {spec or self.folder} is not the one that {self.folder} was trained with "
                f"(sha256 {tokenizer.fingerprint()[:12]}, not {self.tokenizer_fingerprint[:12]}): leave --tokenizer out"
            )
        return tokenizer


def save_checkpoint(
    run: Path, model: Any, optimizer: Any, tokenizer: Tokenizer, config: TrainConfig, progress: Progress, corpus: str
) -> Path:
    """RUN/checkpoint-<tokens>, after which only it and the one before it are kept. ``corpus`` is the text's sha256.

    Raises UserError on a full disk; the previous checkpoints are untouched then and nothing half-written stays.
    """
    final = run / f"checkpoint-{progress.tokens:08d}"
    remove_partials(run)
    with _written_whole(final) as folder:
        with no_progress_bars():
            model.save_pretrained(folder)
        tokenizer.save(folder)
        with open(folder / OPTIMIZER, "wb") as file:
            torch.save(optimizer.state_dict(), file)
        training = {
            "config": config.to_dict(),
            "progress": progress.to_dict(),
            "corpus_sha256": corpus,
            "tokenizer_fingerprint": tokenizer.fingerprint(),
        }
        if progress.stream is not None:
            progress.stream.save(folder / STREAM)
        _write_json(folder / TRAINING, training)
        _write_json(folder / MANIFEST, {"files": {path.name: _sha256(path) for path in sorted(folder.iterdir())}})
    for old in checkpoints(run)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Checks every file against the manifest. UserError, naming the fault and the previous checkpoint, if damaged."""
    fault = _fault(folder)
    if fault:
        raise UserError(f"checkpoint {folder} is damaged ({fault}): {_previous(folder)}")
    raw = json.loads((folder / TRAINING).read_text())
    progress = raw["progress"]
    progress |= {"batches": BatchState(**progress["batches"]), "sums": tuple(progress["sums"])}
    progress["stream"] = _load_stream(folder / STREAM) if (folder / STREAM).is_file() else None
    config = TrainConfig.from_dict(raw["config"])
    return Checkpoint(folder, config, Progress(**progress), raw["corpus_sha256"], raw["tokenizer_fingerprint"])


def _load_stream(path: Path) -> State:
    """In memory of torch's own: mapped from a file, products may round otherwise."""
    import nestlearn.models.hf  # noqa: F401 - knows the kinds of state  # pyright: ignore[reportUnusedImport]

    return State.load(path).clone()


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is, or the newest one of a run's folder. UserError where there is none."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a checkpoint or the folder of a run")
    if (path / TRAINING).exists() or (path / MANIFEST).exists():
        return path
    found = checkpoints(path)
    if not found and _NAME.fullmatch(path.name):
        return path  # emptied by an accident: load_checkpoint says so, and offers the previous one
    if not found:
        raise UserError(f"{path} holds no checkpoint: give a folder that nestlearn train has written to")
    return found[-1]


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether they are whole is not looked at."""
    found = [path for path in run.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)] if run.is_dir() else []
    return sorted(found, key=_tokens)


def set_aside_later(folder: Path) -> list[Path]:
    """Renames the checkpoints that are later than the one a run resumes from, so that nothing is lost or mixed up."""
    moved = []
    for later in (path for path in checkpoints(folder.parent) if _tokens(path) > _tokens(folder)):
        number = next(n for n in range(1, 10**6) if not later.with_name(f"{later.name}.set-aside-{n}").exists())
        moved.append(later.rename(later.with_name(f"{later.name}.set-aside-{number}")))
    return moved


def remove_partials(run: Path) -> None:
    """What a killed process left while it was writing."""
    for left in run.glob("checkpoint-*.partial"):
        shutil.rmtree(left)


def is_disk_full(error: BaseException | None) -> bool:
    """Also where a library has wrapped the error or, as safetensors does, turned it into text."""
    if error is None:
        return False
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "os error 28" in str(error) or is_disk_full(error.__cause__ or error.__context__)


@contextmanager
def _written_whole(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``final`` at the end or, on any error, is removed."""
    partial = final.with_name(final.name + ".partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(final.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_disk_full(error):
            raise
        kept = [path.name for path in checkpoints(final.parent)]
        intact, again = ", ".join(kept) or "no earlier ones", "the same again, in an empty folder"
        again = f"nestlearn train --resume {final.parent}" if kept else again
        raise UserError(
            f"the disk is full: {final} was not saved, intact are {intact} in {final.parent}: "
            f"free some space, then {again}"
        ) from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    for name in [*files, TRAINING, OPTIMIZER]:
        if name not in files or not (folder / name).is_file():
            return f"{name} is missing"
        if _sha256(folder / name) != files[name]:
            return f"{name} does not have the sha256 that {MANIFEST} says"
    return None


def _previous(folder: Path) -> str:
    earlier = [path for path in checkpoints(folder.parent) if _tokens(path) < _tokens(folder) and not _fault(path)]
    if not earlier:
        return "there is no earlier one, train again"
    return f"the one before it is whole, use {earlier[-1]}"


def _tokens(folder: Path) -> int:
    """The number in a checkpoint's name; a checkpoint under another name counts as the newest."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else 2**63


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
