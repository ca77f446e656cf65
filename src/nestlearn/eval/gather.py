"""What a report shows, gathered from a run's folder; the newest checkpoint's model reads the passage."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nestlearn.eval.curves import Curve, read_curve
from nestlearn.eval.passage import Passage, passage
from nestlearn.eval.run_record import METRICS_FILE_NAME, RATE_ZERO_FOLDER, LevelRecord, RunRecord, read_record

Absent = str  # the reason why a part cannot be shown, one sentence


@dataclass(frozen=True, eq=False)
class Report:
    """All that a page shows."""

    record: RunRecord
    curve: Curve | None
    rate_zero: Curve | None
    passage: Passage | Absent


def gather(run: Path) -> Report:
    """Reads a run's folder; the model reads the passage."""
    record = read_record(run)
    checkpoint = newest_checkpoint(run)
    shown: Passage | Absent = f"there is no checkpoint-* folder in {run.name}, so no model could read a passage."
    if checkpoint is not None:
        shown, levels = _ask_model(checkpoint, record)
        record = replace(record, levels=record.levels or levels)
    rate_zero = read_curve(run / RATE_ZERO_FOLDER / METRICS_FILE_NAME)
    return Report(record, read_curve(run / METRICS_FILE_NAME), rate_zero, shown)


def newest_checkpoint(run: Path) -> Path | None:
    """The RUN/checkpoint-<tokens> of the largest number; folders still being written have another name."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _ask_model(checkpoint: Path, record: RunRecord) -> tuple[Passage | Absent, list[LevelRecord]]:
    """The traced passage, and the table of levels as the model alone knows it (without the optimizer)."""
    from nestlearn import HopeForCausalLM
    from nestlearn.data.tokens import load_tokenizer

    model = HopeForCausalLM.from_pretrained(checkpoint)
    model.eval()
    levels = [LevelRecord(**row._asdict()) for row in model.level_table()]
    if not record.passage or len(record.passage) < 2:
        return "run.json names no held-out passage (the run ended before its evaluation).", levels
    tokenizer = load_tokenizer(str(checkpoint))
    trace = model.trace(torch.tensor([record.passage]))
    pieces = [tokenizer.decode(np.array([token])) for token in record.passage]
    return passage(pieces, trace.loss, trace.signals, record.passage_source), levels
