"""What a report shows, gathered from a run's folder; the newest checkpoint's model reads the passage."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from nestlearn.data.tokens import load_tokenizer
from nestlearn.eval.curves import Curve, read_curve
from nestlearn.eval.passage import Passage, passage
from nestlearn.eval.run_record import METRICS_FILE_NAME, RATE_ZERO_FOLDER, RunRecord, read_record
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.models.quiet import no_progress_bars

Absent = str  # the reason why a part cannot be shown, one sentence


@dataclass(frozen=True, eq=False)
class Report:
    """All that a page shows."""

    record: RunRecord
    curve: Curve | None
    rate_zero: Curve | None
    passage: Passage | Absent


def gather(run: Path) -> Report:
    """Reads a run's folder; the newest checkpoint's model reads the passage that run.json names."""
    record = read_record(run)
    curve, rate_zero = (read_curve(run / folder / METRICS_FILE_NAME) for folder in (".", RATE_ZERO_FOLDER))
    return Report(record, curve, rate_zero, _trace(run, record))


def newest_checkpoint(run: Path) -> Path | None:
    """The RUN/checkpoint-<tokens> of the largest number; folders still being written have another name."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _trace(run: Path, record: RunRecord) -> Passage | Absent:
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return f"{run.name} holds no checkpoint, so no model could read the passage."
    if not record.passage or len(record.passage) < 2:
        return "run.json names no held-out passage."
    with no_progress_bars():
        model = HopeForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = load_tokenizer(str(checkpoint))
    trace = model.trace(torch.tensor([record.passage]))
    pieces = [tokenizer.decode([token]) for token in record.passage]
    return passage(pieces, trace.loss, trace.signals, record.passage_source)
