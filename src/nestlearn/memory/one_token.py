"""One token of a self-modifying memory: decoding, where a chunk's matrices would be all overhead.

The recurrence itself (NL Eq. 57, 86–93), every map of every memory in one batched product, vectors as rows: on a CPU a
row times its matrix takes a quarter of the time of the matrix times a column. With the weights S, momenta m before the
token, the weights at its chunk's start as origin of k, v, η, α, of the targets and of all errors:

    y = q + w1 σ(w2 q)                        M_memory, before the write, or after it with read "after"
    m ← μ m − gain · e xᵀ                     x = a, e for w1; x = k, (w1ᵀ e) ∘ σ'(z) for w2: as in `deep.py`
    S ← α S + (1 − α) A + m − gain · (S x) xᵀ     A is 0, or the initial weights with retain_to "initial"

Nothing is looked up on a GPU and no shape depends on the position, so the path can be captured as a CUDA graph.
Plain torch, differentiable any number of times; on a CPU, where nothing is differentiated, C++ (`ops/native/token.py`).
The state given is never changed. Not covered: ``detach_writes``, and gradients with ``truncate``.

Letters: B batch, H heads, M memories, G written ones, F = B · G · H folded, d head width, h hidden width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory.config import SelfModifyingConfig
from nestlearn.memory.deep import Fast, Weights, select
from nestlearn.memory.stream import FastState
from nestlearn.ops.inner_gates import LOG_FLOOR
from nestlearn.ops.inner_loop import LoopInputs, LoopState
from nestlearn.ops.native import token as native
from nestlearn.ops.native.token import TokenTrained
from nestlearn.ops.pointwise import l2norm
from nestlearn.ops.registry import forced, native_missing
from nestlearn.ops.scan import Tensors

_LEAST = math.exp(LOG_FLOOR)  # α is kept above this


class Made(NamedTuple):
    """What the slow memories generate: k, v, q (B, H, d); η, α (B, H)."""

    key: Tensor
    value: Tensor
    query: Tensor
    rate: Tensor
    retain: Tensor


def one_token(
    state: FastState, inputs: Tensors, trained: TokenTrained, config: SelfModifyingConfig
) -> tuple[Tensor, FastState]:
    """Read and write one token: inputs x, value input, query (B, H, d). Returns (y (B, H, d), state after)."""
    start = _start(state, config)
    live, first = Fast(state.w1, state.w2, state.m1, state.m2), len(state.names) - len(trained.scales)
    if _in_cpp(state.w1):
        y, after = native.one_token(
            LoopInputs(*inputs), LoopState(*live), start, trained, _rule(state.names, first, config)
        )
    else:
        made = _generate(start, inputs, trained, state.names, config)
        behind = slice(first, None)
        pair = (select(start, behind), select(live, behind)) if first else (start, live)
        after = _written(*pair, made, trained, config)
        if first:
            after = Fast(*(torch.cat([old[:, :first], new], dim=1) for old, new in zip(live, after, strict=True)))
        read = after if config.read == "after" else live
        y = _apply(made.query, read.w1[:, -1], read.w2[:, -1])
    return y, FastState(after.w1, after.w2, after.m1, after.m2, start.w1, start.w2, state.seen + 1, state.names)


def _in_cpp(weights: Tensor) -> bool:
    """Whether C++ runs the token: it knows no gradients."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or weights.device.type != "cpu"
    return not plain and forced() in (None, "native") and native_missing() is None


def _rule(names: tuple[str, ...], first: int, c: SelfModifyingConfig) -> native.TokenRule:
    return native.TokenRule(
        names, len(names) - first, c.momentum, c.rate_max, c.objective, c.target_norm == "l2", c.retention, c.dgd,
        c.read == "after",
    )  # fmt: skip


def _start(state: FastState, c: SelfModifyingConfig) -> Weights:
    """The weights at the start of each memory's chunk, for some of which it begins with this token.

    On the CPU a look costs little and mostly spares two passes over the state; elsewhere it would stop the queue.
    """
    looks = state.seen.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and all(seen % c.chunk and seen % c.memory_length for seen in state.seen.tolist()):
        return Weights(state.start1, state.start2)
    due = _due(state.seen, len(state.names), c)
    return Weights(torch.where(due, state.w1, state.start1), torch.where(due, state.w2, state.start2))


def _due(seen: Tensor, memories: int, c: SelfModifyingConfig) -> Tensor:
    """Which memories begin a chunk with this token: (B, M or 1, 1, 1, 1)."""
    slow = seen % c.chunk == 0
    if c.memory_length == c.chunk:
        return slow[:, None, None, None, None]
    own = seen % c.memory_length == 0
    return torch.stack([slow] * (memories - 1) + [own], dim=1)[..., None, None, None]


def _apply(given: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """M(given) = given + w1 σ(w2 given): given (…, d), w1 (…, d, h), w2 (…, h, d)."""
    row = given.reshape(-1, 1, given.shape[-1])
    hidden = F.silu(torch.bmm(row, _fold(w2).mT))
    return torch.baddbmm(row, hidden, _fold(w1).mT).view(given.shape)


def _fold(t: Tensor) -> Tensor:
    return t.reshape(-1, *t.shape[-2:])


def _generate(
    start: Weights, inputs: Tensors, trained: TokenTrained, names: tuple[str, ...], c: SelfModifyingConfig
) -> Made:
    x, value, query = inputs
    given, names = {"v": value, "q": query}, names[:-1]
    out = _apply(torch.stack([given.get(n, x) for n in names], dim=1), start.w1[:, :-1], start.w2[:, :-1])
    made = dict(zip(names, out.unbind(1), strict=True))
    rate = c.rate_max * torch.sigmoid((made["eta"] * trained.rate_weight).sum(-1) + trained.rate_bias)
    if c.retention:
        logit = (made["alpha"] * trained.retain_weight).sum(-1) + trained.retain_bias
        retain = torch.sigmoid(logit).clamp_min(_LEAST)
    else:
        retain = torch.ones_like(rate)
    query = l2norm(made["q"]) if "q" in made else query
    return Made(l2norm(made["k"]), made["v"], query, rate, retain)


def _written(origin: Weights, live: Fast, made: Made, trained: TokenTrained, c: SelfModifyingConfig) -> Fast:
    """The written memories after the token, their errors taken at ``origin``."""
    shape = live.w1.shape[:3]
    w1 = _fold(origin.w1)
    asked = torch.stack([made.key, made.value], dim=-2)[:, None].expand(*shape, 2, -1).reshape(len(w1), 2, -1)
    z = torch.bmm(asked, _fold(origin.w2).mT)
    gate = torch.sigmoid(z)
    hidden = z * gate
    image, target = torch.baddbmm(asked, hidden, w1.mT).split(1, dim=1)  # M(k), M(v) (F, 1, d)
    target = l2norm(target) if c.target_norm == "l2" else target
    error = _error(image, target, trained.mix, shape, c)
    key, a, gate = asked[:, :1], hidden[:, :1], gate[:, :1]
    error2 = torch.bmm(error, w1) * torch.addcmul(gate, a, 1 - gate)
    rate = (made.rate[:, None] * torch.stack(list(trained.scales)).abs()).reshape(-1, 1, 1)
    retain = made.retain[:, None, :, None, None]
    anchors = map(torch.stack, zip(*trained.anchors, strict=True)) if trained.anchors else (None, None)
    anchor1, anchor2 = anchors
    w1, m1 = _write(live.w1, live.m1, a, error, rate, retain, anchor1, c)
    w2, m2 = _write(live.w2, live.m2, key, error2, rate, retain, anchor2, c)
    return Fast(w1, w2, m1, m2)


def _error(image: Tensor, target: Tensor, mix: Tensor | None, shape: torch.Size, c: SelfModifyingConfig) -> Tensor:
    """e (F, 1, d), the objective's gradient at M(k)."""
    if c.objective == "dot":
        return -target
    if mix is None:
        return image - target
    return torch.addcmul(-target, mix.expand(shape).reshape(-1, 1, 1), image)


def _write(
    state: Tensor,
    momentum: Tensor,
    x: Tensor,
    error: Tensor,
    rate: Tensor,
    retain: Tensor,
    anchor: Tensor | None,
    c: SelfModifyingConfig,
) -> tuple[Tensor, Tensor]:
    """A DGD write into (B, G, H, out, in): x (F, 1, in), error (F, 1, out), rate (F, 1, 1), retain (B, 1, H, 1, 1)."""
    old = _fold(state)
    gain = rate / torch.bmm(x, x.mT).mul(rate).add_(1)
    update = (gain * error).mT
    moved = torch.mul(_fold(momentum), c.momentum).addcmul_(update, x, value=-1) if c.momentum else -update * x
    moved = moved.view(state.shape)
    end = torch.addcmul(moved, retain, state) if anchor is None else torch.lerp(anchor, state, retain).add_(moved)
    if c.dgd:
        _fold(end).addcmul_(torch.bmm(x, old.mT).mul(gain).mT, x, value=-1)
    return end, moved
