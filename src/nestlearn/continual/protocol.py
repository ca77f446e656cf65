"""Puts a learner through a stream of tasks and records what it knows after each: the accuracy matrix.

The learner sees a task's texts for ``epochs`` passes and never again (replay apart); at test it must choose among all
classes that have come so far, without being told the task.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.continual.classifier import Classifier, MemoryHead
from nestlearn.continual.encoder import Encoded, Encoder
from nestlearn.continual.methods import Anchor, Method, add_low_rank, merge_low_rank, prepare
from nestlearn.optim import Leveled, parameter_groups

EVALUATED_AT_ONCE = 64
HEAD = "classifier."  # how the names of the head's parameters begin


@dataclass(frozen=True)
class Settings:
    """What all methods share. head_lr: how many times the encoder's learning rate a linear head gets."""

    trained: int = 2
    epochs: int = 2
    batch: int = 16
    head_lr: float = 10.0
    replay_share: float = 0.25


@dataclass(frozen=True)
class EncodedTask:
    classes: tuple[int, ...]
    train: Encoded
    test: Encoded


@dataclass(frozen=True)
class Outcome:
    """accuracies: the matrix of `metrics.py`; tokens: read in training; seconds: of training, evaluation apart."""

    accuracies: list[list[float]]
    tokens: int
    seconds: float


def run(
    encoder: Encoder,
    tasks: Sequence[EncodedTask],
    method: Method,
    lr: float,
    settings: Settings,
    *,
    seed: int,
    every_row: bool = True,
) -> Outcome:
    """One learner through all tasks. ``encoder`` is left as it is; ``every_row``: evaluate after each task."""
    torch.manual_seed(seed)
    classes = 1 + max(c for task in tasks for c in task.classes)
    learner = Learner(copy.deepcopy(encoder), classes, method, lr, settings, seed)
    if method.joint:
        learner.learn([c for task in tasks for c in task.classes], _joined([task.train for task in tasks]))
        rows = [[float("nan")] * len(tasks)] * (len(tasks) - 1) + [learner.accuracies(tasks)]
        return Outcome(rows, learner.tokens, learner.seconds)
    rows = []
    for number, task in enumerate(tasks, 1):
        learner.learn(task.classes, task.train)
        known = tasks[:number] if every_row or number == len(tasks) else []
        rows.append(learner.accuracies(known) + [float("nan")] * (len(tasks) - len(known)))
    return Outcome(rows, learner.tokens, learner.seconds)


class Learner:
    """A classifier with its optimizer, its store of texts, and its clock."""

    def __init__(
        self, encoder: Encoder, classes: int, method: Method, lr: float, settings: Settings, seed: int
    ) -> None:
        self.model = Classifier(encoder, method.head, classes, reads=method.reads)
        self.method, self.lr, self.settings, self.draw = method, lr, settings, random.Random(seed)
        self.anchor, self.store = Anchor(method.ewc), None
        self.tokens, self.seconds = 0, 0.0
        prepare(self.model, method, settings.trained)
        self.optimizer = self._optimizer(head_alone=method.rank > 0)  # a low-rank change has its own for each task

    def learn(self, classes: Sequence[int], texts: Encoded) -> None:
        """One task."""
        started = time.perf_counter()
        self.model.meet(classes)
        low_rank = add_low_rank(self.model, self.settings.trained, self.method.rank) if self.method.rank else []
        own = self._optimizer(body_alone=True) if low_rank else None
        optimizers = [optimizer for optimizer in (self.optimizer, own) if optimizer is not None]
        self._remember(classes, texts)
        if optimizers:
            for batch in self._batches(texts):
                self._step(optimizers, batch)
        merge_low_rank(low_rank)
        self._remember(classes, texts)
        if self.method.ewc:
            self.anchor.hold(self.model, self._squares(texts))
        self._keep(texts)
        self.seconds += time.perf_counter() - started

    @torch.no_grad()
    def accuracies(self, tasks: Sequence[EncodedTask]) -> list[float]:
        """On the test texts of each task."""
        return [float((self._predict(task.test) == task.test.labels).double().mean()) for task in tasks]

    def _predict(self, texts: Encoded) -> Tensor:
        answers = torch.zeros(len(texts), dtype=torch.long)
        for rows in _by_length(texts, EVALUATED_AT_ONCE):
            answers[rows] = self.model(texts[rows]).argmax(1)
        return answers

    def _optimizer(self, *, head_alone: bool = False, body_alone: bool = False) -> Leveled | None:
        """Of all that ever changes by gradient, or of the head or all else alone; None where nothing does."""
        groups = [g for g in parameter_groups(self.model, lr=self.lr, weight_decay=0.0) if g["period"] != float("inf")]
        groups = [own for group in groups for own in _head_apart(group, self.settings.head_lr)]
        excluded = {True: body_alone, False: head_alone}
        groups = [group for group in groups if not excluded[group["param_names"][0].startswith(HEAD)]]
        return Leveled(partial(torch.optim.AdamW, weight_decay=0.0), groups) if groups else None

    def _step(self, optimizers: Sequence[Leveled], batch: Encoded) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch), batch.labels)
        if self.method.ewc:
            loss = loss + self.anchor.penalty(self.model)
        loss.backward()
        tokens = sum(len(h) for h in batch.hidden)
        for optimizer in optimizers:
            optimizer.step(tokens=tokens)
        self.tokens += tokens

    def _batches(self, texts: Encoded) -> Iterator[Encoded]:
        """All epochs of one task."""
        for _ in range(self.settings.epochs):
            epoch = self._with_stored(texts)
            batches = _by_length(epoch, self.settings.batch)
            self.draw.shuffle(batches)
            yield from (epoch[rows] for rows in batches)

    def _with_stored(self, texts: Encoded) -> Encoded:
        """As many texts, of which a share are stored ones if there are any."""
        if self.store is None:
            return texts
        kept = self.draw.sample(range(len(texts)), round(len(texts) * (1 - self.settings.replay_share)))
        again = self.draw.choices(range(len(self.store)), k=len(texts) - len(kept))
        return texts[kept] + self.store[again]

    def _remember(self, classes: Sequence[int], texts: Encoded) -> None:
        """The memory's writes: anew for the classes of this task, whose features change while it is learned."""
        head = self.model.classifier
        if isinstance(head, MemoryHead):
            head.forget(classes)
            with torch.no_grad():
                for rows in _by_length(texts, EVALUATED_AT_ONCE):
                    head.write(self.model.features(texts[rows]), texts.labels[rows])

    def _keep(self, texts: Encoded) -> None:
        """Stores the method's share of a task's texts, at least one."""
        if self.method.replay:
            kept = texts[self.draw.sample(range(len(texts)), max(1, round(self.method.replay * len(texts))))]
            self.store = kept if self.store is None else self.store + kept

    def _squares(self, texts: Encoded) -> dict[str, Tensor]:
        """Mean squared gradients over batches of one task's texts, times the batch, as a mean's are smaller."""
        squares: dict[str, Tensor] = {}
        batches = _by_length(texts, self.settings.batch)
        for rows in batches:
            self.model.zero_grad()
            F.cross_entropy(self.model(texts[rows]), texts.labels[rows]).backward()
            for name, p in self.model.named_parameters():
                if p.grad is not None:
                    share = p.grad.square() * (len(rows) / len(batches))
                    squares[name] = squares[name] + share if name in squares else share
        self.model.zero_grad()
        return squares


def _head_apart(group: dict[str, Any], times: float) -> Iterator[dict[str, Any]]:
    """A parameter group as up to two: what is not of the head, and the head's, which learns ``times`` as fast."""
    pairs = list(zip(group["param_names"], group["params"], strict=True))
    for of_head, rate in ((False, group["lr"]), (True, group["lr"] * times)):
        own = [(name, p) for name, p in pairs if name.startswith(HEAD) == of_head]
        if own:
            yield group | {"lr": rate, "param_names": [n for n, _ in own], "params": [p for _, p in own]}


def _by_length(texts: Encoded, size: int) -> list[list[int]]:
    order = sorted(range(len(texts)), key=lambda i: len(texts.hidden[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _joined(parts: Sequence[Encoded]) -> Encoded:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
