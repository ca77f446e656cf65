"""A byte language model with every optimizer: loss at equal tokens and at equal time, each at its own best rate.

    python benchmarks/quality/optimizers/language_model.py                      # the Transformer: 60 runs
    python benchmarks/quality/optimizers/language_model.py --model hope --steps 200 --rates 3e-3 1e-2 3e-2
    python benchmarks/quality/optimizers/language_model.py --optimizers AdamW "M3 slow_weight=0" --seeds 1

1. Every optimizer at every rate of one grid, with one seed; AdamW first, since the embeddings, norms and biases of the
   others are stepped by AdamW at AdamW's best rate.   2. Each at its best rate with all seeds: equal tokens.
3. The same with the tokens that take as long as AdamW's, by the median of steps that were timed in turn: equal time.
   Seconds are of the one core that the process has, so that other processes on the machine do not count.

Text is the source of the Python standard library, or ``--text``; loss is held-out bits per byte from a fresh state.
Two layers; batches of 2 sequences of 256 bytes; warm-up over 5 % and a cosine to 5 %; clipped at norm 1; no weight
decay. Runs that are in the results file are not run again: the script may be stopped and started at will, on another
day with ``--out``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data.batches import Batches
from nestlearn.data.text import read_texts, standard_library
from nestlearn.data.tokens import load_tokenizer, tokenize
from nestlearn.eval.perplexity import bits_per_byte
from nestlearn.optim import Leveled

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.quality.optimizers.common import Results, dated, figure, groups_for, make, mean_and_deviation

MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"mixer": "attention", "num_attention_heads": 2, "intermediate_size": 192, "levels": [1]},
    "hope": {"num_attention_heads": 1, "intermediate_size": 224, "memory": {"hidden_width": 32}, "levels": [
        {"name": "fast", "period": 512, "hidden_size": 128},
        {"name": "middle", "period": 2_048, "hidden_size": 64},
        {"name": "slow", "period": 8_192, "hidden_size": 32}]},
}  # fmt: skip
DEFAULT = ["AdamW", "Muon", "M3", "DeltaMomentum", "DMGD"]
BATCH, LENGTH, WIDTH = 2, 256, 64


def build(model: str, name: str, lr: float, adamw_lr: float, seed: int) -> tuple[HopeForCausalLM, Leveled]:
    """Equal seeds give equal initial weights to all optimizers."""
    torch.manual_seed(seed)
    network = HopeForCausalLM(HopeConfig(vocab_size=256, hidden_size=WIDTH, num_hidden_layers=2, **MODELS[model]))
    groups = groups_for(name, network, lr, adamw_lr)
    for group in groups:
        group["peak"] = group["lr"]
    return network, Leveled(make(name, lr), groups, tokens_per_step=BATCH * LENGTH)


def learn(network: HopeForCausalLM, optimizer: Leveled, batch: Any) -> torch.Tensor:
    """One step; the loss before it, in bits per byte."""
    loss = F.cross_entropy(network(batch.inputs, use_cache=False).logits.mT, batch.targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    network.after_step(set(optimizer.fired))
    optimizer.zero_grad()
    return loss.detach() / math.log(2)


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate: warm-up over 5 %, then a cosine to 5 %."""
    ramp = max(1, steps // 20)
    done = (step - ramp) / max(1, steps - ramp)
    return step / ramp if step <= ramp else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def train(key: dict[str, Any], text: tuple[np.ndarray, np.ndarray], held_out: int) -> dict[str, Any]:
    """One run; a loss that is not finite ends it as infinitely bad."""
    network, optimizer = build(key["model"], key["optimizer"], key["lr"], key["adamw_lr"], key["seed"])
    batches = Batches(text[0], BATCH, LENGTH, key["seed"])
    state, losses, begin = batches.initial(), [], time.process_time()
    for step in range(1, key["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, key["steps"])
        batch, state = batches.next(state)
        losses.append(learn(network, optimizer, batch).item())
        if not losses[-1] < 20:
            return {"bits": math.inf, "seconds": time.process_time() - begin, "train": losses[::10]}
    seconds = time.process_time() - begin
    tokenizer = load_tokenizer("bytes")
    bits = bits_per_byte(network, text[1], tokenizer, sequence_length=LENGTH, batch_size=16, max_tokens=held_out)
    means = [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)]
    result = {"bits": round(bits.bits_per_byte, 4), "seconds": round(seconds, 1), "train": means}
    print({k: v for k, v in (key | result).items() if k != "train"}, flush=True)
    return result


def step_seconds(model: str, names: list[str], rates: dict[str, float], text: np.ndarray) -> dict[str, float]:
    """Median seconds of a training step, the optimizers taking turns."""
    pairs = {name: build(model, name, rates[name], rates["AdamW"], 0) for name in names}
    batches, seconds = Batches(text, BATCH, LENGTH, 0), {name: [] for name in names}
    state = batches.initial()
    for turn in range(45):
        batch, state = batches.next(state)
        for name, (network, optimizer) in pairs.items():
            begin = time.process_time()
            learn(network, optimizer, batch)
            if turn >= 5:
                seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(s) for name, s in seconds.items()}


def sweep(args: argparse.Namespace, results: Results, text: Any) -> dict[str, float]:
    """Best rate of each optimizer on seed 0; AdamW's, found first, is the rate of what the others leave to AdamW."""
    best = {"AdamW": args.adamw_rate} if args.adamw_rate else {}
    for name in sorted(
        {*args.optimizers, *([] if args.adamw_rate else ["AdamW"])}, key=["AdamW", *args.optimizers].index
    ):
        runs = []
        for lr in args.rates:
            key = run_key(args, name, lr, best.get("AdamW", lr), 0, args.steps)
            runs.append(results.run(key, lambda key=key: train(key, text, args.held_out)))
        best[name] = min(runs, key=lambda run: run["bits"])["lr"]
    return best


def run_key(args: argparse.Namespace, name: str, lr: float, adamw_lr: float, seed: int, steps: int) -> dict[str, Any]:
    """What makes two runs the same run."""
    return {"model": args.model, "optimizer": name, "lr": lr, "adamw_lr": adamw_lr, "seed": seed, "steps": steps}


def compare(
    args: argparse.Namespace, results: Results, text: Any, best: dict[str, float], steps: dict[str, int]
) -> dict[str, Any]:
    """Mean and deviation over the seeds, and the runs' training curves."""
    table = {}
    for name in args.optimizers:
        keys = [run_key(args, name, best[name], best["AdamW"], seed, steps[name]) for seed in range(args.seeds)]
        runs = [results.run(key, lambda key=key: train(key, text, args.held_out)) for key in keys]
        mean, deviation = mean_and_deviation(run["bits"] for run in runs)
        table[name] = {"lr": best[name], "steps": steps[name], "mean": round(mean, 4), "deviation": round(deviation, 4)}
        print(name, table[name], flush=True)
    return table


def draw(args: argparse.Namespace, results: Results, best: dict[str, float], tables: dict[str, Any]) -> None:
    """Rates, learning curves, and both comparisons."""
    fig, (rates, curves, final) = figure(3)
    for number, name in enumerate(args.optimizers):
        color = f"C{number}"
        swept = [r for r in results.find(model=args.model, optimizer=name, seed=0, steps=args.steps) if r["bits"] < 6]
        swept = sorted((r["lr"], r["bits"]) for r in swept if name == "AdamW" or r["adamw_lr"] == best["AdamW"])
        rates.plot([lr for lr, _ in swept], [bits for _, bits in swept], "o-", color=color, label=name)
        runs = results.find(model=args.model, optimizer=name, lr=best[name], steps=args.steps)
        mean = np.mean([r["train"] for r in runs if r["adamw_lr"] == best["AdamW"]], axis=0)
        curves.plot(np.arange(1, len(mean) + 1) * 10 * BATCH * LENGTH / 1000, mean, color=color, label=name)
        for offset, (label, table) in zip((-0.12, 0.12), tables.items(), strict=False):
            row, marker = table[name], "o" if label == "equal tokens" else "^"
            final.errorbar(number + offset, row["mean"], row["deviation"], fmt=marker, color=color, capsize=3)
    rates.set(xscale="log", xlabel="learning rate", ylabel="held-out bits per byte", title="one grid for all, seed 0")
    curves.set(xlabel="thousands of bytes", ylabel="training bits per byte", title="at the best rate, mean of seeds")
    curves.set_ylim(2, 5)
    final.set(xticks=range(len(args.optimizers)), ylabel="held-out bits per byte, mean ± std")
    final.set_xticklabels(args.optimizers, rotation=20)
    final.set_title("● equal tokens   ▲ equal time")
    rates.legend()
    fig.suptitle(f"{args.model}, {args.steps * BATCH * LENGTH:,} bytes, {args.seeds} seeds")
    fig.savefig(args.out.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="transformer")
    parser.add_argument("--optimizers", nargs="+", default=DEFAULT)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    parser.add_argument("--adamw-rate", type=float, help="of what the others leave to AdamW; else found by its sweep")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--held-out", type=int, default=49_152, help="bytes")
    parser.add_argument("--text", type=Path, nargs="+", help="files and folders instead of the standard library")
    parser.add_argument("--stages", nargs="+", default=["sweep", "tokens", "time"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out = args.out or dated(f"optimizers-language-model-{args.model}")
    corpus, tokenizer = read_texts(args.text) if args.text else standard_library(), load_tokenizer("bytes")
    text = (tokenize(corpus.train, tokenizer), tokenize(corpus.held_out, tokenizer))
    results = Results(args.out)
    best = sweep(args, results, text)
    summary: dict[str, Any] = {"text": corpus.summary, "best rates": best}
    print(best, flush=True)
    if "tokens" in args.stages:
        summary["equal tokens"] = compare(args, results, text, best, dict.fromkeys(args.optimizers, args.steps))
    if "time" in args.stages:
        seconds = step_seconds(args.model, list(dict.fromkeys(["AdamW", *args.optimizers])), best, text[0])
        steps = {name: round(args.steps * seconds["AdamW"] / seconds[name]) for name in args.optimizers}
        summary["step seconds"] = {name: round(s, 5) for name, s in seconds.items()}
        summary["equal time"] = compare(args, results, text, best, steps)
    results.write(**summary)
    draw(args, results, best, {k: summary[k] for k in ("equal tokens", "equal time") if k in summary})


if __name__ == "__main__":
    main()
