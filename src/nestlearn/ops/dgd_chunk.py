"""Delta gradient descent on a linear map, over a stream: one write, token by token, and chunk-parallel.

One token (NL Eq. 57, 88), for a map S (out, in), input x, output gradient g, rate η > 0, retention α in (0, 1],
momentum μ in [0, 1):

    gain = η / (1 + η ‖x‖²)                   the exact proximal step (Sherman–Morrison): stable for every η
    m ← μ m − gain · g xᵀ
    S ← S (α I − gain · x xᵀ) + m

The same over a chunk of C tokens, in its dual form (NL Eq. 90–93), with U = −gain · G, γ_t = Π_{s≤t} α_s,
R[t,r] = γ_t/γ_r, L[t,r] = μ^(t−r), W = R L, w0[t] = Σ_{τ≤t} R[t,τ] μ^τ and primes for "one row earlier" (row t holds
row t−1, row 1 is 0). The unknowns are the reads p_t = S_{t−1} x_t, and one unit lower triangular system gives them all:

    (I + (X Xᵀ ∘ R') diag(gain)) P = γ' X S₀ᵀ + w0' X m₀ᵀ + (X Xᵀ ∘ W') U
    read of q_t before its own write = γ'_t S₀ q_t + w0'_t m₀ q_t + [(Q Xᵀ ∘ W') U − (Q Xᵀ ∘ R') diag(gain) P]_t
    S_C = γ_C S₀ + w0_C m₀ + Σ_r (W[C,r] u_r − R[C,r] gain_r p_r) x_rᵀ
    m_C = μ^C m₀ + Σ_r μ^(C−r) u_r x_rᵀ

Retention may act towards an anchor A instead of zero: S₀'s share γ S₀ becomes γ S₀ + (1 − γ) A, nothing else changes.
The term gain · x xᵀ can be dropped (plain gradient descent): then P is not needed.

Letters: C tokens of a chunk; X (…, C, in); U, G, P (…, C, out); S, m (…, out, in); gain, α (…, C).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.errors import UserError


def dgd_gain(inputs: Tensor, rate: Tensor) -> Tensor:
    """gain = η / (1 + η ‖x‖²) for inputs (…, in) and rate (…)."""
    return rate / (1 + rate * inputs.square().sum(-1))


def dgd_write(
    state: Tensor, momentum: Tensor, inputs: Tensor, errors: Tensor, rate: Tensor, retain: Tensor, mu: float
) -> tuple[Tensor, Tensor]:
    """One write. state, momentum (…, out, in); inputs (…, in); errors g (…, out); rate, retain (…)."""
    gain = dgd_gain(inputs, rate)[..., None]
    read = state @ inputs[..., None]
    momentum = mu * momentum - (gain * errors)[..., None] * inputs[..., None, :]
    state = retain[..., None, None] * state - read * (gain * inputs)[..., None, :] + momentum
    return state, momentum


def dgd_steps(
    state: Tensor,
    momentum: Tensor,
    inputs: Tensor,
    errors: Tensor,
    rate: Tensor,
    retain: Tensor,
    query: Tensor,
    *,
    mu: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence token by token; arguments and results as `dgd_chunk`."""
    reads = []
    for t in range(inputs.shape[1]):
        reads.append((state @ query[:, t, :, :, None]).squeeze(-1))
        state, momentum = dgd_write(state, momentum, inputs[:, t], errors[:, t], rate[:, t], retain[:, t], mu)
    return torch.stack(reads, dim=1), state, momentum


def dgd_chunk(
    state: Tensor,
    momentum: Tensor,
    inputs: Tensor,
    errors: Tensor,
    rate: Tensor,
    retain: Tensor,
    query: Tensor,
    *,
    mu: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recurrence over a stream, ``chunk`` tokens at a time, exact for every chunk length.

    state, momentum  (B, H, out, in)
    inputs, query    (B, T, H, in)
    errors           (B, T, H, out), the gradient of the inner loss with respect to the map's output
    rate, retain     (B, T, H), η > 0 and α in (0, 1]
    mu               momentum decay in [0, 1);  chunk  tokens solved at once, >= 1

    Returns (reads (B, T, H, out), each before its own token's write; state; momentum).
    """
    if chunk < 1:
        raise UserError(f"chunk is {chunk}, must be at least 1 token")
    if not 0 <= mu < 1:
        raise UserError(f"mu is {mu}, must be in [0, 1)")
    inputs, errors, query = (t.transpose(1, 2) for t in (inputs, errors, query))
    gain = dgd_gain(inputs, rate.transpose(1, 2))
    log_retain = retain.transpose(1, 2).log()
    updates = -gain[..., None] * errors
    reads = []
    for cut in range(0, inputs.shape[2], chunk):
        piece = slice(cut, cut + chunk)
        x, decays = inputs[:, :, piece], chunk_decays(log_retain[:, :, piece], mu)
        write = chunk_write(
            x, updates[:, :, piece], gain[:, :, piece], x @ state.mT, x @ momentum.mT if mu else None, decays
        )
        q = query[:, :, piece]
        reads.append(chunk_read(write, q, q @ state.mT, q @ momentum.mT if mu else None, decays))
        state, momentum = chunk_end(write, state, momentum, decays)
    return torch.cat(reads, dim=2).transpose(1, 2), state, momentum


class Decays(NamedTuple):
    """What the retention and momentum of one chunk's tokens do to its writes; shared by all maps that share α.

    kept        (…, C, 1)  γ'      share of S₀ left when token t reads
    kept_end    (…, 1, 1)  γ_C
    retain      (…, C, C)  R'      share of a write's decay term left when token t reads, 0 on and above the diagonal
    retain_end  (…, C, 1)  R[C,:]
    leak        (…, C, 1)  w0'     share of m₀ that has leaked into S
    leak_end    (…, 1, 1)  w0_C
    moment      (…, C, C)  W'      share of a write's update u
    moment_end  (…, C, 1)  W[C,:]
    power_end   (…, C, 1)  μ^(C−r)
    mu_end                 μ^C, a number or (…, 1, 1)
    """

    kept: Tensor
    kept_end: Tensor
    retain: Tensor
    retain_end: Tensor
    leak: Tensor | None
    leak_end: Tensor | None
    moment: Tensor
    moment_end: Tensor
    power_end: Tensor
    mu_end: float | Tensor

    def after(self) -> Decays:
        """For reads after the token's own write: γ, R, w0, W in the place of γ', R', w0', W', one row further each."""
        leak = None if self.leak is None or self.leak_end is None else one_later(self.leak, self.leak_end)
        return self._replace(
            kept=one_later(self.kept, self.kept_end),
            retain=one_later(self.retain, self.retain_end.mT),
            leak=leak,
            moment=one_later(self.moment, self.moment_end.mT),
        )


def one_later(rows: Tensor, end: Tensor) -> Tensor:
    """Rows 2 … C and the end's: (…, C, ·)."""
    return torch.cat([rows[..., 1:, :], end], dim=-2)


def chunk_decays(log_retain: Tensor, mu: float) -> Decays:
    """All decay factors of a chunk from log α (…, C). Ratios are taken in log space: nothing overflows."""
    size = log_retain.shape[-1]
    after = log_retain.cumsum(-1)  # log γ_t
    before = torch.nn.functional.pad(after[..., :-1], (1, 0))  # log γ_{t−1}, bit by bit: R'[t,t−1] is 1
    ratio = _ratios(torch.cat([before, after[..., -1:]], dim=-1), after)  # R' with R[C,:] as its last row
    kept, kept_end = before.exp()[..., None], after[..., -1:].exp()[..., None]
    retain, retain_end = ratio[..., :-1, :], ratio[..., -1, :, None]
    power, first, power_end = _powers(size, mu, log_retain.device, log_retain.dtype)
    if mu == 0:
        return Decays(kept, kept_end, retain, retain_end, None, None, retain, retain_end, power_end, 0.0)
    moment, leak = ratio @ power, ratio @ first
    return Decays(
        kept, kept_end, retain, retain_end,
        leak[..., :-1, :], leak[..., -1:, :], moment[..., :-1, :], moment[..., -1, :, None],
        power_end, mu**size,
    )  # fmt: skip


def _ratios(row: Tensor, column: Tensor) -> Tensor:
    """exp(row_t − column_r) for r < t, else 0: (…, C+1, C)."""
    logs = row[..., :, None] - column[..., None, :]
    future = torch.ones(logs.shape[-2:], dtype=torch.bool, device=logs.device).triu()
    return logs.masked_fill(future, float("-inf")).exp()


def _powers(size: int, mu: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """L (C, C), the column μ^τ (C, 1) and the column μ^(C−r) (C, 1)."""
    steps = torch.arange(size, device=device)
    exponent = steps[:, None] - steps
    power = torch.where(exponent >= 0, torch.as_tensor(mu, dtype=dtype, device=device) ** exponent.clamp(min=0), 0)
    column = torch.as_tensor(mu, dtype=dtype, device=device) ** (steps + 1)
    return power, column[:, None], power[-1, :, None]


class Write(NamedTuple):
    """One chunk's writes, solved: inputs X, updates U, E = diag(gain) P (None without the gain · x xᵀ term).

    added, added_momentum  Σ_r (W[C,r] u_r − R[C,r] e_r) x_rᵀ and Σ_r μ^(C−r) u_r x_rᵀ, what the chunk adds to S and m
    """

    inputs: Tensor
    updates: Tensor
    erased: Tensor | None
    added: Tensor
    added_momentum: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Write:
        """The same with every tensor changed."""
        erased = None if self.erased is None else change(self.erased)
        return Write(change(self.inputs), change(self.updates), erased, change(self.added), change(self.added_momentum))


def chunk_write(
    inputs: Tensor,
    updates: Tensor,
    gain: Tensor,
    carried: Tensor,
    carried_momentum: Tensor | None,
    decays: Decays,
    *,
    erase: bool = True,
    anchored: Tensor | None = None,
) -> Write:
    """Solve for what each token's write erases.

    carried   X S₀ᵀ (…, C, out);  carried_momentum  X m₀ᵀ, not needed at μ = 0
    erase     False drops the gain · x xᵀ term
    anchored  X Aᵀ, retention towards A
    """
    share = chunk_share(carried, carried_momentum, anchored, decays)
    erased, left = None, decays.moment_end * updates
    if erase:
        products = inputs @ inputs.mT
        right = share + (products * decays.moment) @ updates
        system = (products * decays.retain) * gain[..., None, :]
        erased = gain[..., None] * torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        left = left - decays.retain_end * erased
    return Write(inputs, updates, erased, left.mT @ inputs, (decays.power_end * updates).mT @ inputs)


def chunk_read(
    write: Write,
    query: Tensor,
    carried: Tensor,
    carried_momentum: Tensor | None,
    decays: Decays,
    *,
    anchored: Tensor | None = None,
) -> Tensor:
    """What each query (…, C, in) reads before its token's write, with ``decays.after()`` after it: (…, C, out)."""
    products = query @ write.inputs.mT
    read = chunk_share(carried, carried_momentum, anchored, decays)
    if write.erased is None:
        return read + (products * decays.moment) @ write.updates
    if decays.leak is None:  # μ = 0: both sums share R'
        return read + (products * decays.retain) @ (write.updates - write.erased)
    return read + (products * decays.moment) @ write.updates - (products * decays.retain) @ write.erased


def chunk_end(
    write: Write, state: Tensor, momentum: Tensor, decays: Decays, *, anchor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The map and its momentum after the chunk."""
    end = torch.addcmul(write.added, decays.kept_end, state)
    if anchor is not None:
        end = end + (1 - decays.kept_end) * anchor
    if decays.leak_end is None:
        return end, write.added_momentum
    return torch.addcmul(end, decays.leak_end, momentum), write.added_momentum + decays.mu_end * momentum


def chunk_share(carried: Tensor, momentum: Tensor | None, anchored: Tensor | None, decays: Decays) -> Tensor:
    """γ' (X S₀ᵀ) + (1 − γ') (X Aᵀ) + w0' (X m₀ᵀ)."""
    if anchored is None:
        share = decays.kept * carried
    else:
        share = torch.addcmul(anchored, decays.kept, carried - anchored)
    return share if decays.leak is None or momentum is None else torch.addcmul(share, decays.leak, momentum)
