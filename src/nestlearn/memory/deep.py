"""A memory that is an MLP, M(z) = z + w1 σ(w2 z) (NL Eq. 89), written by DGD inside a forward pass.

One chunk of writes, its gradients taken at the weights of the chunk's start (NL Eq. 90; semantics §3), for a key k and
a target v̂, with ``z = w2 k``, ``a = σ(z)``:

    objective "l2":   e = k + w1 a − v̂      of ½‖M(k) − v̂‖²           objective "dot":  e = −v̂      of −⟨M(k), v̂⟩
    objective "mix":  e = λ M(k) − v̂        of ½ λ ‖M(k)‖² − ⟨M(k), v̂⟩, λ in (0, 1): "l2" at 1, "dot" at 0
    w1: DGD write with x = a, g = e          w2: DGD write with x = k, g = (w1ᵀ e) ∘ σ'(z)

Every function works on G memories at once: tensors are (B, G, H, C, ·), weights (B, G, H, out, in).
Letters: B batch, G memories, H heads, C tokens of a chunk, d head width, h hidden width; σ is SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, suggest
from nestlearn.ops.dgd_chunk import Decays, Write, chunk_end, chunk_read, chunk_share, chunk_write, dgd_gain
from nestlearn.ops.dgd_fused import fused_write
from nestlearn.ops.pointwise import l2norm, silu_and_slope

OBJECTIVES = ("dot", "l2", "mix")
TARGET_NORMS = ("l2", "none")
RETAIN_TO = ("zero", "initial")


class Weights(NamedTuple):
    """The two layers of a memory: w1 (…, d, h), w2 (…, h, d)."""

    w1: Tensor
    w2: Tensor


class Fast(NamedTuple):
    """Live weights and their momenta."""

    w1: Tensor
    w2: Tensor
    m1: Tensor
    m2: Tensor

    @property
    def weights(self) -> Weights:
        return Weights(self.w1, self.w2)


Stack = TypeVar("Stack", Weights, Fast)


def select(stack: Stack, span: slice) -> Stack:
    """The memories of ``span`` from a stack (B, M, …)."""
    return type(stack)(*(w[:, span] for w in stack))


@dataclass(frozen=True)
class WriteRule:
    """How a deep memory writes.

    objective      "dot" (NL Eq. 92), "l2" (NL Eq. 93) or "mix", anything between them
    momentum       μ in [0, 1)
    dgd            False drops the gain · x xᵀ term: plain gradient descent with the same step
    retain_to      where retention pulls: "zero" (the letter) or "initial", the weights before the stream
    target_norm    "l2" normalises v̂ (bounded); "none" is the letter
    detach_writes  stop-gradient inner loop: outer gradients reach the initial weights only
    fused          hand-written backward of the writes: the same gradients, faster, first derivatives only
    """

    objective: str = "dot"
    momentum: float = 0.0
    dgd: bool = True
    retain_to: str = "zero"
    target_norm: str = "l2"
    detach_writes: bool = False
    fused: bool = True

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("retain_to", RETAIN_TO), ("target_norm", TARGET_NORMS)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} is {value!r}, must be one of {list(known)}{suggest(str(value), known)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}, must be in [0, 1)")


def deep_forward(weights: Weights, z: Tensor) -> Tensor:
    """M(z) = z + w1 σ(w2 z) for z (…, C, d)."""
    return z + nn.functional.silu(z @ weights.w2.mT) @ weights.w1.mT


def own_target(weights: Weights, value: Tensor, rule: WriteRule) -> Tensor:
    """v̂ = M(v), the target that a memory generates for itself, normalised as ``rule`` says."""
    target = deep_forward(weights, value)
    return l2norm(target, fused=rule.fused) if rule.target_norm == "l2" else target


def deep_chunk(
    start: Weights | None,
    live: Fast,
    key: Tensor,
    target: Tensor,
    rate: Tensor,
    decays: Decays,
    rule: WriteRule,
    *,
    initial: Weights | None = None,
    query: Tensor | None = None,
    surprise: list[Tensor] | None = None,
    mix: Tensor | None = None,
    read_after: bool = False,
) -> tuple[Tensor | None, Fast]:
    """Write one chunk into G memories, and read the last of them at ``query``, each read before its token's write.

    start      weights at the chunk's start, where the gradients are taken; None: ``live`` itself
    live       weights as they are now
    key        (B, 1, H, C, d), normalised;  target v̂ (B, G, H, C, d);  rate (B, G, H, C)
    initial    (G, H, ·, ·), where retention pulls (``retain_to="initial"``)
    surprise   a list to append ‖∇_y L̃‖ (B, G, H, C) to
    mix        λ (G, H, 1, 1) of the objective "mix"
    read_after each read after its token's write instead

    Returns (reads (B, H, C, d) or None, live weights after the chunk).
    """
    whole = start is None
    start = live.weights if start is None else start
    z = key @ start.w2.mT
    hidden, slope = silu_and_slope(z, fused=rule.fused)
    image = hidden @ start.w1.mT if whole or rule.objective != "dot" else None
    error = _error(key, image, target, rule, mix)
    error2 = (error @ start.w1) * slope

    anchor = initial if rule.retain_to == "initial" else None
    write1 = _write(hidden, error, rate, live.w1, live.m1, decays, rule, image if whole else None, anchor and anchor.w1)
    write2 = _write(key, error2, rate, live.w2, live.m2, decays, rule, z if whole else None, anchor and anchor.w2)
    reading = decays.after() if read_after else decays
    reads = None if query is None else _read_last(query, write1, write2, live, reading, anchor)
    w1, m1 = chunk_end(write1, live.w1, live.m1, decays, anchor=anchor and anchor.w1)
    w2, m2 = chunk_end(write2, live.w2, live.m2, decays, anchor=anchor and anchor.w2)
    if surprise is not None:
        surprise.append(_surprise(write1, dgd_gain(hidden, rate)))
    return reads, Fast(w1, w2, m1, m2)


def _error(key: Tensor, image: Tensor | None, target: Tensor, rule: WriteRule, mix: Tensor | None) -> Tensor:
    """e, the objective's gradient at M(k) = k + image."""
    if image is None or rule.objective == "dot":
        return -target
    if rule.objective == "l2":
        return key + image - target
    if mix is None:
        raise UserError('objective is "mix", but no λ is given: pass mix, or choose "dot" or "l2"')
    return mix * (key + image) - target


def _write(
    inputs: Tensor,
    error: Tensor,
    rate: Tensor,
    state: Tensor,
    momentum: Tensor,
    decays: Decays,
    rule: WriteRule,
    carried: Tensor | None,
    anchor: Tensor | None,
) -> Write:
    """One layer's DGD writes over the chunk."""
    gain = dgd_gain(inputs, rate)
    carried = inputs @ state.mT if carried is None else carried
    carried_momentum = inputs @ momentum.mT if rule.momentum else None
    anchored = None if anchor is None else inputs @ anchor.mT
    if rule.fused and rule.dgd:
        write = fused_write(inputs, error, gain, chunk_share(carried, carried_momentum, anchored, decays), decays)
    else:
        updates = -gain[..., None] * error
        write = chunk_write(inputs, updates, gain, carried, carried_momentum, decays, erase=rule.dgd, anchored=anchored)
    return write.map(Tensor.detach) if rule.detach_writes else write


def _read_last(
    query: Tensor, write1: Write, write2: Write, live: Fast, decays: Decays, anchor: Weights | None
) -> Tensor:
    """y = q + w1 σ(w2 q) through both layers, token-exact, of the last memory of the stack."""

    def read(inputs: Tensor, write: Write, state: Tensor, momentum: Tensor, towards: Tensor | None) -> Tensor:
        last = write.map(lambda t: t[:, -1:])
        carried_momentum = None if decays.leak is None else inputs @ momentum[:, -1:].mT
        anchored = None if towards is None else inputs @ towards[-1:].mT
        return chunk_read(last, inputs, inputs @ state[:, -1:].mT, carried_momentum, decays, anchored=anchored)

    hidden = nn.functional.silu(read(query, write2, live.w2, live.m2, anchor and anchor.w2))
    return (query + read(hidden, write1, live.w1, live.m1, anchor and anchor.w1)).squeeze(1)


def _surprise(write: Write, gain: Tensor) -> Tensor:
    """‖∇_y L̃‖ at the output layer, the term that DGD writes, S_{t−1} x_t + g_t (without the DGD term: g_t)."""
    written = -write.updates if write.erased is None else write.erased - write.updates
    return written.detach().norm(dim=-1) / gain.detach().clamp_min(torch.finfo(gain.dtype).tiny)


class InitialWeights(nn.Module):
    """The trained initial state of one memory: w1 (H, d, h), w2 (H, h, d)."""

    def __init__(self, heads: int, width: int, hidden: int, w1_scale: float = 1.0, w2_scale: float = 1.0) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(heads, width, hidden))
        self.w2 = nn.Parameter(torch.empty(heads, hidden, width))
        self.scales = (w1_scale, w2_scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, with variance scale²/fan-in."""
        nn.init.normal_(self.w1, std=self.scales[0] * self.w1.shape[-1] ** -0.5)
        nn.init.normal_(self.w2, std=self.scales[1] * self.w2.shape[-1] ** -0.5)
