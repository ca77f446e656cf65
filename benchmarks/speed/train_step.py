"""Training and decoding speed of HOPE beside a transformers Llama of the same size, in one run, alternating.

    python benchmarks/speed/train_step.py                      # the table: T = 512 and 2048, 1 and 2 threads, decoding
    python benchmarks/speed/train_step.py --lengths 512 --threads 2 --repeats 3 --no-decode

Width 256, 4 layers, batch 4, float32, byte vocabulary; HOPE with all five memories adapting and momentum on, heads of
width 64 and memories of 32 hidden units as in the preset tiny-cpu. A step is forward, backward and AdamW. Every figure
is the median over the repeats, the models taking turns within each; peak memory is what a fresh process needs beyond
the loaded model. Writes JSON with ``--out``.
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
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.quality.common import about

WIDTH, LAYERS, BATCH, VOCAB = 256, 4, 4, 256


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


def training_step(model: torch.nn.Module, length: int) -> Callable[[], float]:
    """A closure that takes one step on random bytes and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, VOCAB, (BATCH, length))

    def step() -> float:
        begin = time.perf_counter()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

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


def peak_megabytes(name: str, length: int, threads: int) -> float:
    """Peak memory of two steps in a fresh process, beyond what it held before them."""
    command = [sys.executable, __file__, "--peak", name, "--lengths", str(length), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, length: int, threads: int) -> None:
    """The child of `peak_megabytes`."""
    torch.set_num_threads(threads)
    model = MODELS[name]()
    step = training_step(model, length)
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


@torch.no_grad()
def decode_table(positions: list[int], count: int, threads: int, repeats: int) -> list[dict[str, float]]:
    """Decoding speed of one stream at several positions of the same stream, positions alternating."""
    torch.set_num_threads(threads)
    rows = []
    for name, make in MODELS.items():
        model = make().eval()
        ids = torch.randint(0, VOCAB, (1, max(positions)))
        seconds: dict[int, list[float]] = {position: [] for position in positions}
        for _ in range(repeats):
            for position in positions:
                cache = model(ids[:, :position], use_cache=True).past_key_values
                begin = time.perf_counter()
                for _ in range(count):
                    cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
                seconds[position].append((time.perf_counter() - begin) / count)
        speeds = {p: 1 / statistics.median(s) for p, s in seconds.items()}
        row = {"model": name, "threads": threads, **{f"tokens/s at {p}": round(s, 1) for p, s in speeds.items()}}
        row["last / first"] = round(speeds[positions[-1]] / speeds[positions[0]], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=list(MODELS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        measure_peak(args.peak, args.lengths[0], args.threads[0])
        return
    sizes = {name: parameters(make()) for name, make in MODELS.items()}
    print(json.dumps({"parameters": sizes}))
    result = {"about": about(), "parameters": sizes, "train": train_table(args.lengths, args.threads, args.repeats)}
    if args.decode:
        result["decode"] = decode_table([256, 4096], 64, max(args.threads), args.repeats)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
