"""A whole run: text → training → held-out text → the twin without adaptation → sample → run.json and report.html.

Every stage can be resumed: what RUN already holds is not trained again.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn.data.text import Document
from nestlearn.data.tokens import Tokenizer, load_tokenizer, tokenize
from nestlearn.errors import UserError
from nestlearn.eval.compression import compression
from nestlearn.eval.perplexity import bits_per_byte, measured_bytes
from nestlearn.eval.report import write_report
from nestlearn.eval.run_record import (
    RATE_ZERO_FOLDER,
    CorpusRecord,
    Evaluation,
    Results,
    RunRecord,
    Sample,
    write_record,
)
from nestlearn.train.build import Data, build_model, hope_config, load_data
from nestlearn.train.checkpoint import Checkpoint, checkpoints, find_checkpoint, load_checkpoint, set_aside_later
from nestlearn.train.config import TrainConfig
from nestlearn.train.display import Display
from nestlearn.train.environment import commit, hardware, versions
from nestlearn.train.loop import Interrupted, train
from nestlearn.train.sample import continue_text
from nestlearn.train.step import Gradient
from nestlearn.train.tables import level_table

PASSAGE = 512  # tokens of held-out text in the report
PROMPT = 128  # of these, tokens before the generated sample
TEMPERATURE, TOP_K = 0.8, 50


def run_training(
    config: TrainConfig, run: Path, start: Checkpoint | None, display: Display, gradient: Gradient | None = None
) -> Path:
    """Trains, evaluates and reports in ``run``; returns the report. UserError as in ``train``, with how to go on.

    gradient  of a step, as in ``train``
    """
    try:
        return _stages(config, run, start, display, gradient)
    except (Interrupted, KeyboardInterrupt) as interruption:
        saved = checkpoints(run)
        what = str(interruption) or (
            "stopped, everything trained is saved" if saved else "stopped, nothing to save yet"
        )
        how = f"go on with nestlearn train --resume {run}" if saved else "start again with nestlearn train"
        raise UserError(f"{what}: {how}") from None


def _stages(
    config: TrainConfig, run: Path, start: Checkpoint | None, display: Display, gradient: Gradient | None
) -> Path:
    tokenizer = load_tokenizer(config.tokenizer) if start is None else start.tokenizer()
    hope_config(config, tokenizer.vocab_size)  # what cannot be built is refused before any text is read
    data = load_data(config, tokenizer)
    display.say(data.corpus.summary)
    if start is not None:
        check_resumable(start, data)
        for moved in set_aside_later(start.folder):
            display.say(f"a later checkpoint was set aside: {moved}")

    record = _record(config, data)
    run.mkdir(parents=True, exist_ok=True)
    write_record(run, record)  # so that a run that is stopped can be reported on
    model, progress = train(config, data, run, start, display, gradient)
    record = dataclasses.replace(record, tokens=progress.tokens, seconds=progress.seconds)
    write_record(run, record)

    held_out = evaluate(model, data.held_out, data.tokenizer, config)
    packed = compression(measured_bytes(data.held_out, data.tokenizer, config.held_out_tokens))
    results = Results(held_out, packed.xz, packed.bz2)
    display.say(
        f"held out: {held_out.bits_per_byte:.3f} bits per byte of {held_out.bytes:,} bytes "
        f"(xz -9: {packed.xz:.3f}, bz2 -9: {packed.bz2:.3f})"
        + (f"; every {config.sequence_length:,} tokens from a new state" if config.carry_state else "")
    )
    if config.compare_rate_zero:
        twin = _train_twin(config, data, run / RATE_ZERO_FOLDER, display, gradient)
        results = dataclasses.replace(results, rate_zero=evaluate(twin, data.held_out, data.tokenizer, config))
        assert results.rate_zero is not None
        gain = 1 - held_out.bits_per_byte / results.rate_zero.bits_per_byte
        display.say(
            f"without adaptation: {results.rate_zero.bits_per_byte:.3f} bits per byte (the memory is worth {gain:.1%})"
        )

    sample = _sample(model, data, config)
    display.say(f"sample, after the prompt {sample.prompt[-60:]!r}:\n{sample.text}")
    write_record(run, dataclasses.replace(record, results=results, sample=sample))
    return write_report(run)


def evaluate(model: Any, tokens: np.ndarray, tokenizer: Tokenizer, config: TrainConfig) -> Evaluation:
    """At the sequence length and batch size that the model was trained with."""
    measured = bits_per_byte(
        model,
        tokens,
        tokenizer,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        max_tokens=config.held_out_tokens,
    )
    return measured.evaluation()


def rate_zero(config: TrainConfig) -> TrainConfig:
    """The same run with memories that are their initial weights for ever: no write, no forgetting."""
    memory = config.model.get("memory", {}) | {"rate_max": 0.0, "retention": False}
    model = config.model | {"memory": memory}
    return dataclasses.replace(config, name=f"{config.name}, rate 0", model=model, compare_rate_zero=False)


def _train_twin(config: TrainConfig, data: Data, folder: Path, display: Display, gradient: Gradient | None) -> Any:
    start = load_checkpoint(find_checkpoint(folder)) if checkpoints(folder) else None
    return train(rate_zero(config), data, folder, start, display, gradient)[0]


def check_resumable(start: Checkpoint, data: Data) -> None:
    if data.corpus.train.sha256 != start.corpus_sha256:
        raise UserError(
            f"the text is not the one that {start.folder} was trained on (sha256 {data.corpus.train.sha256[:12]}, not "
            f"{start.corpus_sha256[:12]}): restore it, or train anew without --resume"
        )


def _record(config: TrainConfig, data: Data) -> RunRecord:
    train_text, held_out = data.corpus.train, data.corpus.held_out
    ids, source = _passage(held_out, data)
    with torch.device("meta"):
        model = build_model(config, data.tokenizer.vocab_size)
    return RunRecord(
        name=config.name,
        command=config.command(),
        seed=config.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=0,
        seconds=0.0,
        sequence_length=config.sequence_length,
        tokenizer=data.tokenizer.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(),
        versions=versions(),
        corpus=CorpusRecord(
            data.corpus.description, train_text.bytes, train_text.sha256, held_out.bytes, held_out.sha256
        ),
        commit=commit(),
        passage=[int(index) for index in ids],
        passage_source=source,
        levels=level_table(model, config),
        config=config.to_dict(),
    )


def _passage(documents: tuple[Document, ...], data: Data) -> tuple[np.ndarray, str]:
    """The start of the first held-out document that is long enough, or else of the longest one."""
    long_enough = [document for document in documents if len(document.data) >= 8 * PASSAGE]
    document = long_enough[0] if long_enough else max(documents, key=lambda document: len(document.data))
    return tokenize([document], data.tokenizer)[:PASSAGE], document.name


def _sample(model: Any, data: Data, config: TrainConfig) -> Sample:
    ids, _ = _passage(data.corpus.held_out, data)
    prompt = data.tokenizer.decode(ids[: min(PROMPT, len(ids) // 2 + 1)])
    options = {"tokens": config.sample_tokens, "temperature": TEMPERATURE, "top_k": TOP_K, "seed": config.seed}
    text = continue_text(model, data.tokenizer, prompt, **options)
    return Sample(prompt.decode(errors="replace"), text.decode(errors="replace"))
