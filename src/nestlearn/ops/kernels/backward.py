"""The backward kernel: one program walks a head of a row backwards through a group of chunks.

The algebra is that of `inner_layer.py`; its parts are in `pieces_back.py`.

For a chunk, from its start's weights (slot i) and the gradient of its end's weights: everything of the forward pass
that is local to the chunk is computed again; each written memory gives its part of dk, dv, dη, d log α and turns the
gradient of its end into that of its start, in place; then the slow memories take what they generated.
"""

# Kernels are in Triton's language, of which these checks know nothing.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.kernels.forward import generate
from nestlearn.ops.kernels.pieces import (
    above_floor,
    apply_map,
    carry,
    dot,
    load_tile,
    map_back,
    map_inside,
    moments,
    normalise,
    normalise_back,
    ratios,
    read,
    silu_and_slope,
    silu_curve,
    solve,
    store_tile,
)
from nestlearn.ops.kernels.pieces_back import (
    add_tile,
    carry_back,
    decays_back,
    end_back,
    load_maps,
    log_sums,
    read_back,
    slow_back,
    solve_back,
)


@triton.jit(do_not_specialize=["first", "count", "slot_stride", "row_stride"])
def backward_kernel(
    x_ptr, value_ptr, query_ptr, dy_ptr, w1, w2, m1, m2, a1, a2, scales, mix,
    rate_weight, rate_bias, retain_weight, retain_bias, bounds,
    dx_ptr, d_value_ptr, d_query_ptr, dw1, dw2, dm1, dm2, da1, da2, d_scales, d_mix,
    d_rate_weight, d_rate_bias, d_retain_weight, d_retain_bias,
    first, count, chunk, heads, d, h, row_stride, head_stride, slot_stride, log_mu, rate_max,
    MEMORIES: tl.constexpr, WRITTEN: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, RATE: tl.constexpr,
    RETAIN: tl.constexpr, QUERY: tl.constexpr, RETENTION: tl.constexpr, NORMALISE: tl.constexpr,
    ANCHORED: tl.constexpr, MIXED: tl.constexpr, MOMENT: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, HID: tl.constexpr, OPERANDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunks ``first + count − 1`` down to ``first`` of one row and head."""
    STATIC: tl.constexpr = MEMORIES - WRITTEN
    row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    begin, end = tl.load(bounds + 2 * row), tl.load(bounds + 2 * row + 1)
    step = (heads * d * h).to(tl.int64)
    origin = (row * MEMORIES * heads + head).to(tl.int64) * d * h
    t, wide = tl.arange(0, C), tl.arange(0, D)
    rate_read = tl.load(rate_weight + head * d + wide, mask=wide < d, other=0.0)
    retain_read = tl.load(retain_weight + head * d + wide, mask=wide < d, other=0.0)
    rate_shift, retain_shift = tl.load(rate_bias + head), tl.load(retain_bias + head)
    for back in range(count):
        i = count - 1 - back
        token = begin + (first + i) * chunk
        size = tl.minimum(chunk, end - token)
        if size > 0:
            place = row * row_stride + head * head_stride + token.to(tl.int64) * d
            x = load_tile(x_ptr + place, size, d, C, D)
            value = load_tile(value_ptr + place, size, d, C, D)
            query = load_tile(query_ptr + place, size, d, C, D)
            dy = load_tile(dy_ptr + place, size, d, C, D)
            valid = t < size
            (
                key, key_inverse, content, asked, asked_inverse, rate, opened, rate_out, log_retain, retain_logit,
                retain_out,
            ) = (
                generate(
                    x, value, query, w1, w2, i, origin, step, slot_stride, rate_read, rate_shift, retain_read,
                    retain_shift, valid, rate_max, d, h,
                    STATIC, KEY, VALUE, RATE, RETAIN, QUERY, RETENTION, D, HID, OPERANDS, PRECISION,
                )
            )  # fmt: skip
            ratio, kept, retain_end, kept_end = ratios(log_retain, valid, C)
            moment, moment_end, leak, leak_end, power_end, mu_end = ratio, retain_end, kept, kept_end, kept, kept_end
            if MOMENT:
                moment, moment_end, leak, leak_end, power_end, mu_end = moments(
                    ratio, retain_end, log_mu, size, C, PRECISION
                )
            d_key, d_content, d_asked = tl.zeros_like(x), tl.zeros_like(x), dy
            d_rate, d_kept, d_leak = tl.zeros_like(rate), tl.zeros_like(rate), tl.zeros_like(rate)
            d_before, d_after = tl.zeros_like(rate), tl.zeros_like(rate)
            d_retain_end, d_moment_end = tl.zeros_like(rate), tl.zeros_like(rate)
            d_kept_end, d_leak_end = tl.sum(d_rate, axis=0), tl.sum(d_rate, axis=0)
            d_moment = tl.zeros_like(ratio)
            for g in range(WRITTEN):
                at = origin + (STATIC + g) * step + i * slot_stride
                to = origin + (STATIC + g) * step
                anchor = ((STATIC + g) * heads + head).to(tl.int64) * d * h
                s1, s2, o1, o2, n1, n2 = load_maps(
                    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED, MOMENT, D, HID
                )  # fmt: skip
                # forward again
                z = map_inside(key, s2, OPERANDS, PRECISION)
                hidden, slope = silu_and_slope(z)
                target = apply_map(content, s1, s2, OPERANDS, PRECISION)
                target_inverse = rate
                if NORMALISE:
                    target, target_inverse = normalise(target)
                error, image, share = -target, key, 0.0
                if MIXED:
                    share = tl.load(mix + g * heads + head)
                    image = key + dot(hidden, tl.trans(s1), OPERANDS, PRECISION)
                    error += share * image
                pulled = dot(error, s1, OPERANDS, PRECISION)
                scale = tl.load(scales + g * heads + head)
                own, error2 = rate * scale, pulled * slope
                share2 = carry(key, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                gain2, updates2, inverse2, reads2, erased2 = solve(
                    key, error2, own, share2, ratio, moment, C, MOMENT, OPERANDS, PRECISION
                )
                share1 = carry(hidden, s1, o1, n1, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                gain1, updates1, inverse1, reads1, erased1 = solve(
                    hidden, error, own, share1, ratio, moment, C, MOMENT, OPERANDS, PRECISION
                )
                # the end of the chunk
                de1, de2 = load_tile(dw1 + to, d, h, D, HID), load_tile(dw2 + to, h, d, HID, D)
                df1, df2 = de1, de2
                if MOMENT:
                    df1, df2 = load_tile(dm1 + to, d, h, D, HID), load_tile(dm2 + to, h, d, HID, D)
                d_hidden, du1, dr1, part1, part2 = end_back(
                    de1, df1, hidden, updates1, erased1, retain_end, moment_end, power_end, MOMENT, OPERANDS, PRECISION
                )
                dk, du2, dr2, part3, part4 = end_back(
                    de2, df2, key, updates2, erased2, retain_end, moment_end, power_end, MOMENT, OPERANDS, PRECISION
                )
                d_retain_end += part1 + part3
                if MOMENT:
                    d_moment_end += part2 + part4
                    d_leak_end += tl.sum(tl.sum(de1 * n1, axis=1), axis=0) + tl.sum(tl.sum(de2 * n2, axis=1), axis=0)
                    df1, df2 = leak_end * de1 + mu_end * df1, leak_end * de2 + mu_end * df2
                else:
                    d_retain_end += part2 + part4
                d_kept_end += tl.sum(tl.sum(de1 * s1, axis=1), axis=0) + tl.sum(tl.sum(de2 * s2, axis=1), axis=0)
                do1, do2 = de1, de2
                if ANCHORED:
                    d_kept_end -= tl.sum(tl.sum(de1 * o1, axis=1), axis=0) + tl.sum(tl.sum(de2 * o2, axis=1), axis=0)
                    do1, do2 = (1 - kept_end) * de1, (1 - kept_end) * de2
                de1, de2 = kept_end * de1, kept_end * de2
                s1, s2, o1, o2, n1, n2 = load_maps(
                    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED, MOMENT, D, HID
                )  # fmt: skip
                # what was read
                if g == WRITTEN - 1:
                    share_q = carry(asked, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION)
                    out = read(asked, key, share_q, updates2, erased2, ratio, moment, MOMENT, OPERANDS, PRECISION)
                    inner, inner_slope = silu_and_slope(out)
                    dq, dx, du, dr, logs, dm = read_back(
                        dy, inner, hidden, updates1, erased1, ratio, moment, MOMENT, OPERANDS, PRECISION
                    )
                    d_hidden += dx
                    du1 += du
                    dr1 += dr
                    by_row, by_column = log_sums(logs, C)
                    d_before += by_row
                    d_after -= by_column
                    more, ds, da, dn, dkept, dleak = carry_back(
                        dy, inner, s1, o1, n1, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION
                    )
                    de1 += ds
                    d_kept += dkept
                    if ANCHORED:
                        do1 += da
                    if MOMENT:
                        df1 += dn
                        d_leak += dleak
                        d_moment += dm
                    d_out = (dq + more) * inner_slope
                    dq, dx, du, dr, logs, dm = read_back(
                        d_out, asked, key, updates2, erased2, ratio, moment, MOMENT, OPERANDS, PRECISION
                    )
                    dk += dx
                    du2 += du
                    dr2 += dr
                    by_row, by_column = log_sums(logs, C)
                    d_before += by_row
                    d_after -= by_column
                    more, ds, da, dn, dkept, dleak = carry_back(
                        d_out, asked, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION
                    )
                    de2 += ds
                    d_kept += dkept
                    if ANCHORED:
                        do2 += da
                    if MOMENT:
                        df2 += dn
                        d_leak += dleak
                        d_moment += dm
                    d_asked += dq + more
                s1, s2, o1, o2, n1, n2 = load_maps(
                    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED, MOMENT, D, HID
                )  # fmt: skip
                # the solves
                dx, d_error, d_own, right, logs, dm = solve_back(
                    dr1, du1, hidden, error, own, gain1, updates1, inverse1, reads1, erased1, ratio, moment,
                    MOMENT, OPERANDS, PRECISION,
                )  # fmt: skip
                d_hidden += dx
                by_row, by_column = log_sums(logs, C)
                d_before += by_row
                d_after -= by_column
                more, ds, da, dn, dkept, dleak = carry_back(
                    right, hidden, s1, o1, n1, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION
                )
                d_hidden += more
                de1 += ds
                d_kept += dkept
                if ANCHORED:
                    do1 += da
                if MOMENT:
                    df1 += dn
                    d_leak += dleak
                    d_moment += dm
                s1, s2, o1, o2, n1, n2 = load_maps(
                    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED, MOMENT, D, HID
                )  # fmt: skip
                dx, d_error2, d_own2, right, logs, dm = solve_back(
                    dr2, du2, key, error2, own, gain2, updates2, inverse2, reads2, erased2, ratio, moment,
                    MOMENT, OPERANDS, PRECISION,
                )  # fmt: skip
                dk += dx
                by_row, by_column = log_sums(logs, C)
                d_before += by_row
                d_after -= by_column
                more, ds, da, dn, dkept, dleak = carry_back(
                    right, key, s2, o2, n2, kept, leak, ANCHORED, MOMENT, OPERANDS, PRECISION
                )
                dk += more
                de2 += ds
                d_kept += dkept
                if ANCHORED:
                    do2 += da
                if MOMENT:
                    df2 += dn
                    d_leak += dleak
                    d_moment += dm
                s1, s2, o1, o2, n1, n2 = load_maps(
                    w1, w2, m1, m2, a1, a2, at, anchor, d, h, ANCHORED, MOMENT, D, HID
                )  # fmt: skip
                # the errors
                d_own += d_own2
                d_pulled = d_error2 * slope
                d_error += dot(d_pulled, tl.trans(s1), OPERANDS, PRECISION)
                de1 += dot(tl.trans(error), d_pulled, OPERANDS, PRECISION)
                if MIXED:
                    d_image = share * d_error
                    dk += d_image
                    d_hidden += dot(d_image, s1, OPERANDS, PRECISION)
                    de1 += dot(tl.trans(d_image), hidden, OPERANDS, PRECISION)
                    at_mix = d_mix + (row * WRITTEN + g) * heads + head
                    tl.store(at_mix, tl.load(at_mix) + tl.sum(tl.sum(d_error * image, axis=1), axis=0))
                dz = d_hidden * slope + d_error2 * pulled * silu_curve(z)
                dk += dot(dz, s2, OPERANDS, PRECISION)
                de2 += dot(tl.trans(dz), key, OPERANDS, PRECISION)
                d_target = -d_error
                if NORMALISE:
                    d_target = normalise_back(d_target, target, target_inverse)
                dv, ds1, ds2 = map_back(d_target, content, s1, s2, OPERANDS, PRECISION)
                d_key += dk
                d_content += dv
                d_rate += scale * d_own
                at_scale = d_scales + (row * WRITTEN + g) * heads + head
                tl.store(at_scale, tl.load(at_scale) + tl.sum(d_own * rate, axis=0))
                tl.debug_barrier()  # in place: all threads have loaded the gradients of the end
                store_tile(dw1 + to, de1 + ds1, d, h, D, HID)
                store_tile(dw2 + to, de2 + ds2, h, d, HID, D)
                if MOMENT:
                    store_tile(dm1 + to, df1, d, h, D, HID)
                    store_tile(dm2 + to, df2, h, d, HID, D)
                if ANCHORED:
                    own_anchor = ((row * WRITTEN + g) * heads + head).to(tl.int64) * d * h
                    add_tile(da1 + own_anchor, do1, d, h, D, HID)
                    add_tile(da2 + own_anchor, do2, h, d, HID, D)
            tl.debug_barrier()  # the slow memories' gradients grow below
            d_logit = tl.where(valid, d_rate * rate_max * opened * (1 - opened), 0.0)
            dx = slow_back(
                d_logit[:, None] * rate_read[None, :], x, w1, w2, dw1, dw2, i, RATE, STATIC, origin, step, slot_stride,
                d, h, D, HID, OPERANDS, PRECISION,
            )  # fmt: skip
            at_read = (row * heads + head) * d + wide
            old = tl.load(d_rate_weight + at_read, mask=wide < d, other=0.0)
            tl.store(d_rate_weight + at_read, old + tl.sum(d_logit[:, None] * rate_out, axis=0), mask=wide < d)
            at_bias = row * heads + head
            tl.store(d_rate_bias + at_bias, tl.load(d_rate_bias + at_bias) + tl.sum(d_logit, axis=0))
            if RETENTION:
                d_log = decays_back(
                    d_before, d_after, d_kept, d_kept_end, d_retain_end, d_moment, d_moment_end, d_leak, d_leak_end,
                    ratio, kept, retain_end, kept_end, log_mu, size, MOMENT, C, PRECISION,
                )  # fmt: skip
                d_logit = tl.where(valid & above_floor(retain_logit), d_log * tl.sigmoid(-retain_logit), 0.0)
                dx += slow_back(
                    d_logit[:, None] * retain_read[None, :], x, w1, w2, dw1, dw2, i, RETAIN, STATIC, origin, step,
                    slot_stride, d, h, D, HID, OPERANDS, PRECISION,
                )  # fmt: skip
                old = tl.load(d_retain_weight + at_read, mask=wide < d, other=0.0)
                tl.store(d_retain_weight + at_read, old + tl.sum(d_logit[:, None] * retain_out, axis=0), mask=wide < d)
                tl.store(d_retain_bias + at_bias, tl.load(d_retain_bias + at_bias) + tl.sum(d_logit, axis=0))
            dx += slow_back(
                normalise_back(d_key, key, key_inverse), x, w1, w2, dw1, dw2, i, KEY, STATIC, origin, step, slot_stride,
                d, h, D, HID, OPERANDS, PRECISION,
            )  # fmt: skip
            store_tile(dx_ptr + place, dx, size, d, C, D)
            dv = slow_back(
                d_content, value, w1, w2, dw1, dw2, i, VALUE, STATIC, origin, step, slot_stride,
                d, h, D, HID, OPERANDS, PRECISION,
            )  # fmt: skip
            store_tile(d_value_ptr + place, dv, size, d, C, D)
            if QUERY >= 0:
                d_asked = slow_back(
                    normalise_back(d_asked, asked, asked_inverse), query, w1, w2, dw1, dw2, i, QUERY, STATIC, origin,
                    step, slot_stride, d, h, D, HID, OPERANDS, PRECISION,
                )  # fmt: skip
            store_tile(d_query_ptr + place, d_asked, size, d, C, D)
            tl.debug_barrier()
