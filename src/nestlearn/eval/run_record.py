"""The record of one training run, `RUN/run.json`: written by `train/`, read by `eval/report.py`.

A field that defaults to None is one a run may honestly not have; the report then says that it is absent. Units: time in
seconds, losses in bits, positions and budgets in tokens, sizes in bytes.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError

FILE_NAME = "run.json"
METRICS_FILE_NAME = "metrics.jsonl"
RATE_ZERO_FOLDER = "rate-zero"


@dataclass(frozen=True)
class CorpusRecord:
    """What was read: sizes in bytes, sha256 of the concatenated documents of each split."""

    description: str
    train_bytes: int
    train_sha256: str
    held_out_bytes: int
    held_out_sha256: str


@dataclass(frozen=True)
class Evaluation:
    """A model on held-out text. `by_position[i]`: mean loss of the i-th target of a sequence, in bits per token."""

    bits_per_byte: float
    tokens: int
    bytes: int
    by_position: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Results:
    """The numbers of the headline. `xz` and `bz2`: bits per byte of the bytes that `held_out` was measured on."""

    held_out: Evaluation | None = None
    xz: float | None = None
    bz2: float | None = None
    rate_zero: Evaluation | None = None  # the same model, budget and seed, with every memory's rate at 0


@dataclass(frozen=True)
class Sample:
    """One continuation of a held-out prompt; bytes that are not UTF-8 were replaced."""

    prompt: str
    text: str  # the continuation alone, without the prompt


@dataclass(frozen=True)
class LevelRecord:
    """One row of the table of levels; `period` in tokens, `math.inf` for what never changes ("inf" in the JSON)."""

    component: str
    period: float
    objective: str
    context: str
    parameters: int
    rule: str


@dataclass(frozen=True)
class RunRecord:
    """Everything the report needs that is neither a curve (metrics.jsonl) nor a weight (checkpoint-*)."""

    name: str  # the preset, e.g. "tiny-cpu"
    command: str  # the command line that repeats this run
    seed: int
    parameters: int
    tokens: int  # tokens trained on
    seconds: float  # wall-clock time of this run's training alone
    sequence_length: int
    tokenizer: str  # Tokenizer.name
    date: str  # ISO 8601, UTC
    hardware: str  # e.g. "2 x Intel Xeon ..., 2 threads"
    versions: dict[str, str]  # {"nestlearn": ..., "torch": ..., "python": ...}
    corpus: CorpusRecord
    commit: str | None = None
    results: Results = field(default_factory=Results)
    sample: Sample | None = None
    passage: list[int] | None = None  # token ids of a held-out passage of 300 to 600 tokens, for model.trace
    passage_source: str | None = None  # the document it was cut from
    levels: list[LevelRecord] = field(default_factory=list)  # of the model and of the optimizer
    config: dict[str, Any] = field(default_factory=dict)  # TrainConfig as JSON, printed as it is


def write_record(run: Path, record: RunRecord) -> Path:
    """Writes RUN/run.json whole or not at all, and returns its path."""
    path = run / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    raw = dataclasses.asdict(record)
    for row in raw["levels"]:
        row["period"] = "inf" if row["period"] == math.inf else row["period"]
    partial.write_text(json.dumps(raw, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def read_record(run: Path) -> RunRecord:
    """Reads RUN/run.json. UserError where it is missing, not JSON, or lacks a key."""
    path = run / FILE_NAME
    try:
        return _record(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{run} holds no {FILE_NAME}: a report needs the folder of a training run") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not the record of a training run ({error}): restore the file or train again"
        ) from None


def _record(raw: dict[str, Any]) -> RunRecord:
    parts = {
        "corpus": CorpusRecord(**raw["corpus"]),
        "results": _results(raw.get("results") or {}),
        "sample": Sample(**raw["sample"]) if raw.get("sample") else None,
        "levels": [LevelRecord(**row | {"period": float(row["period"])}) for row in raw.get("levels", [])],
    }
    return RunRecord(**raw | parts)


def _results(raw: dict[str, Any]) -> Results:
    held_out, rate_zero = (Evaluation(**raw[key]) if raw.get(key) else None for key in ("held_out", "rate_zero"))
    return Results(held_out, raw.get("xz"), raw.get("bz2"), rate_zero)
