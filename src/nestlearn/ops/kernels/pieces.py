"""What both Triton kernels of the inner loop are made of: loads, products, gates, decays, the blocked inverse, a layer.

The mathematics is that of `inner_chunk.py` and `inner_layer.py`. A tile is C tokens, or rows by columns of a weight,
padded with zeros to powers of two; the rows of missing tokens have rate 0 and log α = 0, so they change nothing.
OPERANDS is the dtype that products read (they add in float32), PRECISION how float32 operands are multiplied. The maps
and the solves always read float32 (tf32 beside bfloat16): read in bfloat16, they bring gradients to 3e-2 of the truth,
so to 1.4e-2 (one draw of tests/ops/test_kernels.py).

Letters: C tokens, D head width, HID hidden width, all padded; R' ``ratio``, W' ``moment``, Ĝ ``updates``, E ``erased``.
"""

# Kernels are in Triton's language, of which these checks know nothing.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton reads module globals only as constants of its own.
_EPS = tl.constexpr(1e-6)
_LOG_FLOOR = tl.constexpr(-30.0)
# The interpreter multiplies bfloat16 operands as if their bits were whole numbers: there, round them and go back.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_tile(base, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A row-major (rows, columns) matrix, zeros around it."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(base + i[:, None] * columns + j[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(base, tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(base + i[:, None] * columns + j[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, OPERANDS: tl.constexpr, PRECISION: tl.constexpr):
    """a b, added in float32."""
    if _INTERPRETED:
        return tl.dot(a.to(OPERANDS).to(tl.float32), b.to(OPERANDS).to(tl.float32))
    return tl.dot(a.to(OPERANDS), b.to(OPERANDS), input_precision=PRECISION)


@triton.jit
def silu_and_slope(z):
    gate = tl.sigmoid(z)
    hidden = z * gate
    return hidden, gate + hidden * (1 - gate)


@triton.jit
def silu_curve(z):
    """σ''(z) = s (1 − s) (2 + z (1 − 2 s))."""
    gate = tl.sigmoid(z)
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


@triton.jit
def normalise(z):
    """z / sqrt(‖z‖² + 1e-6) and the factor."""
    inverse = 1 / tl.sqrt(tl.sum(z * z, axis=1) + _EPS)
    return z * inverse[:, None], inverse


@triton.jit
def normalise_back(grad, y, inverse):
    return (grad - y * tl.sum(y * grad, axis=1)[:, None]) * inverse[:, None]


@triton.jit
def map_inside(x, w2, OPERANDS: tl.constexpr, PRECISION: tl.constexpr):
    """w2 x of every token."""
    return dot(x, tl.trans(w2), tl.float32, PRECISION)


@triton.jit
def apply_map(x, w1, w2, OPERANDS: tl.constexpr, PRECISION: tl.constexpr):
    """M(x) = x + w1 σ(w2 x)."""
    z = map_inside(x, w2, tl.float32, PRECISION)
    return x + dot(z * tl.sigmoid(z), tl.trans(w1), tl.float32, PRECISION)


@triton.jit
def map_back(grad, x, w1, w2, OPERANDS: tl.constexpr, PRECISION: tl.constexpr):
    """d x, d w1, d w2 of M(x)."""
    hidden, slope = silu_and_slope(map_inside(x, w2, tl.float32, PRECISION))
    dz = dot(grad, w1, tl.float32, PRECISION) * slope
    d_w1 = dot(tl.trans(grad), hidden, tl.float32, PRECISION)
    d_w2 = dot(tl.trans(dz), x, tl.float32, PRECISION)
    return grad + dot(dz, w2, tl.float32, PRECISION), d_w1, d_w2


@triton.jit
def log_sigmoid(z):
    return tl.minimum(z, 0.0) - tl.log(1 + tl.exp(-tl.abs(z)))


@triton.jit
def log_retention(logit):
    return tl.maximum(log_sigmoid(logit), _LOG_FLOOR)


@triton.jit
def above_floor(logit):
    return log_sigmoid(logit) > _LOG_FLOOR


@triton.jit
def ratios(log_retain, valid, C: tl.constexpr):
    """R' (row t holds row t−1), γ' and R[end], γ_end: exponents are sums of log α over stretches, never positive."""
    t = tl.arange(0, C)
    after = tl.cumsum(log_retain, axis=0)
    before = after - log_retain
    total = tl.sum(log_retain, axis=0)
    logs = tl.where(t[None, :] < t[:, None], before[:, None] - after[None, :], float("-inf"))
    retain_end = tl.where(valid, tl.exp(total - after), 0.0)
    return tl.exp(logs), tl.exp(before), retain_end, tl.exp(total)


@triton.jit
def power(log_mu, C: tl.constexpr):
    """L[τ,r] = μ^(τ−r) for r <= τ."""
    t = tl.arange(0, C)
    steps = t[:, None] - t[None, :]
    return tl.where(steps == 0, 1.0, tl.where(steps > 0, tl.exp(tl.maximum(steps, 1) * log_mu), 0.0))


@triton.jit
def moments(ratio, retain_end, log_mu, count, C: tl.constexpr, PRECISION: tl.constexpr):
    """W' and W[end], w0' and w0_end, μ^(C−r) and μ^C, of ``count`` tokens."""
    t = tl.arange(0, C)
    lower = power(log_mu, C)
    first = tl.exp((t + 1) * log_mu)
    moment = dot(ratio, lower, tl.float32, PRECISION)
    moment_end = tl.sum(retain_end[:, None] * lower, axis=0)
    leak = tl.sum(ratio * first[None, :], axis=1)
    left = count - 1 - t
    power_end = tl.where(left == 0, 1.0, tl.where(left > 0, tl.exp(tl.maximum(left, 1) * log_mu), 0.0))
    return moment, moment_end, leak, tl.sum(retain_end * first, axis=0), power_end, tl.exp(count * log_mu)


@triton.jit
def invert(strict, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + N)⁻¹ of strictly lower N by pairs of diagonal blocks, [A 0; B D]⁻¹ = [A⁻¹ 0; −D⁻¹ B A⁻¹ D⁻¹].

    All pairs of one size at once, with zeros off the blocks: X ← X − X (N ∘ pairs) X. Unlike a power series of N, no
    product is larger than the inverse itself.
    """
    t = tl.arange(0, C)
    row, column = t[:, None], t[None, :]
    inverse = tl.where(row == column, 1.0, 0.0)
    inverse -= tl.where((row // 2 == column // 2) & (row > column), strict, 0.0)
    for level in tl.static_range(1, 7):
        half = 1 << level
        if half < C:
            pair = (row // (2 * half) == column // (2 * half)) & (row // half > column // half)
            below = dot(tl.where(pair, strict, 0.0), inverse, tl.float32, PRECISION)
            inverse -= dot(inverse, below, tl.float32, PRECISION)
    return inverse


@triton.jit
def carry(
    x, state, anchor, momentum, kept, leak, ANCHORED: tl.constexpr, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """γ' X S₀ᵀ + (1 − γ') X Aᵀ + w0' X m₀ᵀ."""
    share = kept[:, None] * dot(x, tl.trans(state), OPERANDS, PRECISION)
    if ANCHORED:
        share += (1 - kept)[:, None] * dot(x, tl.trans(anchor), OPERANDS, PRECISION)
    if MOMENT:
        share += leak[:, None] * dot(x, tl.trans(momentum), OPERANDS, PRECISION)
    return share


@triton.jit
def solve(
    x, errors, rate, share, ratio, moment, C: tl.constexpr, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gain, Ĝ, (I + N diag(gain))⁻¹, P and E of one layer's writes."""
    gain = rate / (1 + rate * tl.sum(x * x, axis=1))
    updates = gain[:, None] * errors
    gram = dot(x, tl.trans(x), tl.float32, PRECISION)
    inverse = invert(gram * ratio * gain[None, :], C, PRECISION)
    if MOMENT:
        right = share - dot(gram * moment, updates, tl.float32, PRECISION)
    else:
        right = share - dot(gram * ratio, updates, tl.float32, PRECISION)
    reads = dot(inverse, right, tl.float32, PRECISION)
    return gain, updates, inverse, reads, gain[:, None] * reads


@triton.jit
def read(
    query, x, share, updates, erased, ratio, moment, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """share(q) − ((Q Xᵀ) ∘ W') Ĝ − ((Q Xᵀ) ∘ R') E."""
    products = dot(query, tl.trans(x), OPERANDS, PRECISION)
    if MOMENT:
        return (
            share
            - dot(products * moment, updates, OPERANDS, PRECISION)
            - dot(products * ratio, erased, OPERANDS, PRECISION)
        )
    return share - dot(products * ratio, updates + erased, OPERANDS, PRECISION)
