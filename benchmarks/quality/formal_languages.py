"""Formal languages: what a model learns from strings of at most 50 symbols, and whether it holds up to 100.

    python benchmarks/quality/formal_languages.py --out benchmarks/results/formal-languages.json
    python benchmarks/quality/formal_languages.py --models hope --languages parity --rates 3e-3 --seeds 1

Strings and targets are described in `nestlearn/eval/synthetic/languages.py`; ``--data`` reads them from files instead.
A target is a set of symbols: the model's logits are as many yes-or-no questions (binary cross-entropy).
A string counts as right only if every answer after each of its symbols is right.

The Transformer is tried with a start symbol, too, which tells it where it is. HOPE has one layer and the baselines two,
which makes it the smallest of them. Every model is trained at every learning rate of one grid until the training loss
is below 1e-4 nats and all validation strings are right, at most ``--steps`` steps; the rate is chosen by the validation
strings (length at most 50), never by the long ones. All of this with the first seed; the others take its best rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import setting
from benchmarks.quality.synthetic import BASELINES, Results, draw, make_model, table, train
from nestlearn import HopeForCausalLM
from nestlearn.eval.synthetic import LANGUAGES, Example, encode, generate_language, read_language

# A sign that flips needs the transition α − (1 + λ) gain ‖x‖² to come close to −1: objective "mix", λ near 1, gradients
# that are not stale (memory_chunk 1), and large features, so that one write turns w1 around without erasing w2. That is
# the first head; counting needs writes that add a little to what is there, the second.
HOPE_MEMORY: dict[str, Any] = {
    "chunk": 64,
    "memory_chunk": 1,
    "objective": "mix",
    "mix_start": (0.9, 0.1),
    "w2_scale": 10.0,
    "rate_start": (0.1, 1e-3),
    "retain_start": 0.9999,
    "recompute": False,
}
# Rotary positions are relative: without a start symbol a Transformer cannot tell places of identical symbols apart.
STARTED = "transformer, start symbol"
SETTINGS: dict[str, dict[str, Any]] = {**BASELINES, STARTED: BASELINES["transformer"]}
MODELS = ("hope", *SETTINGS)
START = 4  # the id of the start symbol, behind those of every language
ENOUGH = 1e-4
Batch = tuple[Tensor, Tensor, Tensor]


class Started(nn.Module):
    """A model that reads a start symbol before each string."""

    def __init__(self, model: HopeForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, use_cache: bool) -> Any:
        """As the model, for the symbols of the string alone."""
        said = self.model(F.pad(ids, (1, 0), value=START), use_cache=use_cache)
        return said.__class__(logits=said.logits[:, 1:])


def batch_of(name: str, examples: Sequence[Example]) -> Batch:
    """ids (B, T), right answers (B, T, answers) and which places are real (B, T); short strings are filled up."""
    rows = [encode(name, example) for example in examples]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    right = torch.zeros(len(rows), longest, len(LANGUAGES[name].answers))
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (symbols, allowed) in enumerate(rows):
        ids[row, : len(symbols)], real[row, : len(symbols)] = torch.from_numpy(symbols), True
        right[row, : len(symbols)] = torch.from_numpy(allowed).float()
    return ids, right, real


def batches(name: str, examples: Sequence[Example], size: int, seed: int) -> Iterator[Batch]:
    """Without end, in a new order each time."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(examples))
        for begin in range(0, len(order) - size + 1, size):
            yield batch_of(name, [examples[i] for i in order[begin : begin + size]])


def answers(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    return model(ids, use_cache=False).logits[..., :count]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean binary cross-entropy of an answer, in nats."""
    ids, right, real = batch
    logits = answers(model, ids, right.shape[-1])
    return F.binary_cross_entropy_with_logits(logits[real], right[real])


@torch.no_grad()
def accuracy(model: nn.Module, name: str, examples: Sequence[Example], size: int = 256) -> tuple[float, float]:
    """(share of strings that are right throughout, share of symbols after which every answer is right)."""
    ordered = sorted(examples, key=lambda e: len(e.source))
    strings = symbols = total = 0
    for begin in range(0, len(ordered), size):
        ids, right, real = batch_of(name, ordered[begin : begin + size])
        good = ((answers(model, ids, right.shape[-1]) > 0) == right.bool()).all(-1) | ~real
        strings += int(good.all(-1).sum())
        symbols, total = symbols + int((good & real).sum()), total + int(real.sum())
    return strings / len(ordered), symbols / total


def run(args: argparse.Namespace, model_name: str, language: str, rate: float, seed: int) -> dict[str, Any]:
    """Train one model and test it."""
    splits = read_language(language, args.data) if args.data else generate_language(language, args.data_seed)
    near, far = (splits[split][: args.tests] for split in ("val_in_dist", "test_longer"))
    settings: Mapping[str, Any] = SETTINGS.get(model_name, {"memory": {**HOPE_MEMORY, **dict(args.memory)}})
    layers = args.layers if model_name in SETTINGS else args.hope_layers
    model = make_model(settings, vocabulary=START + 1, width=args.width, layers=layers, heads=args.heads, seed=seed)
    if model_name == STARTED:
        model = Started(model)
    feed = batches(language, splits["train"], args.batch, seed)
    done = train(
        model,
        lambda: loss_of(model, next(feed)),
        lambda: accuracy(model, language, near)[0] == 1.0,
        rate=rate,
        steps=args.steps,
        enough=ENOUGH,
    )
    (near_strings, near_symbols), (far_strings, far_symbols) = (accuracy(model, language, e) for e in (near, far))
    return {
        "validation": near_strings,
        "validation symbols": near_symbols,
        "longer": far_strings,
        "longer symbols": far_symbols,
        **done,
    }


def rates_for(results: Results, args: argparse.Namespace, model: str, language: str, seed: int) -> list[float]:
    """The whole grid for the first seed, its best rate for the others."""
    best = results.best(model=model, language=language, seed=args.seeds[0])
    return args.rates if seed == args.seeds[0] or best is None else [best["rate"]]


def found(
    results: Results, models: Sequence[str], languages: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[float]]:
    """Share of whole strings, at most 50 and 51 to 100 symbols, of each model: the mean of each seed's best rate."""
    cells: dict[str, list[float]] = {model: [] for model in models}
    for model in models:
        for language in languages:
            runs = [results.best(model=model, language=language, seed=seed) for seed in seeds]
            for split in ("validation", "longer"):
                cells[model].append(float(np.mean([r[split] for r in runs if r is not None] or [np.nan])))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--languages", nargs="+", choices=list(LANGUAGES), default=list(LANGUAGES))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hope-layers", type=int, default=1, help="HOPE takes 20 times a baseline's time")
    parser.add_argument("--tests", type=int, default=500, help="strings of each test, where there are as many")
    parser.add_argument("--data", type=Path, help="folder of NAME.jsonl.gz; without it the strings are generated")
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--memory", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="draw what --out holds")
    args = parser.parse_args()
    names = ("steps", "batch", "width", "heads", "layers", "hope_layers", "tests", "data_seed", "memory")
    results = Results(args.out, {name: getattr(args, name) for name in names} | {"hope memory": HOPE_MEMORY})
    for seed in args.seeds:
        for language in args.languages:
            for model in args.models:
                for rate in rates_for(results, args, model, language, seed):
                    key = {"model": model, "language": language, "rate": rate, "seed": seed}
                    results.once(key, lambda k=key: run(args, k["model"], k["language"], k["rate"], k["seed"]))
    results.write()
    cells = found(results, args.models, args.languages, args.seeds)
    columns = [f"{language}{split}" for language in args.languages for split in (" ≤ 50", " 51–100")]
    print(table(cells, columns))
    if args.picture:
        draw(args.picture, cells, columns, "strings that are right throughout")


if __name__ == "__main__":
    main()
