"""The class-incremental benchmark: every method, its learning rate tuned on one grid, over several seeds.

    labelled text → stream of tasks → encoded once → (method, rate, seed) → accuracy matrix → results.jsonl → report

Each finished run is one line of results.jsonl, so that a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nestlearn.continual.encoder import PACKAGED, Encoded, Encoder, load_encoder
from nestlearn.continual.labelled import read_labelled
from nestlearn.continual.methods import Method, choose, methods
from nestlearn.continual.metrics import average_accuracy
from nestlearn.continual.protocol import EncodedTask, Outcome, Settings, run
from nestlearn.continual.streams import Labelled, Stream, class_incremental
from nestlearn.errors import UserError

RESULTS, SETTINGS = "results.jsonl", "settings.json"
TUNING_SEED = 1000  # of the stream on which the rates are chosen, by its validation texts
DEFAULT_METHODS = ("sequential", "ewc", "lora", "replay-1", "replay-10", "joint", "sequential+memory", "ewc+memory",
                   "levels-2", "levels-3", "levels-4")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is compared. tune_tasks: the rates are chosen after so many tasks of the tuning stream (None: all).

    train, valid, test  texts of each class, at most     periods  of the MLP levels, tokens, fastest first
    """

    data: str
    encoder: str = PACKAGED
    tasks: int | None = None
    train: int | None = 10
    valid: int | None = 5
    test: int | None = 30
    periods: tuple[int, ...] = (512, 2048)
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)
    tune_tasks: int | None = None
    settings: Settings = field(default_factory=Settings)


def run_benchmark(
    plan: Plan,
    names: Iterable[str],
    seeds: Sequence[int],
    out: Path,
    *,
    say: Callable[[str], None] = print,
    minutes: float | None = None,
) -> bool:
    """Does what is left to do, stopping after a run that ends beyond ``minutes``; whether all is done.

    Raises UserError for a folder that holds the results of another plan.
    """
    chosen = choose(names, methods(plan.periods))
    results = Results(out, plan)
    work = Work(plan, out)
    started = time.monotonic()
    for record in _open_runs(work, results, chosen, seeds):
        results.add(record)
        what = f"{record['method']}, rate {record['rate']:g}, {record['part']} seed {record['seed']}"
        accuracy = average_accuracy(record["accuracies"])
        say(f"{what}: {100 * accuracy:.1f} % after the last task, {record['seconds']:.0f} s of training")
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            return False
    return True


def best_rate(records: Iterable[dict[str, Any]], method: str) -> float | None:
    """The rate with the best average accuracy on the tuning stream; the smaller of equals."""
    tuned = [r for r in records if r["part"] == "tune" and r["method"] == method]
    ranked = sorted(tuned, key=lambda r: (-average_accuracy(r["accuracies"]), r["rate"]))
    return ranked[0]["rate"] if ranked else None


class Results:
    """The lines of results.jsonl in a folder that belongs to one plan."""

    def __init__(self, out: Path, plan: Plan) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, ours = out / RESULTS, json.loads(json.dumps(asdict(plan)))
        if (out / SETTINGS).exists():
            theirs = json.loads((out / SETTINGS).read_text())
            changed = [key for key in ours if ours[key] != theirs.get(key)]
            if changed:
                key = changed[0]
                raise UserError(f"{out} holds results for {key} {theirs.get(key)}, not {ours[key]}: name a new folder")
        (out / SETTINGS).write_text(json.dumps(ours, indent=1) + "\n")
        self.records = read_results(out)
        whole = "".join(json.dumps(record) + "\n" for record in self.records)
        if self.path.exists() and self.path.read_text() != whole:  # the last line was cut off
            self.path.write_text(whole)

    def add(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def has(self, **wanted: Any) -> bool:
        return any(all(record[key] == value for key, value in wanted.items()) for record in self.records)


def read_results(out: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder; a line that was cut off is left out."""
    records = []
    path = out / RESULTS
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class Work:
    """The encoder, and the streams that it has encoded, kept in the folder."""

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self.out, self.rows = plan, out, read_labelled(Path(plan.data))
        self._encoder: Encoder | None = None
        self._streams: dict[tuple[int, str], list[EncodedTask]] = {}

    @property
    def encoder(self) -> Encoder:
        self._encoder = self._encoder or load_encoder(self.plan.encoder, self.plan.settings.trained)
        return self._encoder

    def stream(self, seed: int) -> Stream:
        plan = self.plan
        limits = {"train": plan.train, "valid": plan.valid, "test": plan.test}
        return class_incremental(self.rows, seed=seed, tasks=plan.tasks, **limits)

    def tasks(self, seed: int, part: str) -> list[EncodedTask]:
        """The encoded tasks of a stream, tested on its ``part``: "valid" or "test"."""
        if (seed, part) not in self._streams:
            tasks = self.stream(seed).tasks[: self.plan.tune_tasks if part == "valid" else None]
            self._streams = {(seed, part): [
                EncodedTask(task.classes, self._encoded(seed, n, "train", task.train),
                            self._encoded(seed, n, part, getattr(task, part))) for n, task in enumerate(tasks)
            ]}  # fmt: skip
        return self._streams[seed, part]

    def _encoded(self, seed: int, number: int, part: str, texts: Labelled) -> Encoded:
        path = self.out / "encoded" / f"{seed}-{number}-{part}.pt"
        if path.exists():
            return Encoded.from_dict(torch.load(path, weights_only=True))
        encoded = self.encoder.encode(texts.texts, texts.labels)
        path.parent.mkdir(exist_ok=True)
        torch.save(encoded.to_dict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        return encoded


def _open_runs(
    work: Work, results: Results, chosen: Sequence[Method], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Every run that is not yet done, as it finishes: the rates first, then seed after seed."""
    for method in chosen:
        for rate in _rates(method, work.plan):
            if len(_rates(method, work.plan)) > 1 and not results.has(part="tune", method=method.name, rate=rate):
                yield _run(work, method, rate, TUNING_SEED, "tune")
    for seed in seeds:
        for method in chosen:
            if not results.has(part="test", method=method.name, seed=seed):
                best = best_rate(results.records, method.name)
                yield _run(work, method, _rates(method, work.plan)[0] if best is None else best, seed, "test")


def _rates(method: Method, plan: Plan) -> tuple[float, ...]:
    """What the method may choose from; nothing where nothing is trained."""
    return (0.0,) if method.periods == () and method.head == "memory" else plan.rates


def _run(work: Work, method: Method, rate: float, seed: int, part: str) -> dict[str, Any]:
    tuning = part == "tune"
    tasks = work.tasks(seed, "valid" if tuning else "test")
    outcome: Outcome = run(work.encoder, tasks, method, rate, work.plan.settings, seed=seed, every_row=not tuning)
    names = [task.name for task in work.stream(seed).tasks][: len(tasks)]
    return {"part": part, "method": method.name, "rate": rate, "seed": seed, "tasks": names} | asdict(outcome)
