"""The forward kernel: one program runs a head of a row through its chunks, all its memories, in order (NL Eq. 86–93).

For a chunk: first k, v, q, η, α from the slow memories at its start; then each written memory in turn is loaded,
written to and stored, on chip only while its turn lasts. `inner_loop.py` argues why.

state pointers  w1 (slots, B, M, H, d, h), w2 (slots, B, M, H, h, d) and momenta: chunk i of a launch reads slot i and
                writes slot i + 1, or works in place where ``slot_stride`` is 0; static memories stay in slot 0
bounds          (B, 2) first token and end of each row
"""

# Kernels are in Triton's language, of which these checks know nothing.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.kernels.pieces import (
    apply_map,
    carry,
    dot,
    load_tile,
    log_retention,
    map_inside,
    moments,
    normalise,
    ratios,
    read,
    silu_and_slope,
    solve,
    store_tile,
)


@triton.jit
def load_weights(
    w1, w2, slot, index: tl.constexpr, STATIC: tl.constexpr, origin, step, slot_stride, d, h,
    D: tl.constexpr, HID: tl.constexpr,
):  # fmt: skip
    """Memory ``index`` at a chunk's start; its place is ``origin`` + index · ``step``, in elements."""
    place = origin + index * step
    if index >= STATIC:
        place += slot * slot_stride
    return load_tile(w1 + place, d, h, D, HID), load_tile(w2 + place, h, d, HID, D)


@triton.jit
def generate(
    x, value, query, w1, w2, slot, origin, step, slot_stride, rate_read, rate_bias, retain_read, retain_bias, valid,
    rate_max, d, h,
    STATIC: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RATE: tl.constexpr, RETAIN: tl.constexpr,
    QUERY: tl.constexpr, RETENTION: tl.constexpr, D: tl.constexpr, HID: tl.constexpr,
    OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k and 1/‖·‖, v, q and 1/‖·‖, η, log α, and the two outputs that η and α were read from with their logits."""
    w1_tile, w2_tile = load_weights(w1, w2, slot, KEY, STATIC, origin, step, slot_stride, d, h, D, HID)
    key, key_inverse = normalise(apply_map(x, w1_tile, w2_tile, OPERANDS, PRECISION))
    w1_tile, w2_tile = load_weights(w1, w2, slot, VALUE, STATIC, origin, step, slot_stride, d, h, D, HID)
    content = apply_map(value, w1_tile, w2_tile, OPERANDS, PRECISION)
    w1_tile, w2_tile = load_weights(w1, w2, slot, RATE, STATIC, origin, step, slot_stride, d, h, D, HID)
    rate_out = apply_map(x, w1_tile, w2_tile, OPERANDS, PRECISION)
    opened = tl.sigmoid(tl.sum(rate_out * rate_read[None, :], axis=1) + rate_bias)
    rate = tl.where(valid, rate_max * opened, 0.0)
    log_retain, retain_logit, retain_out = tl.zeros_like(rate), tl.zeros_like(rate), rate_out
    if RETENTION:
        w1_tile, w2_tile = load_weights(w1, w2, slot, RETAIN, STATIC, origin, step, slot_stride, d, h, D, HID)
        retain_out = apply_map(x, w1_tile, w2_tile, OPERANDS, PRECISION)
        retain_logit = tl.sum(retain_out * retain_read[None, :], axis=1) + retain_bias
        log_retain = tl.where(valid, log_retention(retain_logit), 0.0)
    asked, asked_inverse = query, key_inverse
    if QUERY >= 0:
        w1_tile, w2_tile = load_weights(w1, w2, slot, QUERY, STATIC, origin, step, slot_stride, d, h, D, HID)
        asked, asked_inverse = normalise(apply_map(query, w1_tile, w2_tile, OPERANDS, PRECISION))
    return (
        key, key_inverse, content, asked, asked_inverse, rate, opened, rate_out, log_retain, retain_logit, retain_out
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "count", "slot_stride", "row_stride"])
def forward_kernel(
    x_ptr, value_ptr, query_ptr, y_ptr, w1, w2, m1, m2, a1, a2, scales, mix,
    rate_weight, rate_bias, retain_weight, retain_bias, bounds,
    first, count, chunk, heads, d, h, row_stride, head_stride, slot_stride, log_mu, rate_max,
    MEMORIES: tl.constexpr, WRITTEN: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RATE: tl.constexpr,
    RETAIN: tl.constexpr, QUERY: tl.constexpr, RETENTION: tl.constexpr, NORMALISE: tl.constexpr,
    ANCHORED: tl.constexpr, MIXED: tl.constexpr, MOMENT: tl.constexpr, READ: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, HID: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks ``first`` … ``first + count`` of one row and head."""
    STATIC: tl.constexpr = MEMORIES - WRITTEN
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin, end = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1)
    step = (heads * d * h).to(tl.int64)  # from one memory to the next
    origin = (row * MEMORIES * heads + head).to(tl.int64) * d * h
    t, wide = tl.arange(0, C), tl.arange(0, D)
    rate_read = tl.load(rate_weight + head * d + wide, mask=wide < d, other=0.0)
    retain_read = tl.load(retain_weight + head * d + wide, mask=wide < d, other=0.0)
    rate_shift, retain_shift = tl.load(rate_bias + head), tl.load(retain_bias + head)
    for i in range(count):
        token = begin + (first + i) * chunk
        size = tl.minimum(chunk, end - token)
        if size > 0:
            place = row * row_stride + head * head_stride + token.to(tl.int64) * d
            x = load_tile(x_ptr + place, size, d, C, D)
            value = load_tile(value_ptr + place, size, d, C, D)
            query = load_tile(query_ptr + place, size, d, C, D)
            valid = t < size
            key, _, content, asked, _, rate, _, _, log_retain, _, _ = generate(
                x, value, query, w1, w2, i, origin, step, slot_stride, rate_read, rate_shift, retain_read, retain_shift,
                valid, rate_max, d, h,
                STATIC, KEY, VALUE, RATE, RETAIN, QUERY, RETENTION, D, HID, OPERANDS, PRECISION,
            )  # fmt: skip
            ratio, kept, retain_end, kept_end = ratios(log_retain, valid, C)
            moment, moment_end, leak, leak_end, power_end, mu_end = ratio, retain_end, kept, kept_end, kept, kept_end
            if MOMENT:
                moment, moment_end, leak, leak_end, power_end, mu_end = moments(
                    ratio, retain_end, log_mu, size, C, PRECISION
                )
            tl.debug_barrier()  # every memory has been read before one is written, in place or not
            for g in range(WRITTEN):
                at = origin + (STATIC + g) * step + i * slot_stride
                to = at + slot_stride
                s1, s2 = load_tile(w1 + at, d, h, D, HID), load_tile(w2 + at, h, d, HID, D)
                o1, o2, n1, n2 = s1, s2, s1, s2
                if ANCHORED:
                    anchor = ((STATIC + g) * heads + head).to(tl.int64) * d * h
                    o1, o2 = load_tile(a1 + anchor, d, h, D, HID), load_tile(a2 + anchor, h, d, HID, D)
                if MOMENT:
                    n1, n2 = load_tile(m1 + at, d, h, D, HID), load_tile(m2 + at, h, d, HID, D)
                hidden, slope = silu_and_slope(map_inside(key, s2, OPERANDS, PRECISION))
                target = apply_map(content, s1, s2, OPERANDS, PRECISION)
                if NORMALISE:
                    target, _ = normalise(target)
                error = -target
                if MIXED:
                    share = tl.load(mix + g * heads + head)
                    error += share * (key + dot(hidden, tl.trans(s1), OPERANDS, PRECISION))
                error2 = dot(error, s1, OPERANDS, PRECISION) * slope
                own = rate * tl.load(scales + g * heads + head)

                share2 = carry(key, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                _, updates2, _, _, erased2 = solve(
                    key, error2, own, share2, ratio, moment, C, MOMENT, OPERANDS, PRECISION
                )
                share1 = carry(hidden, s1, o1, n1, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                _, updates1, _, _, erased1 = solve(
                    hidden, error, own, share1, ratio, moment, C, MOMENT, OPERANDS, PRECISION
                )
                if READ and g == WRITTEN - 1:
                    share2 = carry(asked, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                    inner, _ = silu_and_slope(
                        read(asked, key, share2, updates2, erased2, ratio, moment, MOMENT, OPERANDS, PRECISION)
                    )
                    share1 = carry(inner, s1, o1, n1, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                    y = read(inner, hidden, share1, updates1, erased1, ratio, moment, MOMENT, OPERANDS, PRECISION)
                    store_tile(y_ptr + place, asked + y, size, d, C, D)

                left1 = moment_end[:, None] * updates1 + retain_end[:, None] * erased1
                left2 = moment_end[:, None] * updates2 + retain_end[:, None] * erased2
                s1 = kept_end * s1 - dot(tl.trans(left1), hidden, OPERANDS, PRECISION)
                s2 = kept_end * s2 - dot(tl.trans(left2), key, OPERANDS, PRECISION)
                if ANCHORED:
                    s1 += (1 - kept_end) * o1
                    s2 += (1 - kept_end) * o2
                tl.debug_barrier()  # in place: all threads have loaded this memory
                if MOMENT:
                    s1 += leak_end * n1
                    s2 += leak_end * n2
                    moved1, moved2 = power_end[:, None] * updates1, power_end[:, None] * updates2
                    n1 = mu_end * n1 - dot(tl.trans(moved1), hidden, OPERANDS, PRECISION)
                    n2 = mu_end * n2 - dot(tl.trans(moved2), key, OPERANDS, PRECISION)
                    store_tile(m1 + to, n1, d, h, D, HID)
                    store_tile(m2 + to, n2, h, d, HID, D)
                store_tile(w1 + to, s1, d, h, D, HID)
                store_tile(w2 + to, s2, h, d, HID, D)
            tl.debug_barrier()  # the next chunk reads what other threads of this program stored
