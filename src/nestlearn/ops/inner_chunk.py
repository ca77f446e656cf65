"""One chunk of a self-modifying memory's inner loop, forwards and, by hand, backwards (NL Eq. 86–93; semantics §3).

With the state at the chunk's start, k, v, η, α from `inner_gates.py`, and for every written memory its own target v̂:

    v̂ = n(M(v))     z = w2 k     a = σ(z)     e = λ (k + w1 a) − v̂     e2 = (w1ᵀ e) ∘ σ'(z)     ρ = η · scale
    w1: DGD writes of x = a, g = e          w2: DGD writes of x = k, g = e2          gain = ρ / (1 + ρ ‖x‖²)
    y = q + w1 σ(w2 q), both layers read before each token's own write, or after it

λ = 0 is the objective "dot", 1 is "l2". `inner_layer.py` has the writes, `inner_read.py` the reads.

Letters: N heads and rows, G written memories, F = G · N folded maps, C tokens, d head width, h hidden width; the
state's rows are [w1; m1] (F, 2d, h) and [w2; m2] (F, 2h, d), without m at μ = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.ops import inner_gates as gates
from nestlearn.ops.inner_gates import Map
from nestlearn.ops.inner_layer import (
    LogGrads,
    Shares,
    Solved,
    carry,
    carry_back,
    end,
    end_back,
    over_maps,
    solve,
    solve_back,
)
from nestlearn.ops.inner_read import Read, ReadGrads, read, read_back


class LoopSpec(NamedTuple):
    """Constants of the loop.

    names, written  all M memories, static ones first, "memory" last; the last G are written
    chunk           C, tokens
    momentum        μ in [0, 1);  rate_max  upper end of η
    normalise       whether v̂ is normalised;  anchored  retention towards the initial weights;  retention  False: α = 1
    after           y reads after the write of its own token
    keep            the state is kept at every keep-th chunk, the backward pass computes the others again; 0: all that
                    it needs is kept
    """

    names: tuple[str, ...]
    written: int
    chunk: int
    momentum: float
    rate_max: float
    normalise: bool = True
    anchored: bool = False
    retention: bool = True
    after: bool = False
    keep: int = 4


@dataclass(frozen=True)
class Frame:
    """What does not change along the loop, folded: static weights (S, N, ·, ·), anchors (F, ·, ·), read-outs."""

    spec: LoopSpec
    static1: Tensor
    static2: Tensor
    anchor1: Tensor | None
    anchor2: Tensor | None
    scales: Tensor  # (F, 1, 1)
    rate_weight: Tensor  # (N, d, 1)
    rate_bias: Tensor  # (N, 1)
    retain_weight: Tensor
    retain_bias: Tensor
    mix: Tensor | None  # (F, 1, 1)

    @property
    def count(self) -> int:
        """N."""
        return len(self.rate_bias)

    def of(self, name: str, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """A memory's weights (N, ·, ·), from the static or from the written ones w1, w2 (F, ·, ·)."""
        place, n = self.place(name), self.count
        if place < 0:
            return self.static1[place], self.static2[place]
        return w1[place * n : (place + 1) * n], w2[place * n : (place + 1) * n]

    def place(self, name: str) -> int:
        """Number among the written memories, or from the end of the static ones below 0."""
        return self.spec.names.index(name) - len(self.spec.names) + self.spec.written


class Gates(NamedTuple):
    """What the slow memories generated."""

    key: Map
    value: Map
    rate: Map
    retain: Map | None
    query: Map | None
    k: Tensor
    k_inverse: Tensor
    q: Tensor
    q_inverse: Tensor | None
    opened: Tensor  # sigmoid of the rate's read-out (N, C)
    log_retain: Tensor  # (N, C)


class Errors(NamedTuple):
    """Targets and errors of the written memories, and the rates (F, C, 1)."""

    key: Tensor
    target: Map
    wanted: Tensor  # or −v̂, with λ = 0: for n's backward pass it is the same
    inverse: Tensor | None
    z: Tensor
    gate: Tensor
    slope: Tensor
    error: Tensor
    pulled: Tensor  # w1ᵀ e
    rate: Tensor


class Chunk(NamedTuple):
    """Everything that a chunk's backward pass needs."""

    gates: Gates
    errors: Errors
    shares: Shares
    layer1: Solved
    layer2: Solved
    read1: Read
    read2: Read


class Weights(NamedTuple):
    """The written memories' w1 (F, d, h) and w2 (F, h, d), views of the state."""

    w1: Tensor
    w2: Tensor


def generate(inputs: tuple[Tensor, ...], weights: Weights, frame: Frame) -> Gates:
    """k, v, q, η, α of a chunk from (x, value, query), each (N, C, d)."""
    x, value, query = inputs
    spec = frame.spec
    key = gates.apply_map(x, *frame.of("k", *weights))
    rate = gates.score(x, *frame.of("eta", *weights), frame.rate_weight, frame.rate_bias)
    retain, log_retain = None, torch.zeros_like(rate.out)
    if spec.retention:
        retain = gates.score(x, *frame.of("alpha", *weights), frame.retain_weight, frame.retain_bias)
        log_retain = F.logsigmoid(retain.out).clamp_min(gates.LOG_FLOOR)
    k, k_inverse = gates.normalise(key.out)
    asked, q, q_inverse = None, query, None
    if "q" in spec.names:
        asked = gates.apply_map(query, *frame.of("q", *weights))
        q, q_inverse = gates.normalise(asked.out)
    value = gates.apply_map(value, *frame.of("v", *weights))
    return Gates(key, value, rate, retain, asked, k, k_inverse, q, q_inverse, torch.sigmoid(rate.out), log_retain)


def run_chunk(
    inputs: tuple[Tensor, ...], s1: Tensor, s2: Tensor, frame: Frame, into1: Tensor, into2: Tensor
) -> tuple[Tensor, Chunk]:
    """y (N, C, d) and what happened; the state after the chunk is written to into1, into2."""
    spec, n = frame.spec, frame.count
    d, h = inputs[0].shape[-1], s1.shape[-1]
    weights = Weights(s1[:, :d], s2[:, :h])
    made = generate(inputs, weights, frame)
    shares = Shares.of(made.log_retain, spec.momentum, spec.written)
    key = made.k.repeat(spec.written, 1, 1)
    carried2 = carry(key, s2, frame.anchor2, shares, h)
    z = carried2.moved[..., :h]
    gate = torch.sigmoid(z)
    hidden = z * gate
    slope = torch.addcmul(gate, hidden, 1 - gate)
    carried1 = carry(hidden, s1, frame.anchor1, shares, d)
    target = gates.apply_map(made.value.out.repeat(spec.written, 1, 1), *weights)
    wanted, inverse = gates.normalise(target.out) if spec.normalise else (target.out, None)
    error = wanted.neg_() if frame.mix is None else (key + carried1.moved[..., :d]).mul_(frame.mix).sub_(wanted)
    pulled = torch.bmm(error, weights.w1)
    rate = frame.scales * (spec.rate_max * made.opened).repeat(spec.written, 1)[..., None]
    errors = Errors(key, target, wanted, inverse, z, gate, slope, error, pulled, rate)
    layer1 = solve(hidden, torch.bmm(hidden, hidden.mT), error, rate, carried1, shares)
    layer2 = solve(key, torch.bmm(made.k, made.k.mT), pulled * slope, rate, carried2, shares)
    end(layer1, s1, frame.anchor1, shares, into1)
    end(layer2, s2, frame.anchor2, shares, into2)
    last = shares.last(n, after=spec.after)
    read2 = read(made.q, _last(layer2, n), s2[-n:], _tail(frame.anchor2, n), last)
    read1 = read(F.silu(read2.out), _last(layer1, n), s1[-n:], _tail(frame.anchor1, n), last)
    return made.q + read1.out, Chunk(made, errors, shares, layer1, layer2, read1, read2)


def _tail(t: Tensor | None, count: int) -> Tensor | None:
    return None if t is None else t[-count:]


def _last(solved: Solved, count: int) -> Solved:
    """The last map's part: what a read needs."""
    return solved._replace(x=solved.x[-count:], updates=solved.updates[-count:], erased=solved.erased[-count:])


@dataclass
class Totals:
    """Gradients of what does not change along the loop, collected; shaped as in `Frame`, rows not yet summed."""

    static1: Tensor
    static2: Tensor
    anchor1: Tensor | None
    anchor2: Tensor | None
    scales: Tensor
    rate_weight: Tensor
    rate_bias: Tensor
    retain_weight: Tensor
    retain_bias: Tensor
    mix: Tensor | None

    @classmethod
    def zeros(cls, frame: Frame) -> Totals:
        """Nothing collected yet."""
        given = ((name, getattr(frame, name)) for name in cls.__dataclass_fields__)
        zeros: dict[str, Any] = {name: t if t is None else torch.zeros_like(t) for name, t in given}
        return cls(**zeros)


class StateGrads(NamedTuple):
    """Gradients of a chunk's start or end: of its state, and at μ = 0 of the last chunk's momenta."""

    s1: Tensor
    s2: Tensor
    m1: Tensor | None = None
    m2: Tensor | None = None


def chunk_back(
    dy: Tensor,
    d_end: StateGrads,
    done: Chunk,
    before: tuple[Tensor, Tensor],
    frame: Frame,
    totals: Totals,
) -> tuple[tuple[Tensor, ...], StateGrads]:
    """Gradients of (x, value, query) and of the state before the chunk; the others go to ``totals``."""
    spec, n, (s1, s2) = frame.spec, frame.count, before
    d, h = dy.shape[-1], s1.shape[-1]
    errors, shares, grads = done.errors, done.shares, LogGrads.zeros(done.gates.log_retain, spec.momentum)
    weights, layer1, layer2 = Weights(s1[:, :d], s2[:, :h]), done.layer1, done.layer2
    asked1, asked2 = _read_back(dy, done, before, frame, grads)

    ds1, da1 = end_back(d_end.s1, s1, frame.anchor1, shares, grads, d)
    ds2, da2 = end_back(d_end.s2, s2, frame.anchor2, shares, grads, h)
    dk, d_error2, d_gain2, d_share2 = solve_back(
        layer2, d_end.s2, d_end.m2, asked2.erased, asked2.updates, shares, grads
    )
    d_hidden, d_error, d_gain1, d_share1 = solve_back(
        layer1, d_end.s1, d_end.m1, asked1.erased, asked1.updates, shares, grads
    )
    d_hidden[-n:] += asked1.x
    dk += asked2.x
    d_pulled = d_error2 * errors.slope
    d_error.baddbmm_(d_pulled, weights.w1.mT)
    dw1 = torch.bmm(errors.error.mT, d_pulled)
    extra = _mix_back(d_error, done, frame, totals)

    part, moved1, held1 = carry_back(d_share1, layer1.x, s1, frame.anchor1, shares, extra)
    d_hidden += part
    d_rate = _gain_back(d_gain1[..., None], layer1, d_hidden)
    dz = _slope_back(d_hidden, d_error2 * errors.pulled, errors)
    d_key, moved2, held2 = carry_back(d_share2, layer2.x, s2, frame.anchor2, shares, dz)
    d_rate += _gain_back(d_gain2[..., None], layer2, d_key)
    if extra is not None:
        d_key += extra
    dk += d_key.unflatten(0, (-1, n)).sum(0)

    d_value, part1, part2 = _target_back(d_error, errors, weights, spec)
    dw1 += part1
    _collect(totals.anchor1, da1, held1, asked1.anchor)
    _collect(totals.anchor2, da2, held2, asked2.anchor)
    ds1 += moved1
    ds2 += moved2
    ds1[-n:] += asked1.state
    ds2[-n:] += asked2.state
    d_weights = Weights(dw1, part2)
    d_log = grads.finish(shares.plain, spec.momentum)
    dq = dy + asked2.query
    d_inputs = _gates_back(
        dk, d_value.unflatten(0, (-1, n)).sum(0), dq, d_rate, d_log, done, weights, d_weights, frame, totals
    )
    ds1[:, :d] += dw1
    ds2[:, :h] += part2
    return d_inputs, StateGrads(ds1, ds2)


def _read_back(
    dy: Tensor, done: Chunk, before: tuple[Tensor, Tensor], frame: Frame, grads: LogGrads
) -> tuple[ReadGrads, ReadGrads]:
    n, (s1, s2), after = frame.count, before, frame.spec.after
    last, anchors = done.shares.last(n, after=after), (_tail(frame.anchor1, n), _tail(frame.anchor2, n))
    asked1 = read_back(dy, done.read1, _last(done.layer1, n), s1[-n:], anchors[0], last, grads, after=after)
    inner = gates.silu_back(asked1.query, done.read2.out)
    asked2 = read_back(inner, done.read2, _last(done.layer2, n), s2[-n:], anchors[1], last, grads, after=after)
    return asked1, asked2


def _mix_back(d_error: Tensor, done: Chunk, frame: Frame, totals: Totals) -> Tensor | None:
    """Through λ (k + w1 a): the gradient of k and of w1 a, which are equal."""
    if frame.mix is None or totals.mix is None:
        return None
    image = done.errors.key + done.layer1.carried.moved[..., : d_error.shape[-1]]
    totals.mix += (d_error * image).sum((-1, -2), keepdim=True)
    return frame.mix * d_error


def _gain_back(d_gain: Tensor, solved: Solved, dx: Tensor) -> Tensor:
    """d rate of gain = ρ / (1 + ρ ‖x‖²), and ``dx`` grows by its part."""
    dx.addcmul_(d_gain * solved.gain.square(), solved.x, value=-2)
    return d_gain * solved.shrink.square()


def _slope_back(d_hidden: Tensor, d_slope: Tensor, errors: Errors) -> Tensor:
    """dz of a = σ(z) and σ'(z), with σ'' = s (1 − s) (2 + z (1 − 2 s))."""
    z, gate = errors.z, errors.gate
    curve = torch.addcmul(z, z, gate, value=-2).add_(2)
    curve.mul_(gate - gate * gate).mul_(d_slope)
    return curve.addcmul_(d_hidden, errors.slope)


def _target_back(d_error: Tensor, errors: Errors, weights: Weights, spec: LoopSpec) -> tuple[Tensor, Tensor, Tensor]:
    """d v (F, C, d), d w1, d w2 through v̂ = n(M(v)), from e = … − v̂."""
    grad = -d_error
    if errors.inverse is not None:
        grad = gates.normalise_back(grad, errors.wanted, errors.inverse)
    return gates.map_back(grad, errors.target, *weights)


def _collect(total: Tensor | None, end_part: Tensor | None, held: Tensor | None, asked: Tensor | None) -> None:
    """Add an anchor's gradients."""
    if total is None or end_part is None or held is None or asked is None:
        return
    total.add_(end_part).add_(held)
    total[-len(asked) :] += asked


def _gates_back(
    dk: Tensor,
    dv: Tensor,
    dq: Tensor,
    d_rate: Tensor,
    d_log: Tensor,
    done: Chunk,
    weights: Weights,
    d_weights: Weights,
    frame: Frame,
    totals: Totals,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, value, query) through what the slow memories generated."""
    made, spec, n = done.gates, frame.spec, frame.count

    def add(name: str, d_w1: Tensor, d_w2: Tensor) -> None:
        place = frame.place(name)
        if place < 0:
            totals.static1[place] += d_w1
            totals.static2[place] += d_w2
        else:
            d_weights.w1[place * n : (place + 1) * n] += d_w1
            d_weights.w2[place * n : (place + 1) * n] += d_w2

    scaled = (spec.rate_max * made.opened).repeat(spec.written, 1)[..., None]
    totals.scales += (d_rate * scaled).sum(1, keepdim=True)
    d_opened = spec.rate_max * over_maps((d_rate * frame.scales).squeeze(-1), n)
    d_logit = d_opened * made.opened * (1 - made.opened)
    dx, *parts, d_read = gates.score_back(d_logit, made.rate, *frame.of("eta", *weights), frame.rate_weight)
    add("eta", *parts)
    totals.rate_weight += d_read
    totals.rate_bias += d_logit.sum(-1, keepdim=True)
    if made.retain is not None:
        d_logit = d_log * torch.sigmoid(-made.retain.out) * (made.log_retain > gates.LOG_FLOOR)
        part, *parts, d_read = gates.score_back(d_logit, made.retain, *frame.of("alpha", *weights), frame.retain_weight)
        add("alpha", *parts)
        dx += part
        totals.retain_weight += d_read
        totals.retain_bias += d_logit.sum(-1, keepdim=True)
    part, *parts = gates.map_back(gates.normalise_back(dk, made.k, made.k_inverse), made.key, *frame.of("k", *weights))
    add("k", *parts)
    dx += part
    d_value, *parts = gates.map_back(dv, made.value, *frame.of("v", *weights))
    add("v", *parts)
    if made.query is not None and made.q_inverse is not None:
        dq = gates.normalise_back(dq, made.q, made.q_inverse)
        dq, *parts = gates.map_back(dq, made.query, *frame.of("q", *weights))
        add("q", *parts)
    return dx, d_value, dq
