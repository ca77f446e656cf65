// One token of one head of one row: NL Eq. 57, 86–93 as in memory/one_token.py, every weight read once and written
// once.
//
// Weights lie as they are given, w1 (d, h) and w2 (h, d). Only short vectors are padded.

#pragma once

#include "chunk.h"

struct TokenSpec {
    int64_t batch, heads, memories, written, width, hidden;
    int64_t key, value, rate, retain, query;
    int64_t retention, normalise, dgd, after, objective;  // objective 0: dot, 1: l2, 2: mix
    double momentum, rate_max;
    int64_t fixed() const { return memories - written; }
};

template <class T>
struct TokenGiven {
    const T *x, *value, *query;  // (batch, heads, d)
    const T *w1, *w2, *m1, *m2, *origin1, *origin2;
    const T *rate_weight, *rate_bias, *retain_weight, *retain_bias, *mix;
    const T *scales[MOST_MEMORIES], *anchor1[MOST_MEMORIES], *anchor2[MOST_MEMORIES];  // of each written memory
};
template <class T>
struct TokenAfter {
    T *y, *w1, *w2, *m1, *m2;
};

template <class T>
inline T along(int64_t count, const T* a, const T* b) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) total += a[i] * b[i];
    return total;
}

template <class T>
struct TokenRoom {  // of one head; vectors of d and of h
    T *k, *v, *q, *out, *target, *error, *z, *hidden, *slope, *pulled;
    static int64_t lay_out(int64_t d, int64_t h, T* base, TokenRoom& r) {
        Layout<T> a{base};
        for (T** p : {&r.k, &r.v, &r.q, &r.out, &r.target, &r.error}) *p = a.take(d);
        for (T** p : {&r.z, &r.hidden, &r.slope, &r.pulled}) *p = a.take(h);
        return a.used;
    }
};

// M(x) into ``out``; a and its slope are left in ``hidden`` and ``slope``
template <class T>
void token_map(int64_t d, int64_t h, const T* x, const T* w1, const T* w2, const TokenRoom<T>& r, T* hidden, T* out) {
    for (int64_t i = 0; i < h; i++) r.z[i] = along(d, w2 + i * d, x);
    silu((h + PAD - 1) / PAD * PAD, r.z, hidden, r.slope);
    for (int64_t i = 0; i < d; i++) out[i] = x[i] + along(h, w1 + i * h, hidden);
}
template <class T>
void token_normalise(int64_t d, T* z) {
    const T inverse = 1 / std::sqrt(along(d, z, z) + T(EPS));
    for (int64_t i = 0; i < d; i++) z[i] *= inverse;
}
// S ← α S + (1 − α) A + m − gain (S x) xᵀ with m ← μ m − gain · e xᵀ, for S (out, in)
template <class T, bool ANCHORED, bool MOMENT>
void token_rows(int64_t out, int64_t in, const T* __restrict__ state, const T* __restrict__ momentum,
                const T* __restrict__ anchor, const T* __restrict__ x, const T* error, T gain, T retain, T mu, bool dgd,
                T* __restrict__ state_after, T* __restrict__ momentum_after) {
    for (int64_t i = 0; i < out; i++) {
        const int64_t at = i * in;
        const T update = gain * error[i], erased = dgd ? gain * along(in, state + at, x) : 0;
#pragma omp simd
        for (int64_t j = 0; j < in; j++) {
            const T moved = (MOMENT ? mu * momentum[at + j] : 0) - update * x[j], old = state[at + j];
            const T kept = ANCHORED ? anchor[at + j] + retain * (old - anchor[at + j]) : retain * old;
            momentum_after[at + j] = moved;
            state_after[at + j] = kept + moved - erased * x[j];
        }
    }
}
template <class T>
void token_write(int64_t out, int64_t in, const T* state, const T* momentum, const T* anchor, const T* x,
                 const T* error, T rate, T retain, T mu, bool dgd, T* state_after, T* momentum_after) {
    const T gain = rate / (1 + rate * along(in, x, x));
    auto rows = anchor    ? mu != 0 ? token_rows<T, true, true> : token_rows<T, true, false>
                : mu != 0 ? token_rows<T, false, true>
                          : token_rows<T, false, false>;
    rows(out, in, state, momentum, anchor, x, error, gain, retain, mu, dgd, state_after, momentum_after);
}
// w1ᵀ e into ``pulled``, with e = λ (k + w1 a) − target
template <class T>
void token_errors(int64_t d, int64_t h, const T* w1, const T* k, const T* hidden, const T* target, bool mixed, T share,
                  T* error, T* __restrict__ pulled) {
    for (int64_t i = 0; i < h; i++) pulled[i] = 0;
    for (int64_t i = 0; i < d; i++) {
        const T* row = w1 + i * h;
        const T found = mixed ? share * (k[i] + along(h, row, hidden)) - target[i] : -target[i];
        error[i] = found;
#pragma omp simd
        for (int64_t j = 0; j < h; j++) pulled[j] += found * row[j];
    }
}

template <class T>
void one_token(const TokenSpec& spec, const TokenGiven<T>& given, const TokenAfter<T>& after, int64_t number,
               const TokenRoom<T>& r) {
    const int64_t d = spec.width, h = spec.hidden, size = d * h, head = number % spec.heads, b = number / spec.heads;
    auto place = [&](int64_t m) { return ((b * spec.memories + m) * spec.heads + head) * size; };
    auto apply = [&](int64_t m, const T* x, T* out) {
        token_map(d, h, x, given.origin1 + place(m), given.origin2 + place(m), r, r.hidden, out);
    };
    const T *x = given.x + number * d, *query = given.query + number * d;
    apply(spec.key, x, r.k), token_normalise(d, r.k);
    apply(spec.value, given.value + number * d, r.v);
    if (spec.query >= 0)
        apply(spec.query, query, r.q), token_normalise(d, r.q);
    else
        std::memcpy(r.q, query, sizeof(T) * d);
    apply(spec.rate, x, r.out);
    const T opened = along(d, given.rate_weight + head * d, r.out) + given.rate_bias[head];
    const T rate = T(spec.rate_max) / (1 + std::exp(-opened));
    T retain = 1;
    if (spec.retention) {
        apply(spec.retain, x, r.out);
        const T logit = along(d, given.retain_weight + head * d, r.out) + given.retain_bias[head];
        const T least = std::exp(T(LOG_FLOOR));
        retain = 1 / (1 + std::exp(-logit));
        retain = retain < least ? least : retain;
    }
    T* y = after.y + number * d;
    const int64_t last = place(spec.memories - 1);
    if (!spec.after) token_map(d, h, r.q, given.w1 + last, given.w2 + last, r, r.hidden, y);
    for (int64_t m = 0; m < spec.fixed(); m++) {
        const int64_t at = place(m);
        std::memcpy(after.w1 + at, given.w1 + at, sizeof(T) * size),
            std::memcpy(after.w2 + at, given.w2 + at, sizeof(T) * size);
        std::memcpy(after.m1 + at, given.m1 + at, sizeof(T) * size),
            std::memcpy(after.m2 + at, given.m2 + at, sizeof(T) * size);
    }
    for (int64_t g = 0; g < spec.written; g++) {
        const int64_t at = place(spec.fixed() + g), own = g * spec.heads + head;
        const T* o1 = given.origin1 + at;
        token_map(d, h, r.v, o1, given.origin2 + at, r, r.hidden, r.target);
        if (spec.normalise) token_normalise(d, r.target);
        for (int64_t i = 0; i < h; i++) r.z[i] = along(d, given.origin2 + at + i * d, r.k);
        silu((h + PAD - 1) / PAD * PAD, r.z, r.hidden, r.slope);
        const T share = spec.objective == 2 ? given.mix[own] : 1;
        token_errors(d, h, o1, r.k, r.hidden, r.target, spec.objective != 0, share, r.error, r.pulled);
        for (int64_t i = 0; i < h; i++) r.pulled[i] *= r.slope[i];
        const T* a1 = given.anchor1[g] ? given.anchor1[g] + head * size : nullptr;
        const T* a2 = given.anchor2[g] ? given.anchor2[g] + head * size : nullptr;
        const T step = rate * std::fabs(given.scales[g][head]), mu = T(spec.momentum);
        token_write(d, h, given.w1 + at, given.m1 + at, a1, r.hidden, r.error, step, retain, mu, spec.dgd != 0,
                    after.w1 + at, after.m1 + at);
        token_write(h, d, given.w2 + at, given.m2 + at, a2, r.k, r.pulled, step, retain, mu, spec.dgd != 0,
                    after.w2 + at, after.m2 + at);
    }
    if (spec.after) token_map(d, h, r.q, after.w1 + last, after.w2 + last, r, r.hidden, y);
}
