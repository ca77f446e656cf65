"""The parts of the backward kernel: each the transpose of one in `pieces.py`.

With E = gain · P, w = dE − Nᵀ dright:   dright = (I + N D)⁻ᵀ D dE    dgain = ⟨w, P⟩ + ⟨dĜ, G⟩    dG = D dĜ
"""

# Kernels are in Triton's language, of which these checks know nothing.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.kernels.forward import load_weights
from nestlearn.ops.kernels.pieces import dot, load_tile, map_back, power, store_tile


@triton.jit
def add_tile(base, tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    store_tile(base, tile + load_tile(base, rows, columns, ROWS, COLUMNS), rows, columns, ROWS, COLUMNS)


@triton.jit
def load_maps(
    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED: tl.constexpr, MOMENT: tl.constexpr,
    D: tl.constexpr, HID: tl.constexpr,
):  # fmt: skip
    """A memory's weights, anchors and momenta, read anew for each part of its turn.

    What a product reads lies in shared memory from its first use to its last. The barrier keeps the compiler from
    taking two readings for one: held through the whole turn, these tiles alone would overflow a multiprocessor.
    """
    tl.debug_barrier()
    s1, s2 = load_tile(w1 + at, d, h, D, HID), load_tile(w2 + at, h, d, HID, D)
    o1, o2, n1, n2 = s1, s2, s1, s2
    if ANCHORED:
        o1, o2 = load_tile(a1 + anchor, d, h, D, HID), load_tile(a2 + anchor, h, d, HID, D)
    if MOMENT:
        n1, n2 = load_tile(m1 + at, d, h, D, HID), load_tile(m2 + at, h, d, HID, D)
    return s1, s2, o1, o2, n1, n2


@triton.jit
def log_sums(d_logs, C: tl.constexpr):
    """Gradients of log γ_{t−1} and log γ_r from those of their differences.

    R'[t,t−1] is 1 whatever α is: left in, its gradients would cancel only to rounding, all there is at small α.
    """
    t = tl.arange(0, C)
    d_logs = tl.where(t[:, None] == t[None, :] + 1, 0.0, d_logs)
    return tl.sum(d_logs, axis=1), tl.sum(d_logs, axis=0)


@triton.jit
def carry_back(
    grad, x, state, anchor, momentum, kept, leak, ANCHORED: tl.constexpr, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of γ' X S₀ᵀ + (1 − γ') X Aᵀ + w0' X m₀ᵀ: dX, dS₀, dA, dm₀, dγ', dw0'."""
    held = kept[:, None] * grad
    across = dot(grad, state, OPERANDS, PRECISION)
    dx = kept[:, None] * across
    d_state = dot(tl.trans(held), x, OPERANDS, PRECISION)
    d_kept = tl.sum(across * x, axis=1)
    d_anchor, d_momentum, d_leak = d_state, d_state, d_kept
    if ANCHORED:
        across = dot(grad, anchor, OPERANDS, PRECISION)
        dx += (1 - kept)[:, None] * across
        d_kept -= tl.sum(across * x, axis=1)
        d_anchor = dot(tl.trans(grad - held), x, OPERANDS, PRECISION)
    if MOMENT:
        across = dot(grad, momentum, OPERANDS, PRECISION)
        dx += leak[:, None] * across
        d_leak = tl.sum(across * x, axis=1)
        d_momentum = dot(tl.trans(leak[:, None] * grad), x, OPERANDS, PRECISION)
    return dx, d_state, d_anchor, d_momentum, d_kept, d_leak


@triton.jit
def read_back(
    grad,
    query,
    x,
    updates,
    erased,
    ratio,
    moment,
    MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of a read's own sums: dQ, dX, dĜ, dE; d log R' as a matrix, dW'."""
    products = dot(query, tl.trans(x), OPERANDS, PRECISION)
    d_erased = -dot(tl.trans(products * ratio), grad, OPERANDS, PRECISION)
    if MOMENT:
        d_updates = -dot(tl.trans(products * moment), grad, OPERANDS, PRECISION)
        d_ratio = -dot(grad, tl.trans(erased), OPERANDS, PRECISION)
        d_moment = -dot(grad, tl.trans(updates), OPERANDS, PRECISION)
        d_products = d_ratio * ratio + d_moment * moment
        d_moment *= products
    else:
        d_updates = d_erased
        d_ratio = -dot(grad, tl.trans(updates + erased), OPERANDS, PRECISION)
        d_products = d_ratio * ratio
        d_moment = d_ratio
    dq = dot(d_products, x, OPERANDS, PRECISION)
    dx = dot(tl.trans(d_products), query, OPERANDS, PRECISION)
    return dq, dx, d_updates, d_erased, d_ratio * products * ratio, d_moment


@triton.jit
def end_back(
    d_end, d_moved_end, x, updates, erased, retain_end, moment_end, power_end, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of −leftᵀ X and −movedᵀ X: dX, dĜ, dE, dR[end], dW[end]."""
    d_left = -dot(x, tl.trans(d_end), OPERANDS, PRECISION)
    left = moment_end[:, None] * updates + retain_end[:, None] * erased
    dx = -dot(left, d_end, OPERANDS, PRECISION)
    d_updates = moment_end[:, None] * d_left
    d_retain_end = tl.sum(d_left * erased, axis=1)
    d_moment_end = tl.sum(d_left * updates, axis=1)
    if MOMENT:
        moved = power_end[:, None] * updates
        dx -= dot(moved, d_moved_end, OPERANDS, PRECISION)
        d_updates -= power_end[:, None] * dot(x, tl.trans(d_moved_end), OPERANDS, PRECISION)
    return dx, d_updates, retain_end[:, None] * d_left, d_retain_end, d_moment_end


@triton.jit
def solve_back(
    d_erased, d_updates, x, errors, rate, gain, updates, inverse, reads, erased, ratio, moment, MOMENT: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dX, dG, d rate, dright (which is d share); d log R' as a matrix, dW'."""
    gram = dot(x, tl.trans(x), tl.float32, PRECISION)
    right = dot(tl.trans(inverse), gain[:, None] * d_erased, tl.float32, PRECISION)
    through = d_erased - dot(tl.trans(gram * ratio), right, tl.float32, PRECISION)
    if MOMENT:
        d_updates -= dot(tl.trans(gram * moment), right, tl.float32, PRECISION)
        d_ratio = -dot(right, tl.trans(erased), tl.float32, PRECISION)
        d_moment = -dot(right, tl.trans(updates), tl.float32, PRECISION)
        d_gram = d_ratio * ratio + d_moment * moment
        d_moment *= gram
    else:
        d_updates -= dot(tl.trans(gram * ratio), right, tl.float32, PRECISION)
        d_ratio = -dot(right, tl.trans(updates + erased), tl.float32, PRECISION)
        d_gram = d_ratio * ratio
        d_moment = d_ratio
    d_gain = tl.sum(through * reads + d_updates * errors, axis=1)
    shrink = 1 / (1 + rate * tl.sum(x * x, axis=1))
    dx = dot(d_gram + tl.trans(d_gram), x, tl.float32, PRECISION) - (2 * gain * gain * d_gain)[:, None] * x
    return dx, gain[:, None] * d_updates, d_gain * shrink * shrink, right, d_ratio * gram * ratio, d_moment


@triton.jit
def slow_back(
    grad, x, w1, w2, dw1, dw2, slot, index: tl.constexpr, STATIC: tl.constexpr, origin, step, slot_stride, d, h,
    D: tl.constexpr, HID: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d x of a slow memory's M(x); its weights' gradients are added to the gradient of the chunk's start."""
    w1_tile, w2_tile = load_weights(w1, w2, slot, index, STATIC, origin, step, slot_stride, d, h, D, HID)
    dx, d_w1, d_w2 = map_back(grad, x, w1_tile, w2_tile, OPERANDS, PRECISION)
    tl.debug_barrier()
    add_tile(dw1 + origin + index * step, d_w1, d, h, D, HID)
    add_tile(dw2 + origin + index * step, d_w2, h, d, HID, D)
    return dx


@triton.jit
def decays_back(
    d_before, d_after, d_kept, d_kept_end, d_retain_end, d_moment, d_moment_end, d_leak, d_leak_end,
    ratio, kept, retain_end, kept_end, log_mu, size, MOMENT: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d log α of a chunk: exponents are log γ_{t−1} (before), log γ_r (after) and their last (total)."""
    t = tl.arange(0, C)
    if MOMENT:
        lower = power(log_mu, C)
        first = tl.exp((t + 1) * log_mu)
        d_ratio = dot(d_moment, tl.trans(lower), tl.float32, PRECISION) + d_leak[:, None] * first[None, :]
        d_retain_end += tl.sum(lower * d_moment_end[None, :], axis=1) + d_leak_end * first
        by_row, by_column = log_sums(d_ratio * ratio, C)
        d_before += by_row
        d_after -= by_column
    d_before = tl.where(t == 0, 0.0, d_before + d_kept * kept)  # log γ_0 is 0 whatever α is
    d_ends = tl.where(t == size - 1, 0.0, d_retain_end * retain_end)  # R[end] of the last token is 1
    d_after -= d_ends
    total = tl.sum(d_ends, axis=0) + d_kept_end * kept_end
    d_after += d_before
    return tl.cumsum(d_after, axis=0, reverse=True) + total - d_before
