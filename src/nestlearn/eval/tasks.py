"""Tasks by name: lm-evaluation-harness's, and long contexts of our own making, run one by one."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nestlearn.data.text import read_texts
from nestlearn.errors import UserError, suggest
from nestlearn.eval import babilong, local_data, mqar, needles
from nestlearn.eval.harness import HarnessModel

BOOKS = "books_eltec_eng/eltec_eng_val.jsonl.xz"
BABILONG = {f"babilong_{task}": task for task in babilong.TASKS}
NAMES = (*local_data.SOURCES, *needles.NEEDLES, *mqar.MQAR, *BABILONG)
BOOTSTRAP = 100  # draws for the standard error of a perplexity
SAMPLES = 100  # needle prompts of each length, where no limit is given (RULER: 500)
RECALLS = 25  # MQAR prompts of each length, of up to 8 questions each
HUB_TIMEOUT = 10.0  # seconds

# The paper's row: heading, task, metric, scale. An accuracy is in percent.
ROW = (
    ("wiki ppl", "wikitext", "word_perplexity", 1),
    ("lmb ppl", "lambada_openai", "perplexity", 1),
    ("lmb acc", "lambada_openai", "acc", 100),
    ("piqa", "piqa", "acc", 100),
    ("hella acc_n", "hellaswag", "acc_norm", 100),
    ("wino", "winogrande", "acc", 100),
    ("arc-e", "arc_easy", "acc", 100),
    ("arc-c acc_n", "arc_challenge", "acc_norm", 100),
    ("siqa", "social_iqa", "acc", 100),
    ("boolq", "boolq", "acc", 100),
)


@dataclass(frozen=True)
class Choice:
    """What to run, and on what. `lengths` in tokens and `text` are for long contexts only."""

    names: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    lengths: tuple[int, ...] = ()
    text: tuple[Path, ...] = ()


@dataclass
class Job:
    """One call of the harness: a task of a folder by name, or a whole config. `remarks` go with its numbers."""

    name: str
    folder: Path
    config: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)


def run_tasks(model: HarnessModel, choice: Choice, say: Callable[[str], None]) -> dict[str, Any]:
    """The harness's results of all tasks, merged; each task's are said as soon as they are there.

    Raises UserError before anything is run where a name is unknown or a file is missing.
    """
    check_names(choice)
    if choice.data is not None and not choice.data.is_dir():
        raise UserError(f"--data {choice.data} is not a folder: give one with the tasks' files")
    import datasets

    merged: dict[str, Any] = {}
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what a user must know is in the remarks
    with TemporaryDirectory(prefix="nestlearn-tasks-") as folder:
        for job in list(_jobs(model, choice, Path(folder))):
            results = _run(model, job, choice)
            if job.remarks:
                results["remarks"] = {job.name: job.remarks}
            _merge(merged, results)
            say(summary(job.name, results["results"][job.name], job.remarks))
    return merged


def check_names(choice: Choice) -> None:
    for name in choice.names:
        if name not in NAMES:
            raise UserError(f"unknown task {name!r}{suggest(name, NAMES)}: known are {', '.join(NAMES)}")
    if len(set(choice.names)) < len(choice.names) or not choice.names:
        raise UserError(f"--tasks {','.join(choice.names)}: name at least one task, and each only once")
    for option, value, least in (("--limit", choice.limit, 1), ("--fewshot", choice.fewshot, 0)):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}: must be at least {least}")
    long = [name for name in choice.names if name not in local_data.SOURCES]
    if long and not choice.lengths:
        raise UserError(f"{long[0]} needs lengths in tokens: give for example --lengths 1024,4096")
    if choice.lengths and not long:
        raise UserError("--lengths is for ruler_…, mqar_… and babilong_… tasks only: leave it out")


def paper_row(results: dict[str, Any]) -> list[tuple[str, float | None]]:
    """The paper's columns, None for what was not run. The average is of the accuracies, over those that were."""
    row = [(heading, _metric(results, task, metric, scale)) for heading, task, metric, scale in ROW]
    known = [value for (_, value), (*_, scale) in zip(row, ROW, strict=True) if value is not None and scale == 100]
    accuracies = sum(scale == 100 for *_, scale in ROW)
    return [*row, (f"avg of {len(known)}/{accuracies}", sum(known) / len(known) if known else None)]


def write_results(results: dict[str, Any], path: Path) -> None:
    from lm_eval.utils import handle_non_serializable

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=handle_non_serializable) + "\n", encoding="utf-8")


def summary(name: str, metrics: dict[str, Any], remarks: Sequence[str]) -> str:
    """One line: every metric that is a number, with its standard error where there is one."""
    parts = []
    for key, value in metrics.items():
        metric, _, _ = key.partition(",")
        if isinstance(value, int | float) and "," in key and not metric.endswith("_stderr"):
            error = metrics.get(key.replace(metric, f"{metric}_stderr", 1))
            parts.append(f"{metric} {value:.4g}" + (f" ± {error:.2g}" if isinstance(error, float) else ""))
    return f"{name}: {', '.join(parts)}" + "".join(f"\n  note: {remark}" for remark in remarks)


def _jobs(model: HarnessModel, choice: Choice, folder: Path) -> Iterator[Job]:
    """Every file is looked for, and every long text made, before the first task runs."""
    import lm_eval.tasks

    installed = Path(lm_eval.tasks.__file__).parent
    for name in choice.names:
        if name in local_data.SOURCES:
            yield _standard(name, choice, folder, installed)
        elif name in needles.NEEDLES:
            number, text = choice.limit or SAMPLES, "" if not needles.NEEDLES[name].essay else _haystack(choice)
            yield Job(name, folder, needles.harness_config(name, text, choice.lengths, number, _counter(model)))
        elif name in mqar.MQAR:
            number, text = choice.limit or RECALLS, _haystack(choice) if any(choice.lengths) else ""
            yield Job(name, folder, mqar.harness_config(name, text, choice.lengths, number, _counter(model)))
        else:
            yield from (_babilong(model, name, length, choice, folder, installed) for length in choice.lengths)


def _standard(name: str, choice: Choice, folder: Path, installed: Path) -> Job:
    if choice.data is None:
        _reach_hub(name)
        (folder / f"{name}.yaml").write_text(f"include: {installed / local_data.SOURCES[name].config}\ntask: {name}\n")
        return Job(name, folder)
    found = local_data.find(name, choice.data)
    remarks = local_data.write_task(name, found, installed, folder)
    if choice.fewshot and "train" not in found.files:
        remarks.append("there is no train split here: few-shot examples are other rows of the split that is evaluated")
    return Job(name, folder, remarks=remarks)


def _babilong(model: HarnessModel, name: str, length: int, choice: Choice, folder: Path, installed: Path) -> Job:
    if choice.data is None:
        raise UserError(f"{name} needs the bAbI stories: give --data DIR with DIR/{babilong.ARCHIVE}")
    questions = babilong.read_questions(choice.data, BABILONG[name])[: choice.limit]
    book = babilong.sentences(_haystack(choice)) if length else []
    job, task = f"{name}_{length}", BABILONG[name]
    rows = babilong.compose(questions, book, length, _counter(model))
    (folder / f"{job}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {task: str(folder / f"{job}.jsonl")}, "cache_dir": str(folder / "cache")}
    config = {
        "include": str(installed / f"babilong/{name}.yaml"),
        "task": job,
        "custom_dataset": None,
        "dataset_path": "json",
        "dataset_kwargs": files,
    }
    (folder / f"{job}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return Job(job, folder)


def _run(model: HarnessModel, job: Job, choice: Choice) -> dict[str, Any]:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=job.folder, include_defaults=False)
    task = job.name if job.config is None else ConfigurableTask(config=job.config)
    fixed = job.config is not None or job.name.startswith("babilong")  # prompts with examples of their own, or none
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides the arguments
    results = evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,
        num_fewshot=None if fixed else choice.fewshot,
        limit=None if fixed else choice.limit,
        bootstrap_iters=BOOTSTRAP,
        log_samples=False,
    )
    if results is None:
        raise RuntimeError(f"the harness gave no results for {job.name}")
    return dict(results)


def _merge(merged: dict[str, Any], results: dict[str, Any]) -> None:
    """Tables by task are joined; what holds for the whole call is kept from the first."""
    for key, value in results.items():
        if isinstance(value, dict) and key not in ("config",):
            merged.setdefault(key, {}).update(value)
        else:
            merged.setdefault(key, value)


def _metric(results: dict[str, Any], task: str, metric: str, scale: int) -> float | None:
    value = results.get(task, {}).get(f"{metric},none")
    return None if value is None else scale * float(value)


def _counter(model: HarnessModel) -> Callable[[str], int]:
    return lambda text: len(model.codec.encode(text))


def _haystack(choice: Choice) -> str:
    """The user's text, else the books in the data's folder."""
    paths = choice.text or ((choice.data / BOOKS,) if choice.data is not None else ())
    if not paths:
        raise UserError("a haystack needs text: give --text FILES, or --data DIR with DIR/" + BOOKS)
    corpus = read_texts(paths)
    return "\n".join(document.data.decode(errors="replace") for document in (*corpus.train, *corpus.held_out))


def _reach_hub(name: str) -> None:
    """UserError at once where the hub does not answer; without this the harness would try for minutes."""
    from huggingface_hub import HfApi

    source = local_data.SOURCES[name]
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return  # then `datasets` reads its cache and does not wait
    try:
        HfApi().dataset_info(source.hub, timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the network has to say
        path = next(iter(source.files.values()))
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: the dataset {source.hub} of the Hugging Face hub cannot be reached ({reason}): give --data DIR "
            f"with DIR/{path} (also .gz or .xz) or the hub's files in DIR/{source.hub}"
        ) from error
