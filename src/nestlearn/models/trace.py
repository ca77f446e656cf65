"""What a model does while it reads one passage: the loss, and every level's surprise, rates and norms, per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.models.hope import HopeBackbone
from nestlearn.models.memory_layer import SelfModifyingLayer


class MemorySignal(NamedTuple):
    """What one component did over a passage: (T,) float32 on the CPU each, or None where it has no such thing.

    component  "layer 0 / memory", "layer 0 / M_eta", "layer 0 / CMS every-4096", …; period in tokens
    surprise   ‖∇_y L̃‖ of a memory's write, or of a CMS level the norm of ∂(summed next-token loss)/∂(block output)
    rate, retain, norm   η, α and sqrt(‖w1‖² + ‖w2‖²) at the end of the token's chunk, each a mean over heads
    """

    component: str
    period: float
    surprise: Tensor
    rate: Tensor | None
    retain: Tensor | None
    norm: Tensor | None


class Trace(NamedTuple):
    """loss (T − 1,) of each next token in nats; signals of every memory and every level of every layer."""

    loss: Tensor
    signals: list[MemorySignal]


def trace(backbone: HopeBackbone, embedded: Tensor, score: Callable[[Tensor], Tensor]) -> Trace:
    """Read a passage (1, T, width) and record every level; ``score`` maps hidden states like it to losses (T − 1,)."""
    x = embedded.detach().requires_grad_()
    signals: list[MemorySignal] = []
    outputs: list[tuple[str, float, Tensor]] = []
    for number, block in enumerate(backbone.layers):
        where, normed = f"layer {number}", block.norm(x)
        if isinstance(block.mixer, SelfModifyingLayer):
            signals += _memory_signals(where, block.mixer, normed)
        *blocks, x = block.cms.run(x + block.mixer(normed, None)[0])
        for level, output in zip(block.cms.levels, blocks, strict=True):
            outputs.append((f"{where} / CMS {level.name}", level.period, output))
    loss = score(backbone.norm(x))
    grads = torch.autograd.grad(loss.sum(), [output for *_, output in outputs])
    for (component, period, _), grad in zip(outputs, grads, strict=True):
        signals.append(MemorySignal(component, period, _row(grad[0].float().norm(dim=-1)), None, None, None))
    return Trace(_row(loss), signals)


def _memory_signals(where: str, layer: SelfModifyingLayer, x: Tensor) -> list[MemorySignal]:
    seen, config = layer.observe(x), layer.memory.config
    lengths = torch.tensor(seen.lengths, device=x.device)
    retain = _row(seen.retain[0, 0].mean(0))
    signals = []
    for i, name in enumerate(seen.names):
        surprise, rate, norm = (t[0, i].mean(0) for t in (seen.surprise, seen.rate, seen.norm))
        label, period = ("memory", 1) if name == "memory" else (f"M_{name}", config.chunk)
        norm = norm.repeat_interleave(lengths)
        signals.append(MemorySignal(f"{where} / {label}", period, _row(surprise), _row(rate), retain, _row(norm)))
    return signals


def _row(values: Tensor) -> Tensor:
    return values.detach().float().cpu()
