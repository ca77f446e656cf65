"""The memory earns its keep: small versions of benchmarks/quality/recall.py and text_memory.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.recall import sequences
from nestlearn import HopeConfig, HopeForCausalLM

SYMBOLS, PAIRS = 16, 4
RATE_ZERO = {"rate_max": 0.0, "retention": False}
Batch = tuple[Tensor, Tensor]


def learn(memory: Mapping[str, Any], batch: Callable[[], Batch], steps: int, rate: float = 5e-3) -> tuple[float, float]:
    """Train a small HOPE on fresh batches of (ids, answers to the last tokens); (loss, accuracy) of the last ten."""
    torch.manual_seed(0)
    model = HopeForCausalLM(
        HopeConfig(
            vocab_size=2 * SYMBOLS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=64,
            levels=[1],
            initializer_range=0.1,
            memory=dict(memory),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    last: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        ids, answers = batch()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 30)
        logits = model(ids, use_cache=False, logits_to_keep=answers.shape[1]).logits
        loss = F.cross_entropy(logits.mT, answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = [*last[-9:], (loss.item(), (logits.argmax(-1) == answers).float().mean().item())]
    mean = torch.tensor(last).mean(0)
    return mean[0].item(), mean[1].item()


def recall() -> Callable[[], Batch]:
    """Batches of 4 random pairs, then the 4 keys again."""
    generator = torch.Generator().manual_seed(1)
    return lambda: sequences(PAIRS, 32, generator, keys=SYMBOLS, values=SYMBOLS)


def copies() -> Callable[[], Batch]:
    """Batches of 8 random symbols, over and over: a period longer than what two convolutions see."""
    generator = torch.Generator().manual_seed(2)

    def batch() -> Batch:
        once = torch.rand(32, SYMBOLS, generator=generator).argsort(-1)[:, :8]
        text = once.repeat(1, 3)
        return text[:, :-1], text[:, 9:]

    return batch


@pytest.mark.slow
def test_hope_recalls_pairs_it_has_read_once() -> None:
    _, accuracy = learn({}, recall(), steps=250)
    assert accuracy >= 0.95


def test_without_writes_recall_stays_at_chance() -> None:
    """Chance is 1 of 16 values, a little more for the last pairs, which two convolutions still see."""
    loss, accuracy = learn(RATE_ZERO, recall(), steps=150)
    assert accuracy < 0.2
    assert loss > 2.4  # nats; log 16 is 2.77


@pytest.mark.slow
def test_repeated_text_is_predicted_from_memory() -> None:
    full, _ = learn({}, copies(), steps=200)
    without, _ = learn(RATE_ZERO, copies(), steps=150)
    assert full < 0.7 * without
