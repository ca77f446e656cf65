"""What HOPE's memory is worth on real text: the full layer against the same layer with rate 0.

    python benchmarks/quality/text_memory.py --out benchmarks/results/text-memory.json
    python benchmarks/quality/text_memory.py --models hope --text a.txt b/ --memory chunk=32

Bytes of the standard library, T = 1024, 2 layers of width 128, 950 steps of 4 sequences (3.9M tokens), AdamW with
warm-up and cosine, every parameter stepping at every step. Both models begin with equal weights and read the same
batches.
Measured: held-out bits per byte (windows of T from a fresh state), and the loss by position in the window.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.batches import Batches
from nestlearn.data.text import Corpus, read_texts, standard_library
from nestlearn.data.tokens import load_tokenizer, tokenize
from nestlearn.eval.perplexity import Perplexity, bits_per_byte

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about, setting

RATE_ZERO = {"rate_max": 0.0, "retention": False}
MODELS = ("rate 0", "hope")
BUCKETS = ((0, 16), (16, 64), (64, 256), (256, 512), (512, 768), (768, 1024))


class Curves(NamedTuple):
    """train: (step, bits per byte, gradient norm); held_out: (step, bits per byte of a quarter of the text)."""

    train: list[tuple[int, float, float]]
    held_out: list[tuple[int, float]]


def make_model(name: str, memory: Mapping[str, Any], width: int = 128, seed: int = 0) -> HopeForCausalLM:
    """The full model, or its twin with rate 0: the same parameters, of the same initial values."""
    torch.manual_seed(seed)
    settings = {**memory, **(RATE_ZERO if name == "rate 0" else {})}
    return HopeForCausalLM(
        HopeConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=3 * width,
            levels=[1],
            initializer_range=width**-0.5,
            memory=settings,
        )
    )


def train(
    name: str, batches: Batches, held_out: np.ndarray, args: argparse.Namespace
) -> tuple[HopeForCausalLM, Curves]:
    """Train one model and note how it went."""
    model = make_model(name, dict(args.memory))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    state, curve, early, begin = batches.initial(), [], [], time.perf_counter()
    for step in range(1, args.steps + 1):
        batch, state = batches.next(state)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(step, args.steps)
        loss = cast(Tensor, nn.functional.cross_entropy(model(batch.inputs, use_cache=False).logits.mT, batch.targets))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0 or step == 1:
            curve.append((step, round(loss.item() / math.log(2), 4), round(norm.item(), 3)))
        if step % args.measure_every == 0 and step < args.steps:
            early.append((step, round(measure(model, held_out[: args.held_out // 4], args).bits_per_byte, 4)))
            print(f"  {name} step {step}: {early[-1][1]} held-out bits/byte", flush=True)
        if step % 50 == 0:
            recent = sum(bits for _, bits, _ in curve[-5:]) / 5
            speed = step * batch.inputs.numel() / (time.perf_counter() - begin)
            print(f"  {name} step {step}: {recent:.3f} bits/byte, {speed:.0f} tokens/s", flush=True)
    return model, Curves(curve, early)


def measure(model: HopeForCausalLM, tokens: np.ndarray, args: argparse.Namespace) -> Perplexity:
    """Held-out bits per byte, windows of T from a fresh state."""
    return bits_per_byte(
        model, tokens, load_tokenizer("bytes"), sequence_length=args.length, batch_size=8, max_tokens=args.held_out
    )


def schedule(step: int, steps: int, warmup: float = 0.05, floor: float = 0.05) -> float:
    """Warm-up, then cosine to ``floor``."""
    ramp = max(1, int(warmup * steps))
    if step <= ramp:
        return step / ramp
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def run(name: str, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one model."""
    tokenizer = load_tokenizer("bytes")
    batches = Batches(tokenize(corpus.train, tokenizer), args.batch, args.length, args.seed)
    held_out = tokenize(corpus.held_out, tokenizer)
    begin = time.perf_counter()
    model, curves = train(name, batches, held_out, args)
    seconds = time.perf_counter() - begin
    result = measure(model, held_out, args)
    buckets = {f"{a}-{b}": round(float(result.by_position[a:b].mean()), 4) for a, b in BUCKETS if b <= args.length}
    print(
        f"{name}: {result.bits_per_byte:.4f} bits/byte on {result.bytes:,} held-out bytes, {seconds:.0f} s", flush=True
    )
    return {
        "bits_per_byte": round(result.bits_per_byte, 5),
        "by_position": buckets,
        "held_out_bytes": result.bytes,
        "trained_tokens": args.steps * args.batch * args.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "memory": model.config.memory,
        "curves": curves._asdict(),
        "position_bits": [round(float(b), 4) for b in np.asarray(result.by_position)],
    }


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """Held-out bits per byte, in all and by position."""
    buckets = list(next(iter(results.values()))["by_position"])
    lines = ["| model | bits per byte | " + " | ".join(buckets) + " |", "|---" * (len(buckets) + 2) + "|"]
    for name, result in results.items():
        cells = [f"{result['by_position'][b]:.3f}" for b in buckets]
        lines.append(f"| {name} | {result['bits_per_byte']:.4f} | " + " | ".join(cells) + " |")
    if set(MODELS) <= set(results):
        ours, zero = results["hope"], results["rate 0"]
        gains = [1 - ours["by_position"][b] / zero["by_position"][b] for b in buckets]
        gain = 1 - ours["bits_per_byte"] / zero["bits_per_byte"]
        lines.append(f"| gain | {gain:.1%} | " + " | ".join(f"{g:.1%}" for g in gains) + " |")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--text", type=Path, nargs="+", help="files or folders; the standard library where absent")
    parser.add_argument("--steps", type=int, default=950)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=300_000, help="held-out tokens to measure on")
    parser.add_argument(
        "--memory", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="settings of HOPE's memory"
    )
    parser.add_argument("--measure-every", type=int, default=190, help="steps between two measurements on the way")
    parser.add_argument("--out", type=Path, help="JSON; results of other models that it holds already are kept")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    corpus = read_texts(args.text) if args.text else standard_library()
    kept = json.loads(args.out.read_text())["results"] if args.out and args.out.exists() else {}
    facts = {**about(), "text": corpus.description}
    for name in args.models:
        kept[name] = run(name, corpus, args) | {"command": facts["command"]}
        if args.out:
            args.out.write_text(json.dumps({**facts, "results": kept}) + "\n")
    print(table(kept))


if __name__ == "__main__":
    main()
