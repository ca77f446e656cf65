"""Local files as the data of the harness's own tasks: converted to the hub's fields, under the installed prompts.

A folder may hold the files of the layout in `SOURCES` (jsonl or text, also .gz and .xz) or what the Hugging Face hub
has, as DIR/<dataset>/…/<split>….parquet or .jsonl. For each task a task file is written that `include`s the installed
one and changes nothing but where its rows come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nestlearn.data.formats import decompressed
from nestlearn.errors import UserError

Row = dict[str, Any]
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}


@dataclass(frozen=True)
class Source:
    """A task of the harness. `config` is its file below lm_eval/tasks; `files` of the local layout, by split.

    convert  the contents of such a file to rows with the hub's fields
    remark   how these rows differ from the hub's, to be said to the user
    """

    config: str
    hub: str
    subset: str | None
    files: dict[str, str]
    convert: Callable[[str], Iterable[Row]]
    remark: str = ""


@dataclass(frozen=True)
class Found:
    """The files of a task by split; `source` is set where they are to be converted."""

    files: dict[str, list[Path]]
    source: Source | None


def _rows(text: str) -> Iterator[Row]:
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _lambada(text: str) -> Iterator[Row]:
    return ({"text": f"{row['context']} {row['target']}"} for row in _rows(text))


def _boolq(text: str) -> Iterator[Row]:
    """The prompt adds the question mark."""
    return ({**row, "question": row["question"].removesuffix("?")} for row in _rows(text))


def _winogrande(text: str) -> Iterator[Row]:
    return ({**row, "answer": str(row["label"] + 1)} for row in _rows(text))


def _arc(text: str) -> Iterator[Row]:
    for row in _rows(text):
        letters = [chr(ord("A") + place) for place in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": letters}
        yield {
            "id": str(row["id"]),
            "question": row["question"],
            "choices": choices,
            "answerKey": letters[row["label"]],
        }


def _hellaswag(text: str) -> Iterator[Row]:
    """The file's query is "activity: context" as one text; the harness capitalises the part after the last sentence."""
    for row in _rows(text):
        activity, _, context = row["query"].partition(": ")
        first, last = _split_context(context)
        yield {
            "activity_label": activity,
            "ctx_a": first,
            "ctx_b": last,
            "endings": row["endings"],
            "label": str(row["label"]),
        }


def _split_context(context: str) -> tuple[str, str]:
    """What the hub keeps as ctx_a and ctx_b: the beginning of the sentence to be completed is in small letters."""
    head, dot, tail = context.rpartition(". ")
    return (f"{head}.", tail) if dot and tail[:1].islower() else (context, "")


def wikitext_pages(text: str) -> Iterator[Row]:
    """Articles as EleutherAI/wikitext_document_level has them: one begins at each heading of the first level."""
    lines: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            if "".join(lines).strip():
                yield {"page": "\n".join(lines)}
            lines = []
        lines.append(line)
    yield {"page": "\n".join(lines)}


_WIKITEXT = "rows are of the tokenized release, with <unk>; the hub's are of the raw one"
_BOOLQ = "passages lack the article's title, which the hub's begin with"
_HELLASWAG = "texts are preprocessed already; where the last sentence begins is told by its small letter"
SOURCES = {
    "wikitext": Source(
        "wikitext/wikitext.yaml",
        "EleutherAI/wikitext_document_level",
        "wikitext-2-raw-v1",
        {"test": "wikitext2/wikitext2_test.txt", "validation": "wikitext2/wikitext2_valid.txt"},
        wikitext_pages,
        _WIKITEXT,
    ),
    "lambada_openai": Source(
        "lambada/lambada_openai.yaml",
        "EleutherAI/lambada_openai",
        "default",
        {"test": "lambada/lambada_openai_test.jsonl"},
        _lambada,
    ),
    "piqa": Source("piqa/piqa.yaml", "baber/piqa", None, {"validation": "piqa/piqa_valid.jsonl"}, _rows),
    "hellaswag": Source(
        "hellaswag/hellaswag.yaml",
        "Rowan/hellaswag",
        None,
        {"validation": "hellaswag/hellaswag_val.jsonl"},
        _hellaswag,
        _HELLASWAG,
    ),
    "winogrande": Source(
        "winogrande/default.yaml",
        "allenai/winogrande",
        "winogrande_xl",
        {"validation": "winogrande/winogrande_dev.jsonl"},
        _winogrande,
    ),
    "arc_easy": Source("arc/arc_easy.yaml", "allenai/ai2_arc", "ARC-Easy", {"test": "arc/arc_easy_test.jsonl"}, _arc),
    "arc_challenge": Source(
        "arc/arc_challenge.yaml", "allenai/ai2_arc", "ARC-Challenge", {"test": "arc/arc_challenge_test.jsonl"}, _arc
    ),
    "social_iqa": Source(
        "siqa/siqa.yaml", "lighteval/siqa", None, {"validation": "social_iqa/social_iqa_validation.jsonl"}, _rows
    ),
    "boolq": Source(
        "super_glue/boolq/default.yaml",
        "aps/super_glue",
        "boolq",
        {"validation": "boolq/boolq_validation.jsonl"},
        _boolq,
        _BOOLQ,
    ),
}


def find(name: str, folder: Path) -> Found:
    """The files of a task in a folder. UserError where there are none: what is missing, and where it comes from."""
    source = SOURCES[name]
    local = {split: _present(folder / path) for split, path in source.files.items()}
    files = {split: [path] for split, path in local.items() if path is not None}
    if files:
        return Found(files, source)
    hub = {split: _hub_files(folder, source, split) for split in SPLITS}
    hub = {split: paths for split, paths in hub.items() if paths}
    if hub.keys() & {"validation", "test"}:
        return Found(hub, None)
    paths = " or ".join(str(folder / path) for path in source.files.values())
    subset = f" ({source.subset})" if source.subset else ""
    raise UserError(
        f"{name}: {paths} (also .gz or .xz) is missing, and so are files in {folder / source.hub}: it is the dataset "
        f"{source.hub}{subset} of the Hugging Face hub; fetch it, or leave {name} out of --tasks"
    )


def _present(path: Path) -> Path | None:
    """The file, or the one with .gz or .xz."""
    return next((p for suffix in ("", ".xz", ".gz") if (p := Path(f"{path}{suffix}")).is_file()), None)


def _hub_files(folder: Path, source: Source, split: str) -> list[Path]:
    """Files whose name begins with the split, in the folder of the subset where there are subsets."""
    below = folder / source.hub
    found = [p for p in sorted(below.rglob(f"{split}*")) if p.is_file() and _format(p) is not None]
    in_subset = [p for p in found if source.subset in p.relative_to(below).parts]
    return in_subset if source.subset not in (None, "default") else found


def _format(path: Path) -> str | None:
    """The loader that `datasets` has for a file."""
    suffixes = [s for s in path.suffixes if s not in (".gz", ".xz")]
    return {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(suffixes[-1] if suffixes else "")


def write_task(name: str, found: Found, installed: Path, folder: Path) -> list[str]:
    """FOLDER/NAME.yaml, and the converted rows beside it. Returns remarks that a user must read with the numbers."""
    remarks = []
    files = {split: [str(path) for path in paths] for split, paths in found.files.items()}
    if found.source is not None:
        files = {
            split: [str(_converted(name, split, paths[0], found.source, folder))]
            for split, paths in found.files.items()
        }
        remarks += [found.source.remark] if found.source.remark else []
    loader = "json" if found.source is not None else _format(next(iter(found.files.values()))[0])
    if name in ("wikitext", "lambada_openai", "arc_easy", "arc_challenge") and "test" not in files:
        remarks.append("there is no test split here: evaluated is the validation split")
    config: dict[str, Any] = {
        "include": str(installed / SOURCES[name].config),
        "task": name,
        "dataset_path": loader,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **{key: split if split in files else None for split, key in SPLITS.items()},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return remarks


def _converted(name: str, split: str, path: Path, source: Source, folder: Path) -> Path:
    out = folder / f"{name}-{split}.jsonl"
    try:
        lines = [json.dumps(row) for row in source.convert(decompressed(path).decode())]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: is not what {name} is made from ({error!r}): fetch the file again") from error
    out.write_text("\n".join(lines) + "\n")
    return out
