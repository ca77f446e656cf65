"""Self-modifying memory: deep memories that generate their own keys, values, rates, retentions and targets.

For token t, "start" being the state at the start of its chunk (NL Eq. 86–93; semantics §3):

    k = l2norm(M_k(x))   v = M_v(x)   η = rate_max sigmoid(⟨r_η, M_eta(x)⟩ + b_η)   α = sigmoid(⟨r_α, M_alpha(x)⟩ + b_α)
    y = M_memory(q), token-exact: every write before t counts; with read="after", that of t too
    every memory □ then writes (k, v̂_□ = M_□(v)) with its own rate η · |rate_scale_□|

k, v, η, α and every gradient of a chunk come from its start, so a chunk is parallel; the writes themselves are exact.
A memory that does not adapt is its initial state for ever. The initial states are trained through the inner updates.

Letters: B batch, T tokens, H heads, d head width, h hidden width, M memories.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.memory.config import Part, SelfModifyingConfig
from nestlearn.memory.deep import Fast, InitialWeights, Weights, deep_chunk, deep_forward, own_target, select
from nestlearn.memory.one_token import one_token
from nestlearn.memory.read_out import Mix, ReadOut
from nestlearn.memory.stream import FastState, run_stream
from nestlearn.ops.dgd_chunk import chunk_decays
from nestlearn.ops.inner_chunk import LoopSpec
from nestlearn.ops.inner_gates import LOG_FLOOR
from nestlearn.ops.inner_loop import LoopInputs, LoopState, LoopTrained
from nestlearn.ops.native import loop as native
from nestlearn.ops.native.token import TokenTrained
from nestlearn.ops.pointwise import l2norm
from nestlearn.ops.registry import Loop, Task, forced, loop_for
from nestlearn.ops.scan import Tensors


class Gates(NamedTuple):
    """What the slow memories generate for a piece of n tokens: k, v, q (B, 1, H, n, d); η, log α (B, 1, H, n)."""

    key: Tensor
    value: Tensor
    query: Tensor
    rate: Tensor
    log_retain: Tensor

    def cut(self, begin: int, end: int) -> Gates:
        """The same for tokens begin … end."""
        return Gates(*(t[..., begin:end, :] for t in self[:3]), *(t[..., begin:end] for t in self[3:]))


class Written(NamedTuple):
    """Memories after a piece: reads of "memory", live and chunk-start weights, surprises if asked."""

    reads: list[Tensor]
    live: Fast
    start: Weights
    surprise: list[Tensor]


class Signals(NamedTuple):
    """What happened inside while reading, for the memories in ``names``.

    surprise, rate  (B, M, H, T)  ‖∇_y L̃‖ of each write, and its η;  retain (B, 1, H, T)
    norm            (B, M, H, P)  sqrt(‖w1‖² + ‖w2‖²) after each of P pieces of ``lengths`` tokens
    """

    names: tuple[str, ...]
    surprise: Tensor
    rate: Tensor
    retain: Tensor
    norm: Tensor
    lengths: tuple[int, ...]


class SelfModifyingMemory(nn.Module):
    """See the module docstring. ``y, state = memory(x, query, state)``; a state of None starts new streams.

    Parameters: initial[name].w1 (H, d, h), .w2 (H, h, d); rate_read, retain_read .weight (H, d), .bias (H,);
    rate_scale[name] (H,), of which the absolute value counts; mix[name].logits (H,) of λ, with the objective "mix".
    """

    def __init__(self, config: SelfModifyingConfig) -> None:
        super().__init__()
        self.config = c = config
        self.initial = nn.ModuleDict(
            {n: InitialWeights(c.heads, c.head_width, c.hidden_width, c.w1_scale, c.w2_scale) for n in sorted(c.names)}
        )
        self.rate_read = ReadOut(c.heads, c.head_width, c.rate_start)
        self.retain_read = ReadOut(c.heads, c.head_width, c.retain_start)
        self.rate_scale = nn.ParameterDict({n: nn.Parameter(torch.empty(c.heads)) for n in sorted(c.names)})
        mixed = sorted(c.written) if c.objective == "mix" else []
        self.mix = nn.ModuleDict({n: Mix(c.heads, c.mix_start) for n in mixed})
        self.reset_scales()

    def reset_scales(self) -> None:
        """rate_scale starts at 1 for "memory", at ``slow_rate_scale`` for the others."""
        for name, scale in self.rate_scale.items():
            nn.init.constant_(scale, 1.0 if name == "memory" else self.config.slow_rate_scale)

    def initial_weights(self, dtype: torch.dtype) -> Weights:
        """The initial states of all memories, stacked in the order of ``config.names``: (M, H, d, h), (M, H, h, d)."""
        stacks = (torch.stack([getattr(self.initial[n], w) for n in self.config.names]) for w in ("w1", "w2"))
        return Weights(*(s.to(dtype) for s in stacks))

    def init_state(self, batch: int) -> FastState:
        """The state before the first token of ``batch`` streams."""
        return FastState.fresh(self.initial_weights(inner_dtype(self.rate_read.bias.dtype)), batch, self.config.names)

    def renewed(self, state: FastState) -> FastState:
        """``state``, its memories that never change being the initial weights as they are now, with their gradients.

        For a stream that is read on while the initial weights are trained.
        """
        count = len(self.config.names)
        first = count if self.config.constant else count - len(self.config.written)
        if not first:
            return state
        pair = [w[:first].expand(len(state.w1), -1, -1, -1, -1) for w in self.initial_weights(state.w1.dtype)]
        held = {"w1": 0, "w2": 1, "start1": 0, "start2": 1}
        return replace(state, **{n: torch.cat([pair[i], getattr(state, n)[:, first:]], dim=1) for n, i in held.items()})

    def forward(
        self, x: Tensor, query: Tensor, state: FastState | None = None, value_input: Tensor | None = None
    ) -> tuple[Tensor, FastState]:
        """Read at ``query`` and learn from ``x``.

        x, query, value_input  (B, T, H, d); query is normalised by the caller; M_v reads value_input, x by default
        state                  of these B streams; None starts new ones

        Returns (y (B, T, H, d), state). The inner loop runs in float32 at least, whatever the inputs are.
        """
        return self._read(x, query, state, value_input, None)

    @torch.no_grad()
    def observe(
        self, x: Tensor, query: Tensor, state: FastState | None = None, value_input: Tensor | None = None
    ) -> Signals:
        """Read as `forward` does and return what happened inside."""
        record: list[tuple[Tensor, ...]] = []
        self._read(x, query, state, value_input, record)
        surprise, rate, retain, norm = (torch.cat(parts, dim=-1) for parts in zip(*record, strict=True))
        lengths = tuple(piece[0].shape[-1] for piece in record)
        return Signals(self.config.written, surprise, rate, retain, norm, lengths)

    def _read(
        self,
        x: Tensor,
        query: Tensor,
        state: FastState | None,
        value_input: Tensor | None,
        record: list[tuple[Tensor, ...]] | None,
    ) -> tuple[Tensor, FastState]:
        c, dtype, value_input = self.config, inner_dtype(x.dtype), x if value_input is None else value_input
        self._check(x, query, value_input, state)
        if state is not None and x.shape[1] == 1 and record is None and self._by_token():
            y, state = one_token(
                state, tuple(t[:, 0].to(dtype) for t in (x, value_input, query)), self._token_trained(dtype), c
            )
            return y[:, None].to(x.dtype), state
        initial = self.initial_weights(dtype)
        if c.constant and record is None:
            return self._read_constant(x, query, state or FastState.fresh(initial, x.shape[0], c.names))
        trained = self._trained(dtype)
        loop, compiling = loop_for(self._task(x), quiet=not c.recompute), torch.compiler.is_compiling()
        periods = torch.tensor([c.chunk] * (len(c.names) - 1) + [c.memory_length], device=x.device)
        y, state = run_stream(
            partial(self._step, record=record),
            FastState.fresh(initial, x.shape[0], c.names) if state is None else state,
            tuple(t.transpose(1, 2).to(dtype) for t in (x, value_input, query)),
            (*initial, *trained),
            periods,
            chunk=c.chunk,
            fresh=state is None,
            recompute=c.recompute and record is None,
            loop=None if loop is None or record is not None else partial(self._loop, loop),
            anywhere=self._anywhere if loop is native.inner_loop and record is None and not compiling else None,
            truncate=c.truncate,
            static=len(c.names) - len(c.written),
        )
        return y.transpose(1, 2).to(x.dtype), state

    def _trained(self, dtype: torch.dtype) -> Tensors:
        """Rate scales (G, H), read-outs, and with the objective "mix" λ (G, H)."""
        written = self.config.written
        scales = torch.stack([self.rate_scale[n] for n in written]).abs()
        reads = (self.rate_read.weight, self.rate_read.bias, self.retain_read.weight, self.retain_read.bias)
        mix = (torch.stack([self.mix[n].logits for n in written]).sigmoid(),) if self.mix else ()  # pyright: ignore
        return tuple(t.to(dtype) for t in (scales, *reads, *mix))

    def _by_token(self) -> bool:
        """Whether single tokens of a stream go through `one_token`: not where another path is asked for."""
        c = self.config
        cut = c.detach_writes or (c.truncate is not None and torch.is_grad_enabled())
        return not (c.constant or cut) and forced() != "reference"

    def _token_trained(self, dtype: torch.dtype) -> TokenTrained:
        """What `one_token` needs; the initial weights only where retention pulls towards them."""
        c, rate, retain = self.config, self.rate_read, self.retain_read
        mix = torch.stack([self.mix[n].logits for n in c.written]).sigmoid() if self.mix else None  # pyright: ignore
        initial, scale = self.initial, self.rate_scale
        memories = [initial[n] for n in c.written] if c.retain_to == "initial" and c.retention else []
        trained = TokenTrained(
            rate.weight, rate.bias, retain.weight, retain.bias, mix, [scale[n] for n in c.written],
            [(m.w1, m.w2) for m in memories],  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        return trained if rate.bias.dtype == dtype else trained.to(dtype)

    def _task(self, x: Tensor) -> Task:
        """What the registry of implementations needs to know."""
        c, dtype = self.config, inner_dtype(x.dtype)
        only_steps = (
            loop_limit(c) if c.recompute else "recompute is False, which asks for the path with all derivatives"
        )
        operands = x.dtype if x.dtype == torch.bfloat16 else dtype
        return Task(x.device, dtype, operands, c.head_width, c.hidden_width, c.chunk, only_steps, c.read)

    def _loop(self, run: Loop, live: Fast, inputs: Tensors, constants: Tensors) -> tuple[Tensor, Fast]:
        """All chunks from a boundary on, in one function."""
        y, end = run(LoopInputs(*inputs), LoopState(*live), *self._trained_and_spec(inputs, constants))
        return y, Fast(*end)

    def _anywhere(
        self, live: Fast, start: Weights, offset: int, inputs: Tensors, constants: Tensors
    ) -> tuple[Tensor, Fast, Weights]:
        """All of it in C++, from any place in a chunk."""
        given = LoopInputs(*inputs), LoopState(*live), start
        y, end, (start1, start2) = native.anywhere(*given, *self._trained_and_spec(inputs, constants), offset)
        live = Fast(*end)
        return y, live, live.weights if start1 is None or start2 is None else Weights(start1, start2)

    def _trained_and_spec(self, inputs: Tensors, constants: Tensors) -> tuple[LoopTrained, LoopSpec]:
        c, trained = self.config, LoopTrained(*constants)
        spec = LoopSpec(
            c.names, len(c.written), c.chunk, c.momentum, c.rate_max, c.target_norm == "l2", c.retain_to == "initial",
            c.retention, c.read == "after", c.kept_every(inputs[0].shape[-2]),
        )  # fmt: skip
        mix = torch.ones_like(trained.scales) if c.objective == "l2" else trained.mix
        return trained._replace(mix=mix), spec

    def _read_constant(self, x: Tensor, query: Tensor, state: FastState) -> tuple[Tensor, FastState]:
        """A memory that can never change is one product: y = M_memory(q), only the count of tokens moves."""
        asked = query.transpose(1, 2).to(state.w1.dtype)
        if "q" in self.config.names:
            asked = l2norm(deep_forward(state.weights["q"], asked))
        y = deep_forward(state.weights["memory"], asked)
        return y.transpose(1, 2).to(x.dtype), replace(state, seen=state.seen + x.shape[1])

    def _check(self, x: Tensor, query: Tensor, value_input: Tensor, state: FastState | None) -> None:
        c = self.config
        for name, t in (("x", x), ("query", query), ("value_input", value_input)):
            if t.dim() != 4 or t.shape != x.shape or t.shape[1] < 1 or t.shape[2:] != (c.heads, c.head_width):
                raise UserError(
                    f"{name} has the shape {tuple(t.shape)}, must be (B, T, heads, head_width) = (B, T, {c.heads}, "
                    f"{c.head_width}), the same for x, query and value_input, with T >= 1"
                )
        if state is not None and (state.w1.shape[0] != x.shape[0] or state.names != c.names):
            raise UserError(
                f"state holds {state.w1.shape[0]} streams of the memories {state.names}, but x has {x.shape[0]} rows "
                f"and this memory is {c.names}: pass the state of these very streams"
            )

    def _step(
        self,
        live: Fast,
        start: Weights | None,
        inputs: Tensors,
        constants: Tensors,
        offset: int | None,
        *,
        record: list[tuple[Tensor, ...]] | None,
    ) -> tuple[Tensor, Fast, Weights]:
        """One piece of one chunk: generate, then write and read. ``start`` None: the piece begins the chunk."""
        trained = LoopTrained(*constants)
        origin = live.weights if start is None else start
        gates = self._generate(origin, inputs, trained)
        parts = self.config.parts
        done = [self._write(part, live, origin, gates, trained, offset, observe=record is not None) for part in parts]
        static = slice(parts[0].span.start)  # memories that do not adapt stay as they are
        live = Fast(*_stack(select(live, static), *(d.live for d in done)))
        start = Weights(*_stack(select(origin, static), *(d.start for d in done)))
        if record is not None:
            surprise = torch.cat([torch.cat(d.surprise, dim=-1) for d in done], dim=1)
            record.append(
                (surprise, gates.rate * trained.scales[..., None], gates.log_retain.exp(), _norms(live, static))
            )
        return torch.cat(done[-1].reads, dim=-2), live, start

    def _generate(self, weights: Weights, inputs: Tensors, trained: LoopTrained) -> Gates:
        """k, v, q, η, α of a piece, from the slow memories at the chunk's start."""
        x, value_input, query = inputs
        given = {"v": value_input, "q": query}
        names = self.config.names[:-1]
        out = deep_forward(select(weights, slice(-1)), torch.stack([given.get(n, x) for n in names], dim=1))
        made = {name: out[:, i : i + 1] for i, name in enumerate(names)}
        rate_weight, rate_bias, retain_weight, retain_bias = (t[..., None] for t in trained[3:7])
        rate = self.config.rate_max * torch.sigmoid((made["eta"] @ rate_weight).squeeze(-1) + rate_bias)
        logit = (made["alpha"] @ retain_weight).squeeze(-1) + retain_bias
        log_retain = nn.functional.logsigmoid(logit).clamp_min(LOG_FLOOR)
        return Gates(
            l2norm(made["k"], fused=self.config.recompute),
            made["v"],
            l2norm(made["q"], fused=self.config.recompute) if "q" in made else query[:, None],
            rate,
            log_retain if self.config.retention else torch.zeros_like(log_retain),
        )

    def _write(
        self,
        part: Part,
        live: Fast,
        start: Weights,
        gates: Gates,
        trained: LoopTrained,
        offset: int | None,
        *,
        observe: bool,
    ) -> Written:
        """Write a piece into the memories of ``part``, whose own chunks may begin inside it; read "memory"."""
        c, (span, length) = self.config, part
        live, start = select(live, span), select(start, span)
        initial = Weights(trained.w1[span], trained.w2[span])
        first = len(c.names) - len(c.written)
        own = slice(span.start - first, span.stop - first)
        scales = trained.scales[own, :, None]
        mix = None if trained.mix is None else trained.mix[own, :, None, None]
        reading = span.stop == len(c.names)
        rule = replace(c.rule, fused=c.recompute and not observe)
        done = Written([], live, start, [])
        for begin, end in _cuts(gates.rate.shape[-1], offset, length):
            begins = offset is not None and (offset + begin) % length == 0
            piece = gates.cut(begin, end)
            origin = done.live.weights if begins else done.start
            reads, after = deep_chunk(
                None if begins else origin,
                done.live,
                piece.key,
                own_target(origin, piece.value, rule),
                piece.rate * scales,
                chunk_decays(piece.log_retain, c.momentum),
                rule,
                initial=initial,
                query=piece.query if reading else None,
                surprise=done.surprise if observe else None,
                mix=mix,
                read_after=c.read == "after",
            )
            done = done._replace(live=after, start=origin)
            if reads is not None:
                done.reads.append(reads)
        return done


def loop_limit(config: SelfModifyingConfig) -> str | None:
    """Why the one-function loop cannot run this configuration, which then goes chunk by chunk; None if it can."""
    if config.memory_length != config.chunk:
        return f"memory_chunk is {config.memory_chunk}, the loop wants one chunk for all memories ({config.chunk})"
    if not config.dgd:
        return "dgd is False, the loop always writes with the gain x xᵀ term"
    return "detach_writes is True, the loop has no stop-gradient" if config.detach_writes else None


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """The inner loop's dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _norms(live: Fast, static: slice) -> Tensor:
    """sqrt(‖w1‖² + ‖w2‖²) of the memories behind the static ones: (B, M, H, 1)."""
    w1, w2 = (w[:, static.stop :].square().sum((-1, -2)) for w in live.weights)
    return (w1 + w2).sqrt()[..., None]


def _stack(*parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Stacks joined along their memories, empty ones left out."""
    return [
        ts[0] if len(ts) == 1 else torch.cat(ts, dim=1)
        for ts in ([t for t in column if t.shape[1]] for column in zip(*parts, strict=True))
    ]


def _cuts(count: int, offset: int | None, length: int) -> list[tuple[int, int]]:
    """Where ``count`` tokens from ``offset`` on are cut by multiples of ``length``."""
    if offset is None:
        return [(0, count)]
    inner = range(length - offset % length, count, length)
    edges = [0, *inner, count]
    return list(zip(edges, edges[1:], strict=False))
