"""What one model costs, in a process of its own (`child`) for its memory.

Training: forward, backward and optimizer on random tokens. Decoding: one stream, token by token, after a prompt.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nestlearn.compare.child import RESULT, UNIT, refuse
from nestlearn.compare.plan import write_json
from nestlearn.data.batches import Batch
from nestlearn.errors import NotFinite, UserError
from nestlearn.train.build import build_model, build_optimizer, vocabulary
from nestlearn.train.config import TrainConfig
from nestlearn.train.step import train_step


def main(folder: Path) -> int:
    """A model whose training steps meet a number that is none has no costs: its result says what ``failed``."""
    unit = json.loads((folder / UNIT).read_text())
    try:
        result = measure(TrainConfig.from_dict(unit["config"]), unit["steps"], unit["decode"])
    except NotFinite as error:
        result = {"failed": str(error)}
    except UserError as error:
        return refuse(folder, error)
    write_json(folder / RESULT, result)
    return 0


def measure(config: TrainConfig, steps: int, decode: int) -> dict[str, Any]:
    """Medians over ``steps`` training steps and ``decode`` tokens, each after one that is not counted.

    train_peak_bytes  what the process held at most, beyond what it held before there was a model
    state_bytes       of one stream, after sequence_length tokens
    """
    _load_lazily_loaded()
    vocab = vocabulary(config)
    before = _reset_peak()
    torch.manual_seed(0)
    model = build_model(config, vocab)
    result = {
        "train_tokens_per_second": _training_speed(model, config, vocab, steps),
        "train_peak_bytes": max(0, _peak() - before),
        "threads": torch.get_num_threads(),
    }
    gc.collect()
    return result | (_decoding(model, config, vocab, decode) if decode else {})


def _load_lazily_loaded() -> None:
    """What is loaded at the first model and the first step, a hundred megabytes, is no model's own."""
    importlib.import_module("nestlearn.models.hf")
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def _training_speed(model: Any, config: TrainConfig, vocab: int, steps: int) -> float:
    optimizer = build_optimizer(config, model)
    ids = torch.randint(0, vocab, (config.batch_size, config.sequence_length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    model.train()
    # loss.item() inside: on an accelerator a step is over when its loss is there
    seconds = _seconds(lambda: train_step(model, optimizer, batch, 0, config).loss.item(), steps)
    return ids[:, 1:].numel() / seconds


@torch.no_grad()
def _decoding(model: Any, config: TrainConfig, vocab: int, count: int) -> dict[str, Any]:
    model.eval()
    device = next(model.parameters()).device
    out = model(torch.randint(0, vocab, (1, config.sequence_length), device=device), use_cache=True)
    size = out.past_key_values.state.nbytes
    cache = out.past_key_values
    token = out.logits[:, -1:].argmax(-1)

    def step() -> None:
        nonlocal cache, token
        out = model(token, past_key_values=cache, use_cache=True)
        cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        token.sum().item()

    return {"decode_tokens_per_second": 1 / _seconds(step, count), "state_bytes": size}


def _seconds(step: Callable[[], Any], count: int) -> float:
    step()
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _reset_peak() -> int:
    """Bytes held now; the peak counts from here, where the system can do that."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not Path("/proc/self/statm").exists():
        return _peak()
    with suppress(OSError):  # not allowed everywhere; the peak of loading the libraries is hardly above what stays
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    """Bytes held at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the parent's here
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
