"""The trainer's step for a model that will be adapted: `train/step.py` with the gradient of `meta.py`.

The levels and their learned rates are part of the model (``config.in_context``, ``inner_rates``): they are saved with
it, and ``OnlineLearner(model)`` reads with them. A step's sequences are streams from their start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestlearn.continual.meta import MetaLearner
from nestlearn.continual.online_level import CONNECTIONS, check_connection, online_levels
from nestlearn.data.batches import Batch
from nestlearn.errors import UserError
from nestlearn.memory.state import State
from nestlearn.train.config import META_WARMUP, ORDERS, TrainConfig
from nestlearn.train.step import Gradient


def meta_gradient(config: TrainConfig) -> Gradient | None:
    """For ``run_training``; None where the config trains as ever. UserError for periods that no sequence reaches."""
    if not config.meta:
        return None
    check_connection(config.meta.get("connection", CONNECTIONS[0]), "meta.connection")
    for name, own in config.meta["levels"].items():
        period = own.get("period") if isinstance(own, dict) else None
        if isinstance(period, int | float) and period > config.sequence_length:
            raise UserError(
                f"meta.levels.{name}.period is {period}, but sequence_length {config.sequence_length}: the level would "
                "never learn; give longer sequences or a shorter period"
            )
    return MetaGradient()


class MetaGradient:
    """Keeps the learner of the model that it was last called with."""

    def __init__(self) -> None:
        self._learner: MetaLearner | None = None

    def __call__(
        self, model: Any, batch: Batch, tokens: int, config: TrainConfig, stream: State | None
    ) -> tuple[Tensor, None]:
        assert stream is None  # TrainConfig refuses carry_state with meta
        if self._learner is None or self._learner.model is not model:
            rates, order = model.inner_rates.log_rate, config.meta.get("order", ORDERS[0])
            connection = config.meta.get("connection", CONNECTIONS[0])
            self._learner = MetaLearner(
                model, online_levels(model), order=order, connection=connection, log_rates=rates
            )
        ids = torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1)
        warmup = config.meta.get("warmup", META_WARMUP) * config.tokens
        seen = tokens + batch.inputs.numel()
        losses = self._learner.backward(ids, rate_scale=min(1.0, seen / warmup) if warmup else 1.0)
        return losses.mean(), None
