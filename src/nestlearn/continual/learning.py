"""What happens to one level of B streams at the end of a segment and at the end of its period (NL Eq. 71, in context).

    every segment    P ← P + Σ_t ∇ℓ_t                                     ℓ_t  nats of token t given all before it
    every period     g = P / n, scaled to the norm clip at most           n    tokens of the period that were predicted
                     Δ ← retention · Δ + rule(g),  then scaled to ‖Δ‖ ≤ bound ‖W‖ for each weight;     P ← 0

A period that was read badly shows only after the change that caused it: so a change is *good* once the next period was
read with it, finite and without a spike. A period that is neither rolls Δ back to the last good state; its gradient is
dropped and the rule's memory starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nestlearn.continual.delta import Delta
from nestlearn.continual.inner_rules import change, initial_memory
from nestlearn.continual.online_level import OnlineLevel
from nestlearn.continual.stream_state import LevelState, total_norm

# Running mean and variance of a period's loss: weight of a new period, periods before the first judgement, and what a
# period may always exceed the mean by, nats. A spike moves the mean by a tenth of what was allowed: a new domain is
# taken in after some periods, a document of noise only after dozens.
RECENT, WARM_UP, ALWAYS, AFTER_SPIKE = 0.25, 4, 0.5, 0.1
TINY = 1e-30


@dataclass
class Judged:
    """A change, one number for each stream, as `Change` has them; verdict is an index of VERDICTS."""

    loss: Tensor
    gradient: Tensor
    step: Tensor
    distance: Tensor
    verdict: Tensor


def initial_level(level: OnlineLevel, zeros: Sequence[Delta]) -> LevelState:
    """Nothing learned, nothing open."""
    first = next(zeros[0].tensors())
    rows = first.shape[0]
    return LevelState(
        deltas=tuple(zeros),
        good=None if level.spike == float("inf") else tuple(zeros),
        memory=tuple(initial_memory(level, zero) for zero in zeros),
        pending=tuple(zeros),
        loss=first.new_zeros(rows),
        broken=torch.zeros(rows, dtype=torch.bool, device=first.device),
        typical=first.new_zeros(rows, 3),
    )


def collect(state: LevelState, grads: Sequence[Delta], loss: Tensor, finite: Tensor, losses: int) -> LevelState:
    """After a segment: its gradients, one for each weight, and its summed loss (B,) wait for the period's end."""
    grads = _kept(grads, finite)
    pending = tuple(p.add(g) for p, g in zip(state.pending, grads, strict=True))
    return replace(
        state,
        pending=pending,
        loss=state.loss + loss.masked_fill(~finite, 0).to(state.loss),
        broken=state.broken | ~finite,
        losses=state.losses + losses,
    )


def end_period(level: OnlineLevel, state: LevelState, norms: Sequence[float]) -> tuple[LevelState, Judged]:
    """The change at the end of a period. norms: ‖W‖_F of each weight."""
    loss = state.loss / max(state.losses, 1)
    surprise = total_norm(state.pending) / max(state.losses, 1)
    broken = state.broken | ~torch.isfinite(loss) | ~torch.isfinite(surprise)
    spike, typical = _judge(level, state.typical, loss, ~broken)
    ok = ~(broken | spike)
    deltas, memory, bounded = changed(level, state, _kept(state.pending, ok), surprise, norms)
    broken = broken | (ok & ~torch.isfinite(total_norm(deltas)))
    ok = ok & ~broken
    rolled = state.deltas if state.good is None else state.good
    deltas = _choose(ok, deltas, rolled)
    after = replace(
        state,
        deltas=deltas,
        good=None if state.good is None else _choose(ok, state.deltas, state.good),
        memory=memory
        if bool(ok.all())
        else tuple(tuple(torch.where(ok[:, None, None], t, 0) for t in own) for own in memory),
        pending=tuple(Delta.zero(len(ok), *_shape(p), state.loss.dtype, state.loss.device) for p in state.pending),
        loss=torch.zeros_like(loss),
        broken=torch.zeros_like(broken),
        typical=typical,
        losses=0,
        steps=state.steps + 1,
    )
    verdict = torch.where(broken, 3, torch.where(spike, 2, bounded.long()))
    return after, Judged(loss, surprise, _moved(deltas, state.deltas), total_norm(deltas), verdict)


def restarted(state: LevelState, slower: LevelState) -> LevelState:
    """Nested: a faster level takes over what the next slower one has learned, and starts its rule anew.

    What is passed on is Δ. Where both levels' slow weights are equal, as a nested model's are when they start, this is
    the slower level's state itself; where training has moved them apart, each keeps its own.
    """
    memory = tuple(tuple(torch.zeros_like(t) for t in own) for own in state.memory)
    return replace(state, deltas=slower.deltas, good=None if state.good is None else slower.deltas, memory=memory)


def changed(
    level: OnlineLevel,
    state: LevelState,
    sums: Sequence[Delta],
    surprise: Tensor,
    norms: Sequence[float | Tensor],
    rate: Tensor | None = None,
) -> tuple[tuple[Delta, ...], tuple[tuple[Tensor, ...], ...], Tensor]:
    """Δ and the rule's memory after the change, and in which streams a bound was met (B,).

    rate  () in place of the level's own lr; all is differentiable in it, and in the state's and the sums' tensors
    """
    scale = (level.clip / surprise.clamp(min=TINY)).clamp(max=1) / max(state.losses, 1)
    deltas, memories, bounded = [], [], torch.zeros_like(surprise, dtype=torch.bool)
    for delta, memory, g, norm in zip(state.deltas, state.memory, sums, norms, strict=True):
        step, memory = change(level, memory, g.scaled(scale), state.steps + 1, rate)
        moved = (delta if level.retention == 1 else delta.scaled(level.retention)).add(step)
        size = moved.norm()
        outside = size > level.bound * norm
        if bool(outside.any()):
            moved = moved.scaled(torch.where(outside, level.bound * norm / size.clamp(min=TINY), 1))
        deltas.append(moved)
        memories.append(memory)
        bounded = bounded | outside
    return tuple(deltas), tuple(memories), bounded


def _judge(level: OnlineLevel, typical: Tensor, loss: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a loss (B,) is a spike, and the running mean and variance after it; what is not finite teaches none."""
    count, mean, variance = typical.unbind(-1)
    over = loss - mean
    allowed = level.spike * variance.sqrt() + ALWAYS
    spike = finite & (count >= WARM_UP) & (over > allowed)
    weight = torch.maximum(1 / (count + 1), torch.full_like(count, RECENT))
    moved = torch.where(spike, AFTER_SPIKE * allowed, weight * over)
    spread = (1 - weight) * (variance + weight * over**2)
    after = torch.stack([count + 1, mean + moved, torch.where(spike, variance, spread)], dim=-1)
    return spike, torch.where(finite[:, None], after, typical)


def _choose(ok: Tensor, new: Sequence[Delta], old: Sequence[Delta]) -> tuple[Delta, ...]:
    """The new Deltas in the rows where ok, the old ones elsewhere."""
    if bool(ok.all()):
        return tuple(new)
    if not bool(ok.any()):
        return tuple(old)
    return tuple(n.where(ok).add(o.where(~ok)) for n, o in zip(new, old, strict=True))


def _kept(deltas: Sequence[Delta], ok: Tensor) -> Sequence[Delta]:
    """Zero in the rows that are not ok."""
    return deltas if bool(ok.all()) else [delta.where(ok) for delta in deltas]


def _moved(after: Sequence[Delta], before: Sequence[Delta]) -> Tensor:
    """‖Δ after − Δ before‖ (B,)."""
    return total_norm([a.add(b.scaled(-1.0)) for a, b in zip(after, before, strict=True)])


def _shape(delta: Delta) -> tuple[int, int]:
    if delta.dense is not None:
        return delta.dense.shape[-2], delta.dense.shape[-1]
    assert delta.left is not None and delta.right is not None
    return delta.left.shape[-1], delta.right.shape[-1]
