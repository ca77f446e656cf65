"""Titans' neural memory (arXiv 2501.00663): an MLP written by gradient descent with momentum and forgetting (NL §5).

    ℓ(M; k, v) = ½ ‖M(k) − v‖²         M(z) = z + n(w1 σ(w2 z))
    S_t = μ_t S_{t−1} − θ_t ∇ℓ(M; k_t, v_t)          surprise, with a memory of earlier surprises
    M_t = α_t M_{t−1} + S_t [+ (1 − α_t) M_initial]  Titans writes 1 − α for our retention α; [ ] retain_to "initial"
    y_t = M_t(q_t)                                   read after the write

∇ℓ is taken at the weights of the chunk's start, so a chunk is parallel; reads, momentum and forgetting are exact. The
step is explicit: a chunk of like tokens diverges where Σ θ c > 2, c the curvature of ℓ along its gradient, which grows
with the weights. θ is the caller's to bound, or, with ``bounded``, no larger than is stable at any weights:

    θ ← θ / max(1, c)     c = ‖∇ℓ‖² / ‖e‖² = ‖a‖² + ‖k‖² ‖(w1ᵀ ê) ∘ σ'‖²     a = σ(w2 k),  e = M(k) − v,  ê = e / ‖e‖

n is the identity in Titans. With ``inner_norm`` it is a layer norm with trained weights, and with μ = 0, α = 1 this is
TTT-MLP (arXiv 2407.04620).

Letters: B batch, T tokens, H heads, C tokens of a chunk, d head width, h hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError, suggest
from nestlearn.memory.deep import RETAIN_TO, Fast, InitialWeights, Weights
from nestlearn.memory.deep_memory import Sizes, check_tokens, read_stream
from nestlearn.memory.stream import FastState
from nestlearn.ops.dgd_chunk import Decays, Write, chunk_end, chunk_read
from nestlearn.ops.gated_momentum import momentum_decays, momentum_write
from nestlearn.ops.pointwise import silu_and_slope
from nestlearn.ops.scan import Tensors

TINY = 1e-12  # of a squared error: what is known has no gradient, whatever its curvature


@dataclass(frozen=True)
class TitansConfig(Sizes):
    """Sizes, n, and how the backward pass runs.

    retain_to   what forgetting leaves: "zero" (the letter), or "initial", the weights before the stream
    inner_norm  n is a layer norm instead of the identity
    bounded     θ is divided by the curvature where that is above 1; not with inner_norm, where it is another one
    recompute   lean backward pass; False stores everything and allows higher derivatives
    """

    retain_to: str = "zero"
    inner_norm: bool = False
    bounded: bool = False
    recompute: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain_to not in RETAIN_TO:
            near = suggest(str(self.retain_to), RETAIN_TO)
            raise UserError(f"retain_to is {self.retain_to!r}, must be one of {list(RETAIN_TO)}{near}")
        if self.bounded and self.inner_norm:
            raise UserError("bounded and inner_norm are both True: a layer norm bounds its memory itself, choose one")


class InnerNorm(nn.Module):
    """Layer norm inside a memory: n(y) = weight ŷ + bias with ŷ = (y − mean)/std; weight, bias (H, 1, d)."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 1, width))
        self.bias = nn.Parameter(torch.empty(heads, 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The plain layer norm."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class TitansMemory(nn.Module):
    """See the module docstring. ``reads, state = memory(key, value, rate, retain, momentum, query, state)``."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__()
        self.config = c = config
        self.initial = InitialWeights(c.heads, c.head_width, c.hidden_width)
        self.norm = InnerNorm(c.heads, c.head_width) if c.inner_norm else None

    def init_state(self, batch: int) -> FastState:
        """The state before the first token of ``batch`` streams."""
        return FastState.fresh(self._initial(self.initial.w1.dtype), batch, ("memory",))

    def forward(
        self,
        key: Tensor,
        value: Tensor,
        rate: Tensor,
        retain: Tensor,
        momentum: Tensor,
        query: Tensor,
        state: FastState | None = None,
    ) -> tuple[Tensor, FastState]:
        """Write every pair, read every query after its own token's write.

        key, value, query       (B, T, H, d)
        rate, retain, momentum  (B, T, H), θ >= 0, α and μ in [0, 1]
        state                   of these B streams; None starts new ones

        Returns (reads (B, T, H, d), state). The inner loop runs in float32 at least.
        """
        check_tokens(self.config, state, (key, value, query), rate=rate, retain=retain, momentum=momentum)
        dtype = torch.promote_types(key.dtype, torch.float32)
        return read_stream(
            self._step,
            self._initial(dtype),
            (key, value, query),
            (rate, retain, momentum),
            state,
            chunk=self.config.chunk,
            recompute=self.config.recompute,
            constants=() if self.norm is None else (self.norm.weight.to(dtype), self.norm.bias.to(dtype)),
        )

    def _initial(self, dtype: torch.dtype) -> Weights:
        return Weights(self.initial.w1[None].to(dtype), self.initial.w2[None].to(dtype))

    def _step(
        self, live: Fast, start: Weights | None, inputs: Tensors, constants: Tensors, offset: int | None
    ) -> tuple[Tensor, Fast, Weights]:
        """One piece of one chunk: tokens (B, 1, H, C, ·), weights (B, 1, H, out, in)."""
        key, value, query, rate, retain, momentum = inputs
        start, norm = live.weights if start is None else start, constants[2:]
        hidden, slope = silu_and_slope(key @ start.w2.mT, fused=self.config.recompute)
        error = output_error(hidden @ start.w1.mT, value - key, norm)
        decays = momentum_decays(retain.squeeze(-1), momentum.squeeze(-1))
        inner = (error @ start.w1) * slope
        if self.config.bounded:
            rate = rate / curvature(hidden, key, error, inner).clamp_min(1)
        write1 = momentum_write(hidden, -rate * error, decays)
        write2 = momentum_write(key, -rate * inner, decays)
        anchor = constants[:2] if self.config.retain_to == "initial" else (None, None)
        asked = F.silu(_read(write2, query, live.w2, live.m2, anchor[1], decays))
        known = _read(write1, asked, live.w1, live.m1, anchor[0], decays)
        w1, m1 = chunk_end(write1, live.w1, live.m1, decays, anchor=anchor[0])
        w2, m2 = chunk_end(write2, live.w2, live.m2, decays, anchor=anchor[1])
        return (query + normalised(known, norm)).squeeze(1), Fast(w1, w2, m1, m2), start


def _read(write: Write, query: Tensor, map_: Tensor, moved: Tensor, anchor: Tensor | None, decays: Decays) -> Tensor:
    """What each query (…, C, in) reads of a map after its token's write."""
    anchored = None if anchor is None else query @ anchor.mT
    return chunk_read(write, query, query @ map_.mT, query @ moved.mT, decays, anchored=anchored)


def curvature(hidden: Tensor, key: Tensor, error: Tensor, inner: Tensor) -> Tensor:
    """c (…, 1): of ½ ‖M(k) − v‖², to first order of M in the weights, along its own gradient (e aᵀ, inner kᵀ)."""
    a, k, e, g = (t.square().sum(-1, keepdim=True) for t in (hidden, key, error, inner))
    return a + k * g / e.clamp_min(TINY)


def normalised(y: Tensor, norm: Tensors) -> Tensor:
    """n(y): norm is (weight, bias) of a layer norm, or () for the identity."""
    return norm[0] * _standard(y)[0] + norm[1] if norm else y


def output_error(y: Tensor, target: Tensor, norm: Tensors) -> Tensor:
    """∂/∂y of ½ ‖n(y) − target‖²."""
    error = normalised(y, norm) - target
    if not norm:
        return error
    standard, spread = _standard(y)
    error = norm[0] * error
    along = standard * (error * standard).mean(-1, keepdim=True)
    return (error - error.mean(-1, keepdim=True) - along) / spread


def _standard(y: Tensor) -> tuple[Tensor, Tensor]:
    """(ŷ, std) over the last dimension."""
    centred = y - y.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / spread, spread
