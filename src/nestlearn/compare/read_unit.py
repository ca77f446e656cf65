"""A trained model reads the held-out documents, each as one stream, and may learn from them; in a process of its own.

    bits/byte = − Σ log2 p(token | all of its document before it) / bytes        each document's first token is given

The levels are the model's own, with the unit's rate, each changing every ``period`` tokens or at its own period where
that is longer. Nothing learned from one document is there in another. Attention starts a new context every
sequence_length tokens, since it was trained on no more; every other state is carried through.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestlearn.compare.child import RESULT, UNIT, refuse
from nestlearn.compare.plan import write_json
from nestlearn.continual.online import OnlineLearner
from nestlearn.continual.online_level import OnlineLevel, online_levels
from nestlearn.data.tokens import Tokenizer, tokenize
from nestlearn.errors import UserError
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.models.quiet import no_progress_bars
from nestlearn.train.build import read_corpus
from nestlearn.train.checkpoint import find_checkpoint, load_checkpoint
from nestlearn.train.config import TrainConfig


def main(folder: Path) -> int:
    unit = json.loads((folder / UNIT).read_text())
    config = TrainConfig.from_dict(unit["config"])
    try:
        result = read_unit(config, folder.parent / unit["trained"], unit["rate"], unit["period"])
    except UserError as error:
        return refuse(folder, error)
    write_json(folder / RESULT, result)
    return 0


def read_unit(config: TrainConfig, trained: Path, rate: float, period: int) -> dict[str, Any]:
    """``bits_per_byte`` of all held-out documents together, and of each one's second half; None where not finite."""
    start = load_checkpoint(find_checkpoint(trained))
    tokenizer = start.tokenizer()
    with no_progress_bars():
        model = HopeForCausalLM.from_pretrained(start.folder)
    held_out = read_corpus(config.text, config.held_out, config.held_out_per_document).held_out
    found = documents(tokenize(held_out, tokenizer), tokenizer, config.held_out_tokens)
    begin = time.process_time()
    nats = read(model, found, levels_at(model, rate, period), config)
    seconds = time.process_time() - begin
    halves = [len(document) // 2 for document in found]
    late = [(n[h:], d[h:]) for n, d, h in zip(nats, found, halves, strict=True)]
    whole = [(n[1:], d[1:]) for n, d in zip(nats, found, strict=True)]
    return {
        "bits_per_byte": bits_per_byte(whole, tokenizer),
        "second_half": bits_per_byte(late, tokenizer),
        "documents": len(found),
        "tokens": sum(len(d) - 1 for d in found),
        "processor_seconds": round(seconds, 2),
    }


def levels_at(model: Any, rate: float, period: int) -> tuple[OnlineLevel, ...]:
    """The model's own levels; none faster than one change every ``period`` tokens."""
    return tuple(dataclasses.replace(l, period=max(l.period, period)) for l in online_levels(model, lr=rate))


def documents(tokens: np.ndarray, tokenizer: Tokenizer, most: int | None) -> list[np.ndarray]:
    """The held-out text (n,), at most ``most`` tokens of it, as documents of two tokens or more."""
    tokens = tokens[:most]
    pieces = np.split(tokens, np.flatnonzero(tokens == tokenizer.separator_id))
    pieces = [piece[1:] if len(piece) and piece[0] == tokenizer.separator_id else piece for piece in pieces]
    if not (found := [piece for piece in pieces if len(piece) > 1]):
        raise UserError("the held-out text has no document of two tokens: give --held-out longer ones")
    return found


def read(
    model: Any, found: Sequence[np.ndarray], levels: Sequence[OnlineLevel], config: TrainConfig
) -> list[np.ndarray]:
    """Nats of each token (n,) float64 of each document, nan for its first."""
    nats: dict[int, np.ndarray] = {}
    for numbers in _alike(found, config.batch_size):
        rows = torch.from_numpy(np.stack([found[i] for i in numbers]).astype(np.int64))
        nats |= zip(numbers, _stream(model, rows, levels, config.sequence_length).numpy(), strict=True)
    return [nats[i] for i in range(len(found))]


def _alike(found: Sequence[np.ndarray], rows: int) -> Iterator[list[int]]:
    """Numbers of documents of one length, at most ``rows`` together: they can be read side by side."""
    by_length = sorted(range(len(found)), key=lambda i: len(found[i]))
    for _, group in itertools.groupby(by_length, key=lambda i: len(found[i])):
        numbers = list(group)
        yield from (numbers[i : i + rows] for i in range(0, len(numbers), rows))


def _stream(model: Any, rows: Tensor, levels: Sequence[OnlineLevel], length: int) -> Tensor:
    learner = OnlineLearner(model, levels, context=length if model.state_grows else math.inf)
    return torch.cat([learner.read(piece) for piece in rows.split(length, dim=1)], dim=1).double()


def bits_per_byte(read_: Sequence[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer) -> float | None:
    """Of (nats, tokens) of several texts."""
    bits = sum(float(nats.sum()) for nats, _ in read_) / math.log(2)
    found = bits / sum(len(tokenizer.decode(tokens)) for _, tokens in read_)
    return found if math.isfinite(found) else None
