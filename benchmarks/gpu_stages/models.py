"""Stages: training throughput, memory and utilisation; prefill and decoding; optimizer steps; host syncs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_stages.common import Run, free, out_of_memory, peak_gigabytes, timed, wait
from benchmarks.speed.performance_model import measure_machine, training_flops, transformer_flops
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.optim import M3, DeltaMomentum
from nestlearn.recipes import load_recipe

SMOKE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def sizes(size: str, run: Run) -> dict[str, Any]:
    """Settings of the preset hope-SIZE; tiny ones for a smoke run."""
    return dict(SMOKE, levels=[1, 64]) if run.smoke else dict(load_recipe(f"hope-{size}").model)


def hope(size: str, run: Run) -> nn.Module:
    with run.device:
        return HopeForCausalLM(HopeConfig(**sizes(size, run)))


def transformer(size: str, run: Run) -> nn.Module:
    """Our Transformer: the same blocks, attention for the memory, the feed-forward width that gives HOPE's size."""
    with torch.device("meta"):
        target = parameters(HopeForCausalLM(HopeConfig(**sizes(size, run))))
        given = {**sizes(size, run), "mixer": "attention", "levels": [1]}
        small, more = (
            parameters(HopeForCausalLM(HopeConfig(**{**given, "intermediate_size": width}))) for width in (64, 128)
        )
    width = 64 + 16 * round((target - small) / (more - small) * 4)
    with run.device:
        return HopeForCausalLM(HopeConfig(**{**given, "intermediate_size": width}))


def gated_deltanet(size: str, run: Run) -> nn.Module:
    """flash-linear-attention's model of the same width and depth."""
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    c = sizes(size, run)
    shape = {
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_hidden_layers"],
        "vocab_size": c["vocab_size"],
    }
    with run.device:
        return GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**shape, num_heads=c["num_attention_heads"] // 2))


def models() -> dict[str, Callable[[str, Run], nn.Module]]:
    """Those that can be built here."""
    others = {"gated deltanet (fla)": gated_deltanet} if find_spec("fla") else {}
    return {"hope": hope, "transformer": transformer, **others}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def flops_per_token(name: str, model: nn.Module, tokens: int) -> float | None:
    """What utilisation counts; None for a model that the performance model does not know."""
    c: Any = model.config
    if name == "hope":
        return training_flops(c, tokens)
    if name == "transformer":
        return transformer_flops(c.hidden_size, c.num_hidden_layers, c.intermediate_size, c.vocab_size, tokens)
    return None


def training_step(model: nn.Module, batch: int, tokens: int, run: Run) -> Callable[[], None]:
    """One step of AdamW on random tokens: bfloat16 autocast over float32 weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=run.gpu)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=run.device)  # pyright: ignore
    call: Any = torch.compile(model) if run.compile else model

    def step() -> None:
        with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.gpu):
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def largest_batch(name: str, size: str, tokens: int, run: Run) -> tuple[int, float | None]:
    """The largest batch, halving from 64K tokens on, whose step fits, and its peak memory."""
    batch = 2 if run.smoke else max(1, 65_536 // tokens)
    while True:
        try:
            model = models()[name](size, run)
            return batch, peak_gigabytes(training_step(model, batch, tokens, run), run.device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        finally:
            model = None
            free()


def train(size: str, tokens: int, run: Run) -> dict[str, Any]:
    """Tokens per second, models taking turns, each at the largest batch that fits; memory at the batch that all fit."""
    tokens = 32 if run.smoke else tokens
    begin, found = time.monotonic(), {}
    batches: dict[str, int] = {}
    for name in models():
        try:
            batches[name], _ = largest_batch(name, size, tokens, run)
        except Exception as error:  # one model that fails must not hide the others
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500], "out of memory": out_of_memory(error)}
            free()
    common = min(batches.values(), default=0)
    machine = measure_machine(run.device, torch.bfloat16 if run.gpu else torch.float32)
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(1 if run.smoke else 3):
        for name, batch in batches.items():
            if turn and run.late(begin):
                continue
            model = models()[name](size, run)
            step = training_step(model, batch, tokens, run)
            timed(step, run.device)
            times[name].append(statistics.median(timed(step, run.device) for _ in range(1 if run.smoke else 3)))
            if not turn:
                flops = flops_per_token(name, model, tokens)
                peak = peak_gigabytes(training_step(model, common, tokens, run), run.device)
                found[name] = {"parameters": parameters(model), "flops": flops, "batch": batch, "peak GB": peak}
            model = step = None
            free()
    for name, seconds in times.items():
        speed = batches[name] * tokens / statistics.median(seconds)
        flops = found[name]["flops"]
        found[name] |= {"tokens/s": speed, "turns": len(seconds)}
        found[name]["utilisation"] = None if flops is None else flops * speed / machine["matmul FLOP/s"]
    return {"size": size, "tokens": tokens, "common batch": common, "compiled": run.compile, "models": found, **machine}


@torch.no_grad()
def decode(size: str, run: Run) -> dict[str, Any]:
    """Prefill of 2,048 tokens and a decoding step after 256, 2,048 and 32,768; the step once more as a CUDA graph."""
    positions = [8, 16] if run.smoke else [256, 2048, 32_768]
    found: dict[str, Any] = {}
    for name in models():
        model: Any = models()[name](size, run).to(torch.bfloat16 if run.gpu else torch.float32).eval()
        ids = torch.randint(0, model.config.vocab_size, (1, positions[-1]), device=run.device)
        row: dict[str, Any] = {}
        try:
            piece = ids[:, : positions[-2]]
            model(piece, use_cache=True)
            row["prefill ms"] = 1e3 * statistics.median(
                timed(lambda m=model, p=piece: m(p, use_cache=True), run.device) for _ in range(3)
            )
            for position in positions:
                cache = model(ids[:, :position], use_cache=True).past_key_values
                row[f"step ms at {position}"] = 1e3 * step_time(model, ids[:, :1], cache, run)
            row["graph"] = graph_step(model, ids[:, :1], run) if run.gpu else "needs a GPU"
        except Exception as error:  # one model that fails must not hide the others
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        found[name] = row
        model = None
        free()
    return {"size": size, "positions": positions, "models": found}


def step_time(model: Any, token: torch.Tensor, cache: Any, run: Run) -> float:
    """Median seconds of one decoding step, each on the state after the last."""
    times = []
    for _ in range(3 if run.smoke else 30):
        wait(run.device)
        begin = time.perf_counter()
        cache = model(token, past_key_values=cache, use_cache=True).past_key_values
        wait(run.device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def graph_step(model: Any, token: torch.Tensor, run: Run) -> dict[str, Any]:
    """One decoding step captured and replayed: milliseconds, or why it cannot be captured."""
    cache = model(token.expand(1, 64), use_cache=True).past_key_values
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(token, past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(token, past_key_values=cache, use_cache=True)
        return {"captured": True, "ms": 1e3 * statistics.median(timed(graph.replay, run.device) for _ in range(30))}
    except Exception as error:
        return {"captured": False, "why": f"{type(error).__name__}: {error}"[:300]}


def optimizers(run: Run) -> dict[str, Any]:
    """Time of a step over the matrices of hope-340m's layers, optimizers taking turns."""
    width, hidden, layers = (32, 32, 1) if run.smoke else (1024, 768, 24)
    shapes = layers * ([(4 * width, width), (width, width)] + 3 * [(hidden, width), (hidden, width), (width, hidden)])
    makers: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "AdamW, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=run.gpu),
        "Muon (torch)": lambda ps: torch.optim.Muon(ps, lr=1e-3),
        "M3": lambda ps: M3(ps, lr=1e-3),
        "DeltaMomentum": lambda ps: DeltaMomentum(ps, lr=1e-3),
    }
    made = {}
    for name, make in makers.items():
        params = [nn.Parameter(torch.randn(s, device=run.device)) for s in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        made[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(2 if run.smoke else 12):
        for name, optimizer in made.items():
            took = timed(optimizer.step, run.device)
            if turn >= (1 if run.smoke else 2):
                times[name].append(took)
    return {"matrices": len(shapes), "ms": {name: 1e3 * statistics.median(t) for name, t in times.items()}}


def syncs(run: Run) -> dict[str, Any]:
    """Whether a training step of HOPE makes the host wait for the GPU, and where."""
    if not run.gpu:
        training_step(hope("340m", run), 1, 16, run)()
        return {"host syncs": "needs a GPU"}
    model = hope("340m", run)
    step = training_step(model, 1, 2048, run)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return {"host syncs": "none"}
    except RuntimeError as error:
        import traceback

        where = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-6:]
        return {"host syncs": str(error)[:300], "where": where}
    finally:
        torch.cuda.set_sync_debug_mode("default")
