"""``nestlearn eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from nestlearn.commands.common import open_checkpoint, shown
from nestlearn.errors import UserError

if TYPE_CHECKING:
    from nestlearn.eval.harness import HarnessModel

BATCH_SIZE = 32


def evaluate(
    checkpoint: Positional[Path],
    text: Annotated[tuple[str, ...], shown("PATH …", "what the run has held out")] = (),
    tokenizer: Annotated[str | None, shown("SPEC", "the checkpoint's")] = None,
    tokens: Annotated[str | None, shown("N", "as in training")] = None,
    tasks: Annotated[str | None, shown("NAME,…", "none: bits per byte")] = None,
    data: Annotated[Path | None, shown("DIR", "the Hugging Face hub")] = None,
    limit: Annotated[int | None, shown("N", "all rows")] = None,
    fewshot: Annotated[int | None, shown("N", "the task's")] = None,
    lengths: Annotated[str | None, shown("N,…", "none")] = None,
    batch_size: Annotated[int | None, shown("N", str(BATCH_SIZE))] = None,
    out: Annotated[Path | None, shown("FILE", "RUN/tasks-CHECKPOINT.json, numbered where that exists")] = None,
) -> None:
    """Bits per byte of a checkpoint, beside xz -9 and bz2 -9 of the same bytes; with --tasks, its scores on tasks.

    Args:
        checkpoint: A checkpoint, or the folder of a run; with --tasks also any Hugging Face causal LM's folder.
        text: Files and folders to read, all of them; with --tasks the haystack of ruler_…, mqar_… and babilong_….
        tokenizer: Must be the checkpoint's own; checked if given.
        tokens: Evaluate at most so many.
        tasks: Of lm-evaluation-harness, and ruler_…, mqar_… and babilong_…; an unknown name lists all.
        data: Local files instead of the hub's.
        limit: Rows of each task, from its beginning.
        fewshot: Examples in front of each row.
        lengths: Of the prompts of ruler_…, mqar_… and babilong_… in tokens, for example 1024,4096.
        batch_size: Rows read together.
        out: The harness's JSON.
    """
    only_tasks = {"data": data, "limit": limit, "fewshot": fewshot, "lengths": lengths}
    only_tasks |= {"batch-size": batch_size, "out": out}
    if tasks is None:
        for name, value in only_tasks.items():
            if value is not None:
                raise UserError(f"--{name} {value} is given without --tasks: name the tasks, for example --tasks piqa")
        return _bits_per_byte(checkpoint, text, tokenizer, tokens)
    if tokens is not None:
        raise UserError(f"--tokens {tokens} together with --tasks: give --limit N, a number of rows")
    _tasks(checkpoint, tokenizer, _choice(tasks, data, limit, fewshot, lengths, text), batch_size or BATCH_SIZE, out)


def _bits_per_byte(checkpoint: Path, text: tuple[str, ...], tokenizer: str | None, tokens: str | None) -> None:
    import dataclasses

    from nestlearn.data.tokens import tokenize
    from nestlearn.eval.compression import compression
    from nestlearn.eval.perplexity import measured_bytes
    from nestlearn.train.build import load_model, read_corpus
    from nestlearn.train.config import parse_count
    from nestlearn.train.run import evaluate

    found = open_checkpoint(checkpoint)
    config = dataclasses.replace(found.config, held_out_tokens=parse_count(tokens)) if tokens else found.config
    own = found.tokenizer(tokenizer)
    corpus = read_corpus(text) if text else read_corpus(config.text, config.held_out, config.held_out_per_document)
    ids = tokenize((*corpus.train, *corpus.held_out) if text else corpus.held_out, own)
    measured = evaluate(load_model(found.folder), ids, own, config)
    packed = compression(measured_bytes(ids, own, config.held_out_tokens))
    print(corpus.summary)
    print(f"{measured.bits_per_byte:.3f} bits per byte of {measured.bytes:,} bytes, {measured.tokens:,} tokens")
    print(f"{packed.xz:.3f} xz -9\n{packed.bz2:.3f} bz2 -9")


def _choice(
    tasks: str, data: Path | None, limit: int | None, fewshot: int | None, lengths: str | None, text: tuple[str, ...]
) -> Any:
    from nestlearn.eval.tasks import Choice, check_names
    from nestlearn.train.config import parse_count

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    sizes = tuple(
        0 if size.strip() == "0" else parse_count(size.strip()) for size in (lengths or "").split(",") if size
    )
    choice = Choice(names, data, limit, fewshot, sizes, tuple(map(Path, text)))
    check_names(choice)
    return choice


def _tasks(checkpoint: Path, tokenizer: str | None, choice: Any, batch_size: int, out: Path | None) -> None:
    from nestlearn.eval.tasks import paper_row, run_tasks, write_results

    model, folder = _open(checkpoint, tokenizer, batch_size)
    results = run_tasks(model, choice, lambda line: print(line, flush=True))
    out = out or _free(folder.parent if folder.name.startswith("checkpoint-") else folder, f"tasks-{folder.name}")
    write_results(results, out)
    row = paper_row(results["results"])
    if any(value is not None for _, value in row):
        _print_row(row)
    print(f"results: {out}")


def _open(path: Path, tokenizer: str | None, batch_size: int) -> tuple[HarnessModel, Path]:
    """A checkpoint of ours, or a Hugging Face folder: that has a config and no record of a training of ours."""
    from nestlearn.eval.harness import HarnessModel, OwnCodec, open_hugging_face
    from nestlearn.train.build import load_model
    from nestlearn.train.checkpoint import MANIFEST, TRAINING

    foreign = (path / "config.json").is_file() and not any((path / name).exists() for name in (TRAINING, MANIFEST))
    if foreign:
        if tokenizer is not None:
            raise UserError(f"--tokenizer {tokenizer}: a Hugging Face folder is used with its own, leave it out")
        return open_hugging_face(path, batch_size), path
    found = open_checkpoint(path)
    codec = OwnCodec(found.tokenizer(tokenizer))
    return HarnessModel(load_model(found.folder), codec, batch_size), found.folder


def _free(folder: Path, name: str) -> Path:
    """FOLDER/NAME.json, or the first of NAME-2.json, NAME-3.json … that does not exist."""
    candidates = (folder / f"{name}{'' if n == 1 else f'-{n}'}.json" for n in range(1, 10**6))
    return next(path for path in candidates if not path.exists())


def _print_row(row: list[tuple[str, float | None]]) -> None:
    """The row of the paper's table."""
    cells = ["-" if value is None else f"{value:.2f}" for _, value in row]
    widths = [max(len(heading), len(cell)) for (heading, _), cell in zip(row, cells, strict=True)]
    print("  ".join(heading.rjust(width) for (heading, _), width in zip(row, widths, strict=True)))
    print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))
