"""Every model on novels: `nestlearn compare` with the settings of our results, and one knob, the tokens.

    python benchmarks/quality/language_model.py --tokens 5M --out runs/novels
    python benchmarks/quality/language_model.py --tokens 5M --out runs/novels    # goes on where it was stopped

Text: ../shared/data/books_eltec_eng or $NESTLEARN_DATA/books_eltec_eng, English novels 1840–1919: 74 to train on, 10 to
choose rates and to measure on (the novels of the test split are neither here nor read). Bytes, T = 512, 8 sequences per
step, AdamW, 3 million parameters. Measured: bits per byte of the first 20,000 bytes of each of the 10 novels.
"""

from __future__ import annotations

import argparse
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
        *("--out", str(args.out)),
        *(["--tune-tokens", args.tune_tokens] if args.tune_tokens else []),
        *("--set", *SETTINGS, *args.set),
    ]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="5M")
    parser.add_argument("--tune-tokens", help="of each rate; a fifth of the tokens unless given")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--params", default="3M")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", default=["2e-3", "4e-3", "8e-3"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--set", nargs="+", default=[], help="other settings of the comparison, as key=value")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(nestlearn(words(arguments())))
