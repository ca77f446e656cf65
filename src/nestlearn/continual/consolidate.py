"""Consolidation: what the levels of many streams have learned, written into the slow weights of a new model, offline.

    average   W ← W + mean over the streams of Σ_levels Δ                             no text needed
    replay    W minimises −log p_W(x) on the streams' own chunks
    distill   W minimises KL(p_{W₀+Δ} ‖ p_W) on them: each stream's adapted model is the teacher of its own chunk
    both      plus KL(p_{W₀} ‖ p_W) on ``rehearse``, text of the kind that must not be forgotten

W are the weights that the streams' levels change, W₀ what they were; the model that is given is never written.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual.online_level import OnlineLevel, is_conv1d
from nestlearn.continual.plan import Plan, make_plan
from nestlearn.continual.seam import active, attach
from nestlearn.continual.stream_state import OnlineState, check_alike
from nestlearn.errors import UserError, suggest

METHODS = ("distill", "replay", "average")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Consolidation:
    """What was gained and what forgotten, in nats per token. None: no such text was given.

    base, adapted, new     on the streams' chunks: the model given, it with each stream's own Δ, the model returned
    kept_base, kept_new    on ``keep``
    moved                  ‖W − W₀‖_F / ‖W₀‖_F over all weights written
    """

    method: str
    base: float | None
    adapted: float | None
    new: float | None
    kept_base: float | None
    kept_new: float | None
    moved: float

    @property
    def gained(self) -> float | None:
        """Of the streams' chunks: how much lower the new model's loss is."""
        return None if self.base is None or self.new is None else self.base - self.new

    @property
    def forgotten(self) -> float | None:
        """Of ``keep``: how much higher it is."""
        return None if self.kept_base is None or self.kept_new is None else self.kept_new - self.kept_base

    def __str__(self) -> str:
        def show(value: float | None) -> str:
            return "   –  " if value is None else f"{value:6.3f}"

        return (
            f"{self.method}: streams {show(self.base)} → {show(self.new)} (adapted {show(self.adapted)}), "
            f"kept {show(self.kept_base)} → {show(self.kept_new)} nats per token, weights moved {self.moved:.2%}"
        )


def consolidate(
    state: OnlineState | Sequence[OnlineState],
    into: Model,
    *,
    chunks: Tensor | Sequence[Tensor] | None = None,
    method: str = "distill",
    keep: Tensor | None = None,
    rehearse: Tensor | None = None,
    steps: int = 64,
    lr: float = 1e-3,
    window: int = 256,
    seed: int = 0,
) -> tuple[Model, Consolidation]:
    """A new model that knows what the streams learned, and a report.

    state     one state or several, of any number of streams each, all read by the model ``into``
    chunks    the streams' own tokens (B, T) or (T,), one tensor for each state; "average" uses them for the report only
    keep      tokens (N, T) to measure what is forgotten, never trained on       rehearse  tokens (N, T) to hold on to
    steps, lr of AdamW, one window of tokens of one state each

    Raises UserError for a state of another model, for chunks that do not fit the states, for an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}: must be one of {list(METHODS)}{suggest(str(method), METHODS)}")
    states = [state] if isinstance(state, OnlineState) else list(state)
    plan = _plan(into, states)
    texts = _texts(chunks, states, method)
    new = copy.deepcopy(into)
    if method == "average":
        _average(new, plan, states)
    else:
        if not (steps >= 1 and lr > 0 and window >= 2):
            raise UserError(f"steps is {steps}, lr {lr}, window {window}: must be >= 1, > 0, >= 2")
        _train(new, into, plan, list(zip(states, texts, strict=True)), rehearse, method, (steps, lr, window, seed))
    own = [(t, plan.in_use(into, s)) for s, t in zip(states, texts, strict=True)]
    report = Consolidation(
        method,
        base=_mean(_loss(into, t, window) for t, _ in own),
        adapted=_mean(_loss(into, t, window, deltas) for t, deltas in own),
        new=_mean(_loss(new, t, window) for t, _ in own),
        kept_base=None if keep is None else _loss(into, keep, window),
        kept_new=None if keep is None else _loss(new, keep, window),
        moved=_moved(new, into, plan),
    )
    return new, report


def levels_of(state: OnlineState) -> tuple[list[OnlineLevel], str]:
    """The levels and the connection that a state was read with."""
    told = json.loads(state.made_by)
    plain: list[dict[str, Any]] = [
        {k: math.inf if v == "inf" else v for k, v in level.items()} for level in told["levels"]
    ]
    return [OnlineLevel(**level) for level in plain], told["connection"]


def _plan(model: nn.Module, states: list[OnlineState]) -> Plan:
    if not states:
        raise UserError("state is an empty list: give at least one stream's state")
    plan = make_plan(model, *levels_of(states[0]), None)
    for state in states:
        check_alike(state, plan.made_by, plan.fingerprint)
    attach(model, plan.weights)
    return plan


def _texts(chunks: Tensor | Sequence[Tensor] | None, states: list[OnlineState], method: str) -> list[Tensor]:
    """One (B, T) for each state; none for an average without chunks."""
    if chunks is None:
        if method != "average":
            raise UserError(
                f"method {method!r} needs chunks: the tokens that the streams read, one tensor for each state"
            )
        return [torch.zeros(s.rows, 0, dtype=torch.long) for s in states]
    texts = [chunks] if isinstance(chunks, Tensor) else list(chunks)
    texts = [t[None] if t.dim() == 1 else t for t in texts]
    if [t.shape[0] for t in texts] != [s.rows for s in states] or min(t.shape[1] for t in texts) < 2:
        found = [tuple(t.shape) for t in texts]
        raise UserError(
            f"chunks have the shapes {found}, must be (streams, tokens >= 2) for {[s.rows for s in states]}"
        )
    return texts


@torch.no_grad()
def _average(new: nn.Module, plan: Plan, states: list[OnlineState]) -> None:
    streams = sum(state.rows for state in states)
    for state in states:
        for path, deltas in plan.deltas(state).items():
            weight: Any = new.get_submodule(path).weight
            total = sum((d.matrix().float().sum(dim=0) for d in deltas), start=torch.zeros(()))
            assert isinstance(total, Tensor)
            change = total.mT if is_conv1d(new.get_submodule(path)) else total
            weight.copy_(weight.float() + change / streams)


def _train(
    new: nn.Module,
    base: nn.Module,
    plan: Plan,
    streams: list[tuple[OnlineState, Tensor]],
    rehearse: Tensor | None,
    method: str,
    how: tuple[int, float, int, int],
) -> None:
    """In float32 at least, whatever the model's dtype, which it has again at the end."""
    steps, lr, window, seed = how
    dtypes = {name: p.dtype for name, p in new.named_parameters()}
    chance = torch.Generator().manual_seed(seed)
    new.float() if all(d != torch.float64 for d in dtypes.values()) else new.double()
    weights: list[Any] = [new.get_submodule(path).weight for path in plan.weights]
    with _trained_only(new, weights):
        optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        for step in range(steps):
            state, text = streams[step % len(streams)]
            piece = _piece(text, window, chance)
            loss = _nats(new, piece).mean() if method == "replay" else _gap(new, base, piece, plan.in_use(base, state))
            if rehearse is not None:
                loss = loss + _gap(new, base, _piece(rehearse, window, chance), {})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, p in new.named_parameters():
        p.data = p.data.to(dtypes[name])


@contextmanager
def _trained_only(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """These weights learn, all others do not; afterwards each requires a gradient as it did."""
    before, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    model.eval().requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        model.train(training)
        for p, required in before:
            p.requires_grad_(required)
            p.grad = None


def _piece(text: Tensor, window: int, chance: torch.Generator) -> Tensor:
    """A window (B, window) from a random place."""
    begin = int(torch.randint(max(1, text.shape[1] - window + 1), (), generator=chance))
    return text[:, begin : begin + window]


def _logits(model: nn.Module, tokens: Tensor, deltas: Any = None) -> Tensor:
    with active(deltas or {}):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nats(model: nn.Module, tokens: Tensor, deltas: Any = None) -> Tensor:
    """Of each token but the first (B, T − 1), read without anything before them."""
    return F.cross_entropy(_logits(model, tokens, deltas).mT, tokens[:, 1:], reduction="none")


def _gap(new: nn.Module, base: nn.Module, tokens: Tensor, deltas: Any) -> Tensor:
    """KL(teacher ‖ new), nats per token; the teacher is the base with these deltas."""
    training = base.training
    with torch.no_grad():
        teacher = _logits(base.eval(), tokens, deltas).log_softmax(dim=-1)
    base.train(training)
    ours = _logits(new, tokens).log_softmax(dim=-1)
    return F.kl_div(ours, teacher.to(ours), reduction="none", log_target=True).sum(dim=-1).mean()


@torch.no_grad()
def _loss(model: nn.Module, text: Tensor, window: int, deltas: Any = None) -> float:
    """Mean nats per token over windows; nan where there is no text."""
    training = model.training
    model.eval()
    pieces = [text[:, i : i + window] for i in range(0, text.shape[1] - 1, window)]
    found = [_nats(model, piece, deltas).flatten() for piece in pieces if piece.shape[1] > 1]
    model.train(training)
    return float(torch.cat(found).mean()) if found else math.nan


def _mean(losses: Iterable[float]) -> float | None:
    """None where nothing was measured."""
    found = [loss for loss in losses if not math.isnan(loss)]
    return sum(found) / len(found) if found else None


@torch.no_grad()
def _moved(new: nn.Module, base: nn.Module, plan: Plan) -> float:
    pairs: list[Any] = [(new.get_submodule(p).weight, base.get_submodule(p).weight) for p in plan.weights]
    moved = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return math.sqrt(moved / sum(float(b.double().square().sum()) for _, b in pairs))
