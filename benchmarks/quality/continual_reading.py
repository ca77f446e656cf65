"""What models learn while they read: new domains, new facts, two languages. Trained runs go in, JSON comes out.

    nestlearn train --out runs/hope
    nestlearn train --out runs/transformer --set model.mixer=transformer model.levels=[1] compare_rate_zero=False
    python benchmarks/quality/continual_reading.py domains runs/hope runs/transformer --out domains.json
    python benchmarks/quality/continual_reading.py facts runs/hope --out facts.json
    python benchmarks/quality/continual_reading.py languages runs/hope --out languages.json
    python benchmarks/quality/continual_reading.py written runs/hope --out written.json

Readers of a run: "frozen", the model as it is; "own", its levels as it was trained for; "levels-n p", its MLP levels
changed every p, 4 p, 16 p tokens, of n different periods; "online p", every linear weight changed every p tokens, which
is fine-tuning online. Settings of OnlineLevel may follow: "levels-3 256 bound=0.01 retention=0.9" bounds and shrinks
what a stream changes. Each but the first reads with one forward and one backward pass, at the best of ``--rates`` on a
novel that is not used otherwise. A last word "recall=slow" asks the slow weights as well, "recall=marks" also the
stream as it was after each document (continual/recall.py), one forward more for each.
A model trained on T tokens is asked in windows of T; attention's cache is emptied every T tokens, HOPE's state never.

domains    source of the standard library (held out), a novel, WikiText-2, Shakespeare, another novel: each read once,
           in this order; bits per byte of another part of each, before any and after each, and what reading cost
facts      a made-up encyclopaedia, then a novel; answers chosen among ``--choices``
languages  two invented languages, one after the other
written    two novels, a stream each, then written into the slow weights by every method of `consolidate`: what the new
           model gained on them, and forgot of the standard library, nats per token
Text: ../shared/data or $NESTLEARN_DATA. Every finished reader is saved; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestlearn import OnlineLearner, OnlineLevel, consolidate, online_levels
from nestlearn.continual.facts import encyclopaedia
from nestlearn.continual.languages import invent, meanings
from nestlearn.continual.online_level import is_linear
from nestlearn.continual.online_reader import OnlineReader
from nestlearn.continual.reading import (
    Reader,
    domains_in_sequence,
    forgotten,
    gain_by_position,
    languages_in_sequence,
    new_facts,
)
from nestlearn.data.text import standard_library
from nestlearn.models.hf import HopeForCausalLM
from nestlearn.train.checkpoint import Checkpoint, find_checkpoint, load_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

Result = dict[str, Any]
DATA = Path(os.environ.get("NESTLEARN_DATA", "../shared/data"))  # from the root of the checkout
TUNING, NOVELS = "ENG18890_Nesbit", ("ENG18900_Doyle", "ENG19111_Hornung")
APART = 5_000  # bytes between what is read and what is asked
WINDOWS = 8  # of the curve of gains


class Run:
    """A trained model, with as many readers as are asked for."""

    def __init__(self, folder: Path) -> None:
        found: Checkpoint = load_checkpoint(find_checkpoint(folder))
        self.name, self.length = folder.name, found.config.sequence_length
        self.tokenizer = found.tokenizer()
        self.model = HopeForCausalLM.from_pretrained(found.folder).eval()
        self.attention = self.model.config.mixer == "transformer"

    def reader(self, kind: str, rate: float) -> OnlineReader:
        """kind: "frozen", "online p" or "levels-n p", with settings of its levels as key=value."""
        context = float(self.length) if self.attention else None
        kind, _, recall = kind.partition(" recall=")
        learner = OnlineLearner(self.model, self._levels(kind, rate), context=context)
        return OnlineReader(learner, self._encode, self.length, recall=recall or None)

    def _encode(self, text: str) -> Sequence[int]:
        return self.tokenizer.encode(text.encode()).tolist()

    def _levels(self, kind: str, rate: float) -> list[OnlineLevel]:
        name, *words = kind.split()
        period = words.pop(0) if words and "=" not in words[0] else ""
        settings: Result = {key: float(value) for key, value in (word.split("=") for word in words)}
        if name == "own":
            return list(online_levels(self.model, **settings))
        if name == "online":
            head = self.model.get_output_embeddings()
            paths = tuple(n for n, m in self.model.named_modules() if is_linear(m) and m is not head)
            return [OnlineLevel("all", int(period), paths, lr=rate, **settings)]
        count = 1 if name == "frozen" else int(name.removeprefix("levels-"))
        lowest, found = int(period or 256), online_levels(self.model)
        periods = [lowest * 4 ** min(i, count - 1) for i in range(len(found))]
        rate = 0.0 if name == "frozen" else rate
        return [replace(level, period=p, lr=rate, **settings) for level, p in zip(found, periods, strict=True)]


class Timed:
    """A reader that keeps count of the processor seconds and bytes of what it reads; being asked is not counted."""

    def __init__(self, reader: Reader) -> None:
        self.bits, self._read, self.seconds, self.bytes = reader.bits, reader.read, 0.0, 0

    def read(self, text: str) -> np.ndarray:
        started = time.process_time()
        bits = self._read(text)
        self.seconds, self.bytes = self.seconds + time.process_time() - started, self.bytes + len(text.encode())
        return bits


def novel(data: Path, name: str) -> str:
    rows = map(json.loads, plain(data, "books_eltec_eng/eltec_eng_val.jsonl.xz").splitlines())
    return next(row["text"] for row in rows if row["id"] == name)


def plain(data: Path, name: str) -> str:
    return lzma.decompress((data / name).read_bytes()).decode()


def domains(data: Path) -> dict[str, str]:
    """By name, the text of each, the one that the model was trained on first."""
    source = b"\n".join(document.data for document in standard_library().held_out).decode(errors="ignore")
    return {
        "source": source,
        "Doyle": novel(data, NOVELS[0]),
        "WikiText": plain(data, "wikitext2/wikitext2_valid.txt.xz"),
        "Shakespeare": plain(data, "tinyshakespeare/tinyshakespeare.txt.xz"),
        "Hornung": novel(data, NOVELS[1]),
    }


def read_domains(reader: OnlineReader, args: argparse.Namespace) -> Result:
    """The matrix of bits per byte, what was forgotten, and bits per token by position."""
    texts, size, asked = domains(args.data), args.bytes, args.asked
    read = [[text[APART : APART + size]] for text in texts.values()]
    held_out = [text[2 * APART + size :][:asked] for text in texts.values()]
    timed = Timed(reader)
    measured, curves = domains_in_sequence(timed, read, held_out)
    return {
        "processor_ms_per_byte": round(1e3 * timed.seconds / timed.bytes, 3),
        "parameters": reader.learner.model.num_parameters(),
        "domains": list(texts),
        "bits_per_byte": measured.round(4).tolist(),
        "forgotten": forgotten(measured).round(5).tolist(),
        "first_against_before": [round(float(bits / measured[0, 0] - 1), 5) for bits in measured[1:, 0]],
        "curves": [curve[1:].round(3).tolist() for curve in curves],  # a stream's first token has no bits
    }


def read_facts(reader: OnlineReader, args: argparse.Namespace) -> Result:
    """The share of right answers before, just after, and after other text as well."""
    entries = encyclopaedia(args.seed, args.people, args.choices)
    other = [novel(args.data, NOVELS[0])[APART : APART + args.bytes]]
    tokens = sum(len(entry.article.encode()) for entry in entries)
    return {"recall": new_facts(reader, entries, other), "bytes": tokens, "questions": 4 * args.people}


def read_languages(reader: OnlineReader, args: argparse.Namespace) -> Result:
    """Rows: after the first and after the second language; columns: the share right in each."""
    taught, asked = meanings(args.seed, args.sentences), meanings(args.seed + 1, args.people)
    matrix, before = languages_in_sequence(reader, invent(args.seed), taught, asked, args.choices)
    return {"accuracies": matrix.tolist(), "before": before.tolist()}


def read_and_write(reader: OnlineReader, args: argparse.Namespace) -> Result:
    """What each way of consolidation reports, without and with rehearsal of source that the model was trained on."""
    texts, size = domains(args.data), args.bytes
    chunks = [reader.tokens(texts[name][APART : APART + size])[:size] for name in ("Doyle", "Hornung")]
    length = min(len(chunk) for chunk in chunks)
    streams = torch.stack([chunk[:length] for chunk in chunks])
    reader.learner.read(streams)
    known = b"\n".join(document.data for document in standard_library().train)[:size].decode(errors="ignore")
    keep, rehearse = (reader.tokens(text)[None] for text in (texts["source"][: args.asked], known))
    found = {}
    for method, again in (
        ("average", False),
        ("replay", False),
        ("distill", False),
        ("replay", True),
        ("distill", True),
    ):
        _, report = consolidate(
            reader.learner.state, reader.learner.model, chunks=streams, method=method, keep=keep,
            rehearse=rehearse if again else None,
        )  # fmt: skip
        found[method + (" and rehearsal" if again else "")] = asdict(report)
    return {"consolidated": found}


BENCHMARKS: dict[str, Callable[[OnlineReader, argparse.Namespace], Result]] = {
    "domains": read_domains, "facts": read_facts, "languages": read_languages,
    "written": read_and_write,
}  # fmt: skip


def kinds(run: Run, benchmark: str, periods: Sequence[int]) -> list[str]:
    """The readers of a run, the frozen one first."""
    counts = range(1, 1 + len(online_levels(run.model)))
    if benchmark == "written":
        return [f"levels-{len(counts)} {periods[0]}"]
    lowest = periods if benchmark == "facts" else periods[:1]
    return ["frozen", *(f"levels-{n} {p}" for p in lowest for n in counts), f"online {periods[0]}"]


def tuned(run: Run, kind: str, args: argparse.Namespace) -> float:
    """The rate with which a novel that nothing else uses costs fewest bits on its second half, read once."""
    rates = [0.0] if kind.split()[0] in ("frozen", "own") else args.rates
    if len(rates) == 1:
        return rates[0]
    text, costs = novel(args.data, TUNING)[APART : APART + args.tune_bytes], {}
    for rate in rates:
        bits = run.reader(kind, rate).read(text)
        costs[rate] = float(bits[len(bits) // 2 :].mean())
    return min(costs, key=lambda rate: (costs[rate], rate))


def gains(frozen: Result, adapted: Result) -> Result:
    """While it reads, of bits per token: by position, and the share gained on the second half of each domain."""
    pairs = [(np.array(a), np.array(f)) for a, f in zip(adapted["curves"], frozen["curves"], strict=True)]
    halves = [(a[len(a) // 2 :], f[len(f) // 2 :]) for a, f in pairs]
    return {
        "gain_by_position": [gain_by_position(a, f, len(a) // WINDOWS).round(4).tolist() for a, f in pairs],
        "gain_second_half": [round(float(1 - a.mean() / f.mean()), 5) for a, f in halves],
    }


def measure(args: argparse.Namespace) -> Result:
    """Every reader of every run that the file does not hold yet, which grows by each."""
    path: Path = args.out
    found: Result = json.loads(path.read_text()) if path.exists() else {**about(), "results": {}}
    for folder in args.runs:
        run = Run(folder)
        for kind in args.kinds or kinds(run, args.benchmark, args.periods):
            name, started = f"{run.name} {kind}", time.perf_counter()
            if name in found["results"]:
                continue
            rate = tuned(run, kind, args)
            result = {"rate": None if kind.startswith("own") else rate} | BENCHMARKS[args.benchmark](
                run.reader(kind, rate), args
            )
            found["results"][name] = result | {"seconds": round(time.perf_counter() - started)}
            path.write_text(json.dumps(found) + "\n")
            print(f"{name}: {found['results'][name]['seconds']} s", flush=True)
    return found


def short(found: Result) -> Result:
    """Without the curves; of domains, with the gains over the run's frozen reader in their place."""
    results = {}
    for name, result in found["results"].items():
        results[name] = {k: v for k, v in result.items() if k not in ("curves", "domains")}
        if "curves" in result:
            results[name] |= gains(found["results"][name.split()[0] + " frozen"], result)
    return {**found, "results": results}


def table(found: Result) -> str:
    """One line for each reader."""
    return "\n".join(f"{name}: {json.dumps(result)}" for name, result in short(found)["results"].items())


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("runs", type=Path, nargs="+", help="folders that nestlearn train wrote")
    parser.add_argument("--kinds", nargs="+", help='readers, "levels-3 256" for example; all where absent')
    parser.add_argument("--periods", type=int, nargs="+", help="lowest periods, tokens; 256, for facts 512 2048 8192")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--tune-bytes", type=int, default=8_192)
    parser.add_argument("--bytes", type=int, default=16_384, help="read of each domain, or after the facts")
    parser.add_argument("--asked", type=int, default=8_192, help="bytes of each domain that are only measured")
    parser.add_argument("--people", type=int, default=20, help="articles of the encyclopaedia; sentences asked")
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=150, help="taught of each language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, required=True, help="JSON; readers that it holds are not run again")
    parser.add_argument("--short", type=Path, help="JSON as well, with what is printed: no curves")
    args = parser.parse_args(argv)
    args.periods = args.periods or ([512, 2048, 8192] if args.benchmark == "facts" else [256])
    return args


def main() -> None:
    torch.set_num_threads(1)
    args = arguments()
    found = measure(args)
    print(table(found))
    if args.short:
        args.short.write_text(json.dumps(short(found)) + "\n")


if __name__ == "__main__":
    main()
