"""Every model on novels: `nestlearn compare` with the settings of our results, and one knob, the tokens.

    python benchmarks/quality/language_model.py --tokens 5M --out runs/novels
    python benchmarks/quality/language_model.py --tokens 5M --out runs/novels    # goes on where it was stopped

    python benchmarks/quality/language_model.py --out runs/novels --draw novels.png    # what is there

Text: ../shared/data/books_eltec_eng or $NESTLEARN_DATA/books_eltec_eng, English novels 1840–1919: 74 to train on, 10 to
choose rates and to measure on (the novels of the test split are neither here nor read). Bytes, T = 512, 8 sequences per
step, AdamW, 3 million parameters. Measured: bits per byte of the first 20,000 bytes of each of the 10 novels, in
windows of T from a fresh state each, and read from the first byte to the last as one stream, frozen and while the
model's levels learn from it every 64 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nestlearn.cli import main as nestlearn

DATA = Path(os.environ.get("NESTLEARN_DATA", "../shared/data"))  # from the root of the checkout
MODELS = ("hope", "transformer", "retnet", "deltanet", "gated_deltanet", "titans", "ttt_mlp", "samba")
TEXTS = ("eltec_eng_train.jsonl.xz", "eltec_eng_val.jsonl.xz")
SETTINGS = (
    "batch_size=8",
    "sequence_length=512",
    "held_out_per_document=20_000",
    "held_out_tokens=1M",  # more than there are: all ten beginnings
)


def words(args: argparse.Namespace) -> list[str]:
    """The command line."""
    train, held_out = (str(Path(args.data) / "books_eltec_eng" / name) for name in TEXTS)
    return [
        *("compare", "--models", *args.models, "--params", args.params, "--tokens", args.tokens),
        *("--text", train, "--held-out", held_out, "--seeds", str(args.seeds), "--rates", *args.rates),
        *("--online-rates", *args.online_rates, "--online-period", str(args.online_period)),
        *("--out", str(args.out)),
        *(["--tune-tokens", args.tune_tokens] if args.tune_tokens else []),
        *("--set", *SETTINGS, *args.set),
    ]


def draw(results: Path, path: Path) -> None:
    """Bits per byte of every model, best first: in windows, as a stream, and learning from it."""
    from matplotlib import pyplot  # a dev dependency, for pictures only

    models = json.loads(results.read_text())["models"]
    models = sorted(models, key=lambda m: m["bits_per_byte"]["mean"] or math.inf)
    ways = {
        "windows": [m["bits_per_byte"]["mean"] for m in models],
        "one stream": [m["stream"]["frozen"]["mean"] for m in models],
        "one stream, learning from it": [m["stream"]["learning"]["mean"] for m in models],
    }
    known = [v for values in ways.values() for v in values if v]
    low, high = 0.95 * min(known), 1.06 * max(known)
    figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
    for number, (way, values) in enumerate(ways.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(models))]
        bars = axes.bar(places, [v or low for v in values], 0.26, label=way)
        axes.bar_label(bars, [f"{v:.3f}" if v else "broke down" for v in values], rotation=90, padding=3, fontsize=8)
    axes.set_ylim(low, high)
    axes.set_xticks(range(len(models)), [m["model"].partition(":")[0] for m in models])
    axes.set_ylabel("bits per byte")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="5M")
    parser.add_argument("--tune-tokens", help="of each rate; a fifth of the tokens unless given")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--params", default="3M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", default=["2e-3", "4e-3", "8e-3"])
    parser.add_argument("--online-rates", nargs="+", default=["0.5", "1"])
    parser.add_argument("--online-period", type=int, default=64)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--set", nargs="+", default=[], help="other settings of the comparison, as key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draw", type=Path, metavar="PNG", help="draw the results that --out holds; nothing is run")
    return parser.parse_args(argv)


def main() -> int:
    args = arguments()
    if args.draw is None:
        return nestlearn(words(args))
    draw(args.out / "results.json", args.draw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
