"""What each part of HOPE is worth (NL Table 6): every variant trained as `nestlearn compare` trains models.

    python benchmarks/quality/ablation.py --tokens 2M --out runs/ablation
    python benchmarks/quality/ablation.py --tokens 2M --out runs/ablation --only hope "no DGD" "no CMS"

On the novels of `language_model.py`, at 1 million parameters: equal parameters, text, order and search for a rate. The
paper's HOPE has momentum and static queries; ours has no momentum unless told, so here momentum 0.9 is the variant. A
chunk of 1 is a loop over the tokens: it is left out unless ``--slow``. Goes on where it was stopped; writes
OUT/ablation.json beside what `compare` writes, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.compare.plan import make_plan, parse_rates
from nestlearn.compare.results import cost, spread
from nestlearn.compare.run import run_comparison
from nestlearn.train.config import parse_count

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about
from benchmarks.quality.language_model import DATA, SETTINGS, TEXTS

VARIANTS = {
    "HOPE": "hope",
    "no DGD": "hope:memory.dgd=false",
    "momentum 0.9": "hope:memory.momentum=0.9",
    "no retention": "hope:memory.retention=false",
    "no CMS": "hope:levels=[1]",
    "static k": 'hope:memory.adaptive=["v","eta","alpha"]',
    "static v": 'hope:memory.adaptive=["k","eta","alpha"]',
    "static k, v, η, α": "hope:memory.adaptive=[]",
    "adaptive q": 'hope:memory.adaptive=["k","v","eta","alpha","q"]',
    "chunk 1": "hope:memory.chunk=1",
    "chunk 16": "hope:memory.chunk=16",
    "chunk 256": "hope:memory.chunk=256",
    "read after the write": 'hope:memory.read="after"',
    "truncated at 1 chunk": "hope:memory.truncate=1",
    "target norm none": 'hope:memory.target_norm="none"',
}  # chunk 64 is HOPE itself
SLOW = ("chunk 1",)


def table(results: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """A row for each variant in the order of the list above; differences are of the same seed, HOPE's taken off."""
    models = {names[model["model"]]: model for model in results["models"]}
    lines = ["| variant | bits per byte | above HOPE | rate | training tokens/s |", "|---" * 5 + "|"]
    for name, model in models.items():
        bits, above = shown(model["bits_per_byte"]), shown(difference(model, models["HOPE"]), "+")
        speed = cost(model, "train_tokens_per_second")
        lines.append(f"| {name} | {bits} | {above if name != 'HOPE' else ''} | {model['rate'] or '–'} | {speed} |")
    return "\n".join(lines)


def difference(model: Mapping[str, Any], hope: Mapping[str, Any]) -> dict[str, Any]:
    """Of bits per byte, paired by seed: mean and standard deviation."""
    bits = [{run["seed"]: run["bits_per_byte"] for run in m["runs"]} for m in (model, hope)]
    both = [(bits[0].get(seed), value) for seed, value in bits[1].items()]
    return spread([None if a is None or b is None else a - b for a, b in both])


def shown(value: Mapping[str, Any], sign: str = "") -> str:
    if value["mean"] is None:
        return "broke down"
    return f"{value['mean']:{sign}.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """Variants by label, HOPE always among them."""
    wanted = args.only or [name for name in VARIANTS if args.slow or name not in SLOW]
    return {label: name for name, label in VARIANTS.items() if name in wanted or name == "HOPE"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--tune-tokens", help="of each rate; a fifth of the tokens unless given")
    parser.add_argument("--params", default="1M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", default=["2e-3", "4e-3", "8e-3"])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--slow", action="store_true", help="chunk 1 too")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--set", nargs="+", default=[], help="other settings for all, as key=value")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    names = chosen(args)
    train, held_out = (str(args.data / "books_eltec_eng" / name) for name in TEXTS)
    given = {"text": (train,), "held_out": (held_out,), "tokens": parse_count(args.tokens)}
    plan = make_plan(
        tuple(names),
        parse_count(args.params, "parameters"),
        given,
        seeds=args.seeds,
        rates=parse_rates(tuple(args.rates)),
        tune_tokens=parse_count(args.tune_tokens) if args.tune_tokens else None,
        overrides=(*SETTINGS, *args.set),
    )
    results = run_comparison(plan, args.out, lambda text: print(text, flush=True))
    made = {"about": about(), "variants": {name: label for label, name in names.items()}, **results}
    (args.out / "ablation.json").write_text(json.dumps(made, indent=1) + "\n")
    print(table(results, names))


if __name__ == "__main__":
    main()
