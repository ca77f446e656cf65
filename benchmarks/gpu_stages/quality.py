"""Stages: does the larger HOPE learn better than baselines? Text (the standard library's source) and parity."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu_stages.common import Run, free
from nestlearn import HopeConfig, HopeForCausalLM

MIXERS = ("self_modifying", "attention", "gated_deltanet")


def library_bytes() -> torch.Tensor:
    """All .py files of Python's standard library, in order of their names: a text that every machine has."""
    folder = Path(__import__("os").__file__).parent
    files = sorted(p for p in folder.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in files)), dtype=torch.uint8).long()


def build(mixer: str, run: Run, *, vocabulary: int, layers: int, width: int) -> HopeForCausalLM:
    """A model of the preset's proportions; attention gets the levels of a Transformer."""
    torch.manual_seed(0)
    levels = [1] if mixer == "attention" else [1, 2**19]
    with run.device:
        return HopeForCausalLM(
            HopeConfig(
                vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32
                if run.smoke else width // 64, intermediate_size=2 * width, levels=levels, mixer=mixer,
            )
        )  # fmt: skip


def loss_of(model: Any, ids: torch.Tensor, run: Run) -> torch.Tensor:
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.gpu):
        return model(ids, labels=ids, use_cache=False).loss


def text(mixer: str, run: Run) -> dict[str, Any]:
    """Bits per byte of held-out text after 30M bytes, or what 8 minutes hold; every mixer reads the same batches."""
    layers, width, batch, tokens = (1, 32, 2, 32) if run.smoke else (8, 512, 16, 2048)
    steps = 2 if run.smoke else 30_000_000 // (batch * tokens)
    data = library_bytes()
    held, data = data[-(1 << 20) :], data[: -(1 << 20)]
    model = build(mixer, run, vocabulary=256, layers=layers, width=width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=run.gpu)
    generator, begin, done = torch.Generator().manual_seed(0), time.monotonic(), 0
    while done < steps and not run.late(begin):
        starts = torch.randint(0, len(data) - tokens, (batch,), generator=generator)
        ids = torch.stack([data[s : s + tokens] for s in starts.tolist()]).to(run.device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (done + 1) / 100) * max(0.05, 1 - done / steps)
        loss_of(model, ids, run).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
    pieces = held[: (2 if run.smoke else 64) * tokens].view(-1, tokens)
    with torch.no_grad():
        losses = [float(loss_of(model, piece[None].to(run.device), run)) for piece in pieces]
    bits = sum(losses) / len(losses) / 0.693147
    size = sum(p.numel() for p in model.parameters())
    free()
    return {"mixer": mixer, "parameters": size, "steps": done, "of steps": steps, "bits per byte": bits,
            "seconds": time.monotonic() - begin}  # fmt: skip


def parity(run: Run) -> dict[str, Any]:
    """Running parity of random bits, trained at length 64: accuracy at 64 and, never seen, at 256."""
    steps, batch, begin = (2, 4, time.monotonic()) if run.smoke else (3000, 256, time.monotonic())
    found: dict[str, Any] = {}
    for number, mixer in enumerate(MIXERS):
        model = build(mixer, run, vocabulary=4, layers=2, width=64 if run.smoke else 128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        done, share = 0, (number + 1) / len(MIXERS)
        while done < steps and time.monotonic() - begin < share * 420:
            bits = torch.randint(0, 2, (batch, 64), device=run.device)
            with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.gpu):
                logits = model(bits, use_cache=False).logits
            F.cross_entropy(logits.float().flatten(0, 1), (bits.cumsum(1) % 2).flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
        found[mixer] = {"steps": done} | {f"accuracy at {n}": accuracy(model, n, run) for n in (64, 256)}
        free()
    return found


@torch.no_grad()
def accuracy(model: Any, length: int, run: Run) -> float:
    """Share of right answers in the last quarter of fresh sequences."""
    bits = torch.randint(0, 2, (64, length), device=run.device)
    right = model(bits, use_cache=False).logits.argmax(-1) == bits.cumsum(1) % 2
    return float(right[:, -length // 4 :].float().mean())
