"""One layer's DGD writes over one chunk, with a backward pass written by hand (NL Eq. 57, 90–93).

The chunk form of `dgd_chunk` in the unknowns E = gain · P, the erased part, and with Ĝ = gain · G, so that no input is
scaled. K = X Xᵀ, N = K ∘ R', V = K ∘ W', Q = (I + N D)⁻¹ N with D = diag(gain) (`resolvent.py`), A the anchor:

    share = γ' X S₀ᵀ + (1 − γ') X Aᵀ + w0' X m₀ᵀ        right = share − V Ĝ        P = right − Q D right
    left = W_C Ĝ + R_C E                                S_C = γ_C S₀ + (1 − γ_C) A + w0_C m₀ − leftᵀ X
    moved = μ_C Ĝ                                       m_C = μ^C m₀ − movedᵀ X

Backward, d· marking a gradient:

    dleft = −X dS_Cᵀ     dmoved = −X dm_Cᵀ     dE = R_C dleft + …     dĜ = W_C dleft + μ_C dmoved + … − Vᵀ dright
    w = dE − Qᵀ D dE     dright = D w     dgain = ⟨w, P⟩ + ⟨dĜ, G⟩     dG = D dĜ
    dK = −(dright Eᵀ) ∘ R' − (dright Ĝᵀ) ∘ W'     dX = (dK + dKᵀ) X − left dS_C − moved dm_C + …

At μ = 0, W' = R' and everything is in T = E + Ĝ: P = share − Q D (share + G), dT as dE above, dĜ = w.

Decays are taken in log space, R'[t,r] = exp(a_t − b_r), a_t = log γ_{t−1}, b_r = log γ_r, a_end = log γ_C. With J the
gradient of log R' (row "end": of log R[C,:]), summed over all maps, and Z the same of W' = R' L:

    J = −(dright Eᵀ) ∘ K ∘ R'     J_end = R[C,:] ∘ ⟨dleft, E⟩      (μ = 0: T for E)
    da_t = γ'_t ⟨dright_t, (S₀ − A) x_t⟩ + Σ_r J[t,r]     db_r = −Σ_t J[t,r]
    da_end = γ_C ⟨dS_C, S₀ − A⟩ + Σ_r J_end[r]

R'[t,t−1] and R[C,C] are 1 whatever α is. They stay out of these sums: left in, their gradients would cancel only to
rounding, and at small α there is little else.

Letters: F folded maps (memories × heads and rows), N heads and rows, C tokens; X (F, C, in); G, P (F, C, out); the
state's rows are [S; m] (F, 2·out, in), without m at μ = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.dgd_chunk import Decays, chunk_decays
from nestlearn.ops.resolvent import resolvent


class Shares(NamedTuple):
    """`Decays` of N heads and rows, its columns repeated for F maps: (F, C, 1), (F, 1, 1); matrices (1, N, C, C)."""

    kept: Tensor
    kept_end: Tensor
    retain: Tensor
    retain_end: Tensor
    leak: Tensor | None
    leak_end: Tensor | None
    moment: Tensor
    moment_end: Tensor
    power_end: Tensor
    mu_end: float
    plain: Decays

    # the columns that scale sides are negative: retain_end is −R[C,:], moment_end −W[C,:], power_end −μ^(C−r)

    @classmethod
    def of(cls, log_retain: Tensor, mu: float, maps: int) -> Shares:
        """From log α (N, C), for F = maps · N."""
        plain = chunk_decays(log_retain, mu)
        leak, leak_end = (t if t is None else t.repeat(maps, 1, 1) for t in (plain.leak, plain.leak_end))
        assert isinstance(plain.mu_end, float)
        return cls(
            plain.kept.repeat(maps, 1, 1), plain.kept_end.repeat(maps, 1, 1),
            plain.retain[None], -plain.retain_end.repeat(maps, 1, 1), leak, leak_end,
            plain.moment[None], -plain.moment_end.repeat(maps, 1, 1), -plain.power_end, plain.mu_end, plain,
        )  # fmt: skip

    def last(self, count: int, *, after: bool) -> Shares:
        """For reads of the last map alone, of ``count`` heads and rows, before or after a token's own write."""
        plain = self.plain.after() if after else self.plain
        return self._replace(
            kept=plain.kept, retain=plain.retain[None], leak=plain.leak, moment=plain.moment[None],
            kept_end=self.kept_end[-count:], retain_end=self.retain_end[-count:],
            leak_end=None if self.leak_end is None else self.leak_end[-count:],
            moment_end=self.moment_end[-count:],
        )  # fmt: skip


class Carried(NamedTuple):
    """X [S; m]ᵀ (F, C, out or 2·out), X Aᵀ (or None), and the share they make."""

    moved: Tensor
    anchored: Tensor | None
    share: Tensor


class Solved(NamedTuple):
    """A layer's writes, solved; letters as above. ``sides`` is −[left, moved]; at μ = 0 ``erased`` is T, no moment."""

    x: Tensor
    g: Tensor
    gain: Tensor
    shrink: Tensor
    updates: Tensor
    gram: Tensor
    moment: Tensor | None
    matrix: Tensor
    reads: Tensor
    erased: Tensor
    sides: Tensor
    carried: Carried


class LogGrads(NamedTuple):
    """Gradients of the log decays, collected over all maps of a chunk: rows (of γ', γ_C) and leak (N, C + 1); J, Z."""

    rows: Tensor
    ratios: Tensor  # J (N, C + 1, C)
    leak: Tensor | None
    moment: Tensor | None

    @classmethod
    def zeros(cls, log_retain: Tensor, mu: float) -> LogGrads:
        """Nothing collected yet, for log α (N, C)."""
        count, size = log_retain.shape
        leak = log_retain.new_zeros(count, size + 1) if mu else None
        moment = log_retain.new_zeros(count, size + 1, size) if mu else None
        return cls(log_retain.new_zeros(count, size + 1), log_retain.new_zeros(count, size + 1, size), leak, moment)

    def finish(self, decays: Decays, mu: float) -> Tensor:
        """d log α (N, C)."""
        size = self.rows.shape[1] - 1
        ratios = self.ratios
        if self.moment is not None and self.leak is not None:
            steps = torch.arange(size, device=ratios.device)
            power = mu ** (steps[:, None] - steps).clamp(min=0).to(ratios.dtype)
            first = mu ** (steps + 1).to(ratios.dtype)
            ratio = torch.cat([decays.retain, decays.retain_end.mT], dim=1)
            total = torch.addcmul(self.moment @ power.tril().mT, self.leak[..., None], first)
            ratios = torch.addcmul(ratios, total, ratio)
        ratios.diagonal(-1, dim1=1, dim2=2).zero_()  # what is 1 whatever α is
        rows = self.rows[:, 1:] + ratios.sum(2)[:, 1:]
        return (rows - ratios.sum(1)).flip(-1).cumsum(-1).flip(-1)


def over_maps(rows: Tensor, count: int) -> Tensor:
    """Row by row values (F, C) summed over the maps: (N, C)."""
    return rows.unflatten(0, (-1, count)).sum(0)


def carry(x: Tensor, state: Tensor, anchor: Tensor | None, shares: Shares, out: int) -> Carried:
    """What the inputs read of the state before the chunk."""
    moved = torch.bmm(x, state.mT)
    anchored = None if anchor is None else torch.bmm(x, anchor.mT)
    first = moved[..., :out]
    share = shares.kept * first if anchored is None else torch.lerp(anchored, first, shares.kept)
    if shares.leak is not None:
        share.addcmul_(shares.leak, moved[..., out:])
    return Carried(moved, anchored, share)


def carry_back(
    d_share: Tensor, x: Tensor, state: Tensor, anchor: Tensor | None, shares: Shares, extra: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dX, d[S; m], dA of `carry`; ``extra`` is a gradient of X S₀ᵀ itself."""
    d_moved = shares.kept * d_share if shares.leak is None else _pair(d_share, shares.kept, shares.leak)
    first = d_moved[..., : d_share.shape[-1]]
    held = None if anchor is None else d_share - first
    if extra is not None:
        first += extra
    dx, d_state = torch.bmm(d_moved, state), torch.bmm(d_moved.mT, x)
    if held is None or anchor is None:
        return dx, d_state, None
    return dx.baddbmm_(held, anchor), d_state, torch.bmm(held.mT, x)


def log_rows(d_share: Tensor, carried: Carried, shares: Shares, grads: LogGrads, first: int = 0) -> None:
    """Collect γ'_t ⟨dright_t, (S₀ − A) x_t⟩ and the leak's part.

    first  1 where token t has the decays of row t + 1: reads after its own write
    """
    rows = slice(first, first + d_share.shape[-2])
    count, out = len(grads.rows), d_share.shape[-1]
    free = carried.moved[..., :out]
    if carried.anchored is not None:
        free = free - carried.anchored
    grads.rows[:, rows] += over_maps((d_share * free).sum(-1) * shares.kept.squeeze(-1), count)
    if grads.leak is not None:
        grads.leak[:, rows] += over_maps((d_share * carried.moved[..., out:]).sum(-1), count)


def solve(x: Tensor, gram: Tensor, g: Tensor, rate: Tensor, carried: Carried, shares: Shares) -> Solved:
    """The writes of a chunk. x (F, C, in); its gram (F or N, C, C), N where all maps share x; rate ρ (F, C, 1)."""
    share, heads = carried.share, len(shares.plain.kept)
    norm = gram.diagonal(dim1=-2, dim2=-1)[..., None]
    shrink = 1 / (1 + rate * norm.repeat(len(x) // len(norm), 1, 1))
    gain = rate * shrink
    updates = gain * g
    decayed = _spread(gram, shares.retain, heads, len(x))
    matrix = resolvent(decayed, gain)
    if shares.leak is None:
        reads = share.baddbmm_(matrix, torch.addcmul(updates, gain, share), alpha=-1)
        erased, moment = torch.addcmul(updates, gain, reads), None
        return Solved(
            x, g, gain, shrink, updates, gram, None, matrix, reads, erased, shares.retain_end * erased, carried
        )
    moment = _spread(gram, shares.moment, heads, len(x))
    right = share.baddbmm_(moment, updates, alpha=-1)
    reads = right.baddbmm_(matrix, gain * right, alpha=-1)
    erased = gain * reads
    sides = _pair(updates, shares.moment_end, shares.power_end)
    sides[..., : g.shape[-1]].addcmul_(shares.retain_end, erased)
    return Solved(x, g, gain, shrink, updates, gram, moment, matrix, reads, erased, sides, carried)


def _pair(t: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """[first ∘ t, second ∘ t] side by side."""
    width = t.shape[-1]
    pair = t.new_empty(*t.shape[:-1], 2 * width)
    torch.mul(t, first, out=pair[..., :width])
    torch.mul(t, second, out=pair[..., width:])
    return pair


def _spread(gram: Tensor, share: Tensor, heads: int, maps: int) -> Tensor:
    """gram ∘ share as (F, C, C), from a gram of each map or of each head and row."""
    product = gram.unflatten(0, (-1, heads)) * share
    return product.expand(maps // heads, *product.shape[1:]).flatten(0, 1)


def end(solved: Solved, state: Tensor, anchor: Tensor | None, shares: Shares, into: Tensor) -> Tensor:
    """[S; m] after the chunk, written to ``into``."""
    out = solved.g.shape[-1]
    torch.bmm(solved.sides.mT, solved.x, out=into)
    first, last = into[:, :out], into[:, out:]
    first.addcmul_(shares.kept_end, state[:, :out])
    if anchor is not None:
        first.addcmul_(1 - shares.kept_end, anchor)
    if shares.leak_end is not None:
        first.addcmul_(shares.leak_end, state[:, out:])
        last.add_(state[:, out:], alpha=shares.mu_end)
    return into


def solve_back(
    solved: Solved,
    d_end: Tensor,
    d_last: Tensor | None,
    d_erased: Tensor | None,
    d_updates: Tensor | None,
    shares: Shares,
    grads: LogGrads,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX without the carried part (F, C, in; or summed over maps that share x: N), dG, dgain (F, C), dshare.

    d_end                d[S_C; m_C];  d_last, at μ = 0: dm_C of the last chunk, whose m_C is its last token's write
    d_erased, d_updates  what a read of the last map adds to its dE (or dT) and dĜ
    """
    s, out, count = solved, solved.g.shape[-1], len(grads.rows)
    d_sides = torch.bmm(s.x, d_end.mT)
    d_left = d_sides[..., :out]
    de = _plus(shares.retain_end * d_left, d_erased)
    w = de.baddbmm_(s.matrix.mT, s.gain * de, alpha=-1)
    d_right = s.gain * w
    dg, heads = w, (-1, count)
    products = (_outer(d_right, s.erased, s.gram).unflatten(0, heads) * shares.retain).flatten(0, 1)
    _subtract_products(grads.ratios[:, :-1], products, s.gram)
    grads.ratios[:, -1] += over_maps((d_left * s.erased).sum(-1) * shares.retain_end.squeeze(-1), count)
    if s.moment is not None and grads.moment is not None:
        dg = torch.addcmul(shares.moment_end * d_left, shares.power_end, d_sides[..., out:])
        dg = _plus(dg, d_updates).baddbmm_(s.moment.mT, d_right, alpha=-1)
        grads.moment[:, -1] -= over_maps((d_left * s.updates).sum(-1), count)
        others = _outer(d_right, s.updates, s.gram)
        _subtract_products(grads.moment[:, :-1], others, s.gram)
        products.unflatten(0, heads).addcmul_(others.unflatten(0, heads), shares.moment)
    log_rows(d_right, s.carried, shares, grads)
    if d_last is not None:
        dg = dg.clone()
        dg[:, -1:] -= s.x[:, -1:] @ d_last.mT
    d_gain = (w * s.reads).sum(-1) + (dg * s.g).sum(-1)
    dx = _through_sides(s.sides, d_end, len(s.gram))
    dx.baddbmm_(products + products.mT, s.x[: len(products)], alpha=-1)
    if d_last is not None:
        dx[:, -1:] -= (s.updates[:, -1:] @ d_last).unflatten(0, (-1, len(dx))).sum(0)
    return dx, s.gain * dg, d_gain, d_right


def last_write(solved: Solved) -> Tensor:
    """m_C at μ = 0: the last token's write."""
    return -(solved.updates[:, -1, :, None] * solved.x[:, -1, None, :])


def _plus(total: Tensor, last: Tensor | None) -> Tensor:
    """Add what concerns the last map alone."""
    if last is not None:
        total[-len(last) :] += last
    return total


def _outer(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a bᵀ of each map; summed over the maps where ``like`` is shared by them."""
    heads = len(like)
    if heads == len(a):
        return torch.bmm(a, b.mT)
    total = torch.bmm(a[:heads], b[:heads].mT)
    for begin in range(heads, len(a), heads):
        total.baddbmm_(a[begin : begin + heads], b[begin : begin + heads].mT)
    return total


def _subtract_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (N, C, C) −= Σ over maps of a ∘ b."""
    for begin in range(0, len(a), len(total)):
        total.addcmul_(a[begin : begin + len(total)], b[begin : begin + len(total)], value=-1)


def _through_sides(sides: Tensor, d_end: Tensor, count: int) -> Tensor:
    """−[left, moved] d[S_C; m_C], summed over the maps that share X."""
    dx = torch.bmm(sides[:count], d_end[:count])
    for begin in range(count, len(sides), count):
        dx.baddbmm_(sides[begin : begin + count], d_end[begin : begin + count])
    return dx


def end_back(
    d_end: Tensor, state: Tensor, anchor: Tensor | None, shares: Shares, grads: LogGrads, out: int
) -> tuple[Tensor, Tensor | None]:
    """d[S₀; m₀] and dA through `end` itself."""
    count, first = len(grads.rows), d_end[:, :out]
    free = state[:, :out] if anchor is None else state[:, :out] - anchor
    kept = shares.kept_end.flatten()
    grads.rows[:, -1] += over_maps((kept * (first * free).sum((-1, -2)))[:, None], count).squeeze(-1)
    d_anchor = None if anchor is None else (1 - shares.kept_end) * first
    if shares.leak_end is None or grads.leak is None:
        return shares.kept_end * first, d_anchor
    grads.leak[:, -1] += over_maps((first * state[:, out:]).sum((-1, -2))[:, None], count).squeeze(-1)
    moved = torch.add(shares.leak_end * first, d_end[:, out:], alpha=shares.mu_end)
    return torch.cat([shares.kept_end * first, moved], dim=1), d_anchor
