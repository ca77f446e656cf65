"""Training and decoding speed of HOPE beside a transformers Llama of the same size, in one run, alternating.

    python benchmarks/speed/train_step.py                      # the table: T = 512 and 2048, 1 and 2 threads, decoding
    python benchmarks/speed/train_step.py --lengths 512 --threads 2 --repeats 3 --no-decode
    python benchmarks/speed/train_step.py --lengths 2048 8192 --prefill 2048 --peak-alone 32768

Width 256, 4 layers, batch 4, float32, byte vocabulary; HOPE with all five memories adapting and momentum on, heads of
width 64 and memories of 32 hidden units as in the preset tiny-cpu. A step is forward, backward and AdamW. Every figure
is the median over the repeats, the models taking turns within each; peak memory is what a fresh process needs beyond
the loaded model. Decoding is one stream, a token at a time; from position 65,536 on a HOPE stream of 4,096 tokens is
told that it stands there (its state has no other trace of the position), and Llama, which would need its whole cache,
is left out. Prefill is the forward pass without gradients. ``--clock processor`` counts the process's own seconds, for
busy machines and one thread. ``--bounds`` adds what the performance model allows HOPE on this machine: tokens
per second if its matrix products ran at the rate of a 1024 × 1024 one, its bytes at that of a large copy, and nothing
else took time. ``--compile`` measures both models under torch.compile, compiling left out. Writes JSON with ``--out``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.models.hf import HopeCache

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about
from benchmarks.speed.performance_model import floor, measure_machine, parts

WIDTH, LAYERS, BATCH, VOCAB = 256, 4, 4, 256
SIMULATED = 1 << 16  # positions from here on are simulated
Model = Callable[..., Any]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]
prepared: Callable[[torch.nn.Module], Model] = lambda model: model  # noqa: E731


def hope(**memory: object) -> torch.nn.Module:
    """HOPE, all five memories adapting, momentum on."""
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        levels=[1, 16384],
        memory={"momentum": 0.6, "hidden_width": 32, **memory},
    )
    return HopeForCausalLM(config)


def llama() -> torch.nn.Module:
    """Llama with the feed-forward width that gives HOPE's parameter count."""
    torch.manual_seed(0)
    target, config = parameters(hope()), llama_config(WIDTH)
    slope = parameters(LlamaForCausalLM(llama_config(WIDTH + 8))) - parameters(LlamaForCausalLM(config))
    width = WIDTH + 8 * round((target - parameters(LlamaForCausalLM(config))) / slope)
    model = LlamaForCausalLM(llama_config(width))
    assert abs(parameters(model) / target - 1) < 0.05
    return model


def llama_config(intermediate: int) -> LlamaConfig:
    """Llama of the benchmark's shape."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        intermediate_size=intermediate,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=True,
    )


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"hope": hope, "llama": llama}


def parameters(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def training_step(model: torch.nn.Module, length: int, batch: int = BATCH) -> Callable[[], float]:
    """A closure that takes one step on random bytes and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids, run = torch.randint(0, VOCAB, (batch, length)), prepared(model)

    def step() -> float:
        begin = clock()
        run(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return clock() - begin

    return step


def train_table(lengths: list[int], threads: list[int], repeats: int) -> list[dict[str, float]]:
    """Tokens per second, alternating."""
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for length in lengths:
            steps = {name: training_step(make(), length) for name, make in MODELS.items()}
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for name in steps:
                steps[name]()
            for _ in range(repeats):
                for name in steps:
                    seconds[name].append(steps[name]())
            medians = {name: BATCH * length / statistics.median(s) for name, s in seconds.items()}
            memory = {name: peak_megabytes(name, length, count) for name in MODELS}
            rows.append(
                {
                    "threads": count,
                    "length": length,
                    **{f"{n} tokens/s": round(m) for n, m in medians.items()},
                    "speed ratio": round(medians["hope"] / medians["llama"], 3),
                    **{f"{n} peak MB": round(m) for n, m in memory.items()},
                    "memory ratio": round(memory["hope"] / memory["llama"], 2),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def peak_megabytes(name: str, length: int, threads: int, batch: int = BATCH) -> float:
    """Peak memory of two steps in a fresh process, beyond what it held before them."""
    command = [sys.executable, __file__, "--peak", name, "--lengths", str(length), "--threads", str(threads)]
    command += ["--batch", str(batch)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, length: int, threads: int, batch: int) -> None:
    """The child of `peak_megabytes`."""
    torch.set_num_threads(threads)
    model = MODELS[name]()
    step = training_step(model, length, batch)
    before = resident_megabytes()
    for _ in range(2):
        step()
    # not ru_maxrss: a child process inherits its parent's there
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(int(peak[1]) / 1024 - before)


def resident_megabytes() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_alone(length: int, threads: int) -> dict[str, float]:
    """Peak memory of training HOPE on one row of ``length`` tokens."""
    row: dict[str, float] = {
        "length": length,
        "batch": 1,
        "hope peak MB": round(peak_megabytes("hope", length, threads, batch=1)),
    }
    print(json.dumps(row), flush=True)
    return row


@torch.no_grad()
def prefill_table(lengths: list[int], threads: list[int], repeats: int) -> list[dict[str, float]]:
    """Tokens per second of reading a batch without gradients, the models alternating."""
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        models = {name: prepared(make().eval()) for name, make in MODELS.items()}
        for length in lengths:
            ids = torch.randint(0, VOCAB, (BATCH, length))
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(repeats + 1):
                for name, model in models.items():
                    begin = clock()
                    model(ids, use_cache=True, logits_to_keep=1)
                    seconds[name].append(clock() - begin)
            speeds = {name: BATCH * length / statistics.median(s[1:]) for name, s in seconds.items()}
            row: dict[str, float] = {"threads": count, "prefill": length}
            row |= {f"{n} tokens/s": round(s) for n, s in speeds.items()}
            row["speed ratio"] = round(speeds["hope"] / speeds["llama"], 3)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def caches_at(name: str, model: torch.nn.Module, positions: list[int]) -> dict[int, Any]:
    """A cache at every position that the model is measured at."""
    ids = torch.randint(0, VOCAB, (1, max(p for p in positions if p < SIMULATED)))
    caches = {p: model(ids[:, :p], use_cache=True).past_key_values for p in positions if p < SIMULATED}
    if name == "hope":
        caches |= {p: moved(caches[max(caches)], p) for p in positions if p >= SIMULATED}
    return caches


def moved(cache: HopeCache, position: int) -> HopeCache:
    """The same stream, told that it stands at ``position``."""

    def move(layer: Any) -> Any:
        seen = torch.full_like(layer.memory.seen, position)
        return replace(layer, memory=replace(layer.memory, seen=seen))

    return HopeCache(replace(cache.state, layers=tuple(move(layer) for layer in cache.state.layers)), position)


def decode_seconds(model: Model, cache: Any, count: int) -> float:
    """Seconds per token of ``count`` tokens from a cache on. A Llama's cache grows in place and is cut back."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    begin, now = clock(), cache
    for _ in range(count):
        now = model(ids, past_key_values=now, use_cache=True).past_key_values
    seconds = (clock() - begin) / count
    if now is cache:
        cache.crop(-count)
    return seconds


@torch.no_grad()
def decode_table(positions: list[int], count: int, threads: int, repeats: int) -> list[dict[str, float]]:
    """Decoding speed at several positions, positions and models alternating."""
    torch.set_num_threads(threads)
    models = {name: make().eval() for name, make in MODELS.items()}
    caches = {name: caches_at(name, model, positions) for name, model in models.items()}
    runs = {name: prepared(model) for name, model in models.items()}
    seconds: dict[tuple[str, int], list[float]] = {(n, p): [] for n in models for p in caches[n]}
    for _ in range(repeats + 1):
        for position in positions:
            for name, run in runs.items():
                if position in caches[name]:
                    seconds[name, position].append(decode_seconds(run, caches[name][position], count))
    speeds = {key: 1 / statistics.median(s[1:]) for key, s in seconds.items()}
    rows = []
    for position in positions:
        row: dict[str, float] = {"threads": threads, "position": position}
        row |= {f"{n} tokens/s": round(speeds[n, position], 1) for n in models if (n, position) in speeds}
        if ("llama", position) in speeds:
            row["speed ratio"] = round(speeds["hope", position] / speeds["llama", position], 3)
        row["hope, of its first"] = round(speeds["hope", position] / speeds["hope", positions[0]], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def bounds(length: int, position: int) -> dict[str, float]:
    """Tokens per second that HOPE could reach at most on one thread."""
    torch.set_num_threads(1)
    config: Any = hope().config
    machine = measure_machine(torch.device("cpu"), torch.float32)

    def best(batch: int, **options: Any) -> float:
        training = options.pop("training", False)
        return 1 / sum(floor(part, machine, batch=batch, training=training) for part in parts(config, **options))

    row = {
        "GFLOP/s": round(machine["matmul FLOP/s"] / 1e9, 1),
        "GB/s": round(machine["copy bytes/s"] / 1e9, 1),
        "training tokens/s": round(best(BATCH * length, tokens=length, training=True)),
        "prefill tokens/s": round(best(BATCH * length, tokens=length)),
        "decoding tokens/s": round(best(1, tokens=position, decode=True)),
    }
    print(json.dumps({"bounds": row}), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048], help="of training; none: no training")
    parser.add_argument("--prefill", type=int, nargs="*", default=[], help="lengths of prefill")
    parser.add_argument("--positions", type=int, nargs="+", default=[256, 4096, 1 << 20], help="of decoding")
    parser.add_argument("--peak-alone", type=int, help="length of one row, for HOPE's peak memory of training on it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bounds", action="store_true", help="what the performance model allows HOPE here")
    parser.add_argument("--compile", action="store_true", help="both models under torch.compile")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="processor: of a machine with other work")
    args = parser.parse_args()
    global clock, prepared
    clock = CLOCKS[args.clock]
    if args.compile:
        prepared = torch.compile
    if args.peak:
        measure_peak(args.peak, args.lengths[0], args.threads[0], args.batch)
        return
    sizes = {name: parameters(make()) for name, make in MODELS.items()}
    print(json.dumps({"parameters": sizes}))
    result = {"about": about(), "clock": args.clock, "compiled": args.compile, "parameters": sizes}
    result |= {"train": train_table(args.lengths, args.threads, args.repeats)}
    if args.decode:
        result["decode"] = decode_table(args.positions, 64, max(args.threads), args.repeats)
    if args.prefill:
        result["prefill"] = prefill_table(args.prefill, args.threads, args.repeats)
    if args.peak_alone:
        result["peak alone"] = peak_alone(args.peak_alone, max(args.threads))
    if args.bounds:
        result["bounds"] = bounds(2048, args.positions[0])
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
