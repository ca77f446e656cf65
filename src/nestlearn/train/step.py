"""One training step, the line that the whole library serves: loss → backward → clip → leveled step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.data.batches import Batch
from nestlearn.memory.state import State
from nestlearn.optim import Leveled
from nestlearn.train.config import TrainConfig


class StepResult(NamedTuple):
    """Both on the model's device, so that reading them is the caller's choice."""

    loss: Tensor  # () mean over the batch's tokens, in nats per token
    gradient_norm: Tensor  # () L2, before clipping
    stream: State | None = None  # after the batch, cut from the graph; None unless the config carries it


# Adds the gradient of a batch's mean loss to ``.grad``. ``tokens`` were seen before it; ``stream`` is its rows' state,
# None for new streams. Returns the loss () and, where the config carries it, the state after the batch.
Gradient = Callable[[Any, Batch, int, TrainConfig, State | None], tuple[Tensor, State | None]]


def next_token_gradient(
    model: Any, batch: Batch, tokens: int, config: TrainConfig, stream: State | None = None
) -> tuple[Tensor, State | None]:
    """The ordinary one."""
    device = next(model.parameters()).device
    past = None if stream is None else model.continued(stream)
    packed = {} if batch.positions is None else {"position_ids": batch.positions}
    out = model(batch.inputs.to(device), past_key_values=past, use_cache=config.carry_state, **packed)
    loss = F.cross_entropy(out.logits.float().flatten(0, 1), batch.targets.to(device).flatten())
    loss.backward()
    return loss, out.past_key_values.state.map(_copied) if config.carry_state else None


def train_step(
    model: Any,
    optimizer: Leveled,
    batch: Batch,
    tokens: int,
    config: TrainConfig,
    stream: State | None = None,
    gradient: Gradient = next_token_gradient,
) -> StepResult:
    """Learns from one batch; ``tokens`` were seen before it. ``stream`` is its rows' state, None for new streams."""
    loss, after = gradient(model, batch, tokens, config, stream)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    set_learning_rate(optimizer, learning_rate(config, tokens + batch.inputs.numel()))
    optimizer.step(tokens=batch.inputs.numel())
    model.after_step(set(optimizer.fired))
    optimizer.zero_grad()
    return StepResult(loss.detach(), torch.as_tensor(norm).detach(), after)


def _copied(t: Tensor) -> Tensor:
    """Cut from the graph, and laid out as it will be when read from a checkpoint, so that products round alike."""
    return t.detach().clone(memory_format=torch.contiguous_format)


def learning_rate(config: TrainConfig, tokens: int) -> float:
    """The rate of the step that ends at ``tokens``: linear warm-up, then a cosine to ``final_rate`` of the peak."""
    warmup = config.warmup * config.tokens
    if tokens < warmup:
        return config.learning_rate * tokens / warmup
    done = min(1.0, (tokens - warmup) / max(1.0, config.tokens - warmup))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def set_learning_rate(optimizer: Leveled, rate: float) -> None:
    """``rate`` times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
