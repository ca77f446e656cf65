"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import NotFinite, UserError
from nestlearn.levels import fires
from nestlearn.train.build import Data, build_model, build_optimizer, load_model
from nestlearn.train.checkpoint import Checkpoint, Progress, checkpoints, save_checkpoint
from nestlearn.train.config import TrainConfig
from nestlearn.train.display import Display
from nestlearn.train.step import Gradient, learning_rate, next_token_gradient, train_step

METRICS = "metrics.jsonl"


class Interrupted(UserError):
    """A signal ended a run early; it is saved."""


def train(
    config: TrainConfig,
    data: Data,
    run: Path,
    start: Checkpoint | None,
    display: Display,
    gradient: Gradient | None = None,
) -> tuple[Any, Progress]:
    """Trains to ``config.tokens``, from ``start`` or from the beginning; returns the model and where it stands.

    RUN/metrics.jsonl gets a line every ``log_every`` tokens, and RUN a checkpoint every ``checkpoint_every``.
    Raises NotFinite where a loss or gradient is not finite (such a model is never saved), and Interrupted on Ctrl-C or
    SIGTERM, after the step under way is done and saved. gradient: of a step; None: the ordinary one.
    """
    if bool(config.meta) != (gradient is not None):
        raise UserError(f"meta is {config.meta!r}: give gradient=meta_gradient(config) with it, or neither")
    model = build_model(config, data.tokenizer.vocab_size) if start is None else load_model(start.folder)
    if config.carry_state:
        model.check_carried()
    optimizer = build_optimizer(config, model)
    progress = Progress(data.batches.initial()) if start is None else start.progress
    if start is not None:
        optimizer.load_state_dict(start.optimizer_state())
    run.mkdir(parents=True, exist_ok=True)
    _write_history(run, progress)

    model.train()
    sums = torch.tensor(progress.sums, device=next(model.parameters()).device)
    began, stop = time.perf_counter() - progress.seconds, False
    bar = display.training(config.name, progress.tokens, config.tokens)
    with _stop_signals() as signalled, open(run / METRICS, "a", encoding="utf-8") as metrics, bar:
        while progress.tokens < config.tokens and not stop:
            stream = None if data.batches.begins(progress.batches) else progress.stream
            batch, progress.batches = data.batches.next(progress.batches)
            result = train_step(
                model, optimizer, batch, progress.tokens, config, stream, gradient or next_token_gradient
            )
            progress.stream = result.stream
            sums += torch.stack(result[:2])  # on the device: nothing here waits for the step
            before, progress.tokens = progress.tokens, progress.tokens + batch.inputs.numel()
            progress.steps += 1
            display.advance(progress.tokens)

            done, stop = progress.tokens >= config.tokens, signalled.is_set()
            log = done or fires(config.log_every, before, progress.tokens)
            save = done or stop or fires(config.checkpoint_every, before, progress.tokens)
            if log or save:
                progress.sums = _finite(sums, run, progress, config)
                progress.seconds = time.perf_counter() - began
            if log:
                line = _line(progress, config, data)
                metrics.write(json.dumps(line) + "\n")
                metrics.flush()
                display.logged(line)
                progress.history.append(line)
                progress.sums, progress.steps = (0.0, 0.0), 0
                sums.zero_()
            if save:
                save_checkpoint(run, model, optimizer, data.tokenizer, config, progress, data.corpus.train.sha256)
    if progress.tokens < config.tokens:
        raise Interrupted(
            f"stopped at {progress.tokens:,} of {config.tokens:,} tokens and saved {checkpoints(run)[-1].name}"
        )
    return model, progress


def _write_history(run: Path, progress: Progress) -> None:
    """Lines that were logged after the checkpoint that a run resumes from will be logged again."""
    partial = run / f"{METRICS}.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in progress.history), encoding="utf-8")
    partial.replace(run / METRICS)


def _finite(sums: Tensor, run: Path, progress: Progress, config: TrainConfig) -> tuple[float, float]:
    """The sums of loss and gradient norm since the last line; NotFinite if any step had one that is not a number."""
    loss, norm = sums.tolist()
    if math.isfinite(loss) and math.isfinite(norm):
        return loss, norm
    good = checkpoints(run)
    instead = f"{good[-1]} is the last good checkpoint" if good else "there is no checkpoint yet"
    raise NotFinite(
        f"the {'gradient' if math.isfinite(loss) else 'loss'} is {norm if math.isfinite(loss) else loss} in one of the "
        f"{progress.steps} steps before {progress.tokens:,} tokens: {instead}; try a learning_rate below "
        f"{config.learning_rate:g} or a clip_norm below {config.clip_norm:g}"
    )


def _line(progress: Progress, config: TrainConfig, data: Data) -> dict[str, float]:
    """A line of metrics.jsonl: means since the last one, tokens and seconds since the beginning."""
    last = progress.history[-1] if progress.history else {"tokens": 0, "seconds": 0.0}
    seconds = max(progress.seconds - last["seconds"], 1e-9)
    return {
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 3),
        "loss_bits_per_byte": progress.sums[0] / progress.steps * data.bits_per_byte,
        "lr": learning_rate(config, progress.tokens),
        "tokens_per_second": round((progress.tokens - last["tokens"]) / seconds, 1),
        "grad_norm": progress.sums[1] / progress.steps,
    }


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets, to stop at a step boundary; a second Ctrl-C stops at once."""
    signalled = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield signalled  # only the main thread may handle signals
        return

    def note(number: int, frame: Any) -> None:
        if signalled.is_set():
            raise KeyboardInterrupt
        signalled.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signalled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
