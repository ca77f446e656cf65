// One chunk of the inner loop forwards, for one head of one row: NL Eq. 86–93, as in inner_chunk.py.
//
// Every state is held transposed, w1ᵀ (U, D) and w2ᵀ (D, U), as the products of a chunk read it. Decays are running
// products: R[t,r] = α_t R[t−1,r], W[t,r] = α_t W[t−1,r] + μ^(t−r), so that nothing overflows at any retention. Systems
// are solved by substitution. Tokens beyond ``size`` have inputs and rate 0 and α = 1, and change nothing.
//
// Letters: C tokens of a chunk, D head width, U hidden width, all padded.

#pragma once

#include "record.h"

constexpr double EPS = 1e-6;
constexpr double LOG_FLOOR = -30.0;

// ---- small pieces, row by row of a (rows, wide) matrix

template <class T>
inline T dot(int wide, const T* a, const T* b) {
    Vec<T> total{};
    for (int j = 0; j < wide; j += LANES<T>) total += at(a + j) * at(b + j);
    return sum<T>(total);
}
template <class T>
inline void silu(int64_t count, const T* z, T* hidden, T* slope) {
    for (int64_t i = 0; i < count; i += LANES<T>) {
        const Vec<T> v = at(z + i), gate = sigmoid<T>(v), h = v * gate;
        at(slope + i) = gate + h * (T(1) - gate);
        at(hidden + i) = h;
    }
}
template <class T>
void normalise(int rows, int wide, T* z, T* inverse) {
    for (int t = 0; t < rows; t++) {
        inverse[t] = 1 / std::sqrt(dot(wide, z + t * wide, z + t * wide) + T(EPS));
        for (int j = 0; j < wide; j += LANES<T>) at(z + t * wide + j) *= inverse[t];
    }
}
template <class T>
inline void scale_rows(int rows, int wide, const T* factor, const T* a, T* out) {
    for (int t = 0; t < rows; t++)
        for (int j = 0; j < wide; j += LANES<T>) at(out + t * wide + j) = at(a + t * wide + j) * factor[t];
}
// out = a ∘ b below the diagonal, where b is 0 above; whole blocks of PAD columns
template <class T>
inline void times_lower(int size, const T* a, const T* b, T* out) {
    for (int t = 0; t < size; t++)
        for (int j = 0; j < t; j += LANES<T>) at(out + t * size + j) = at(a + t * size + j) * at(b + t * size + j);
}
// columns that products of whole blocks read beside the diagonal
template <class T>
inline void clear_upper(int size, T* a) {
    for (int t = 0; t < size; t++)
        for (int j = (t + LANES<T> - 1) / LANES<T> * LANES<T>; j < size; j += LANES<T>) at(a + t * size + j) = Vec<T>{};
}

// M(x) = x + w1 σ(w2 x); out is not x
template <class T>
void apply_map(const Size& s, const Applied<T>& a, const T* w1, const T* w2, T* out, T* z) {
    product(s.c, s.u, s.d, a.given, s.d, w2, s.u, z, s.u);
    silu(int64_t(s.c) * s.u, z, a.hidden, a.slope);
    std::memcpy(out, a.given, sizeof(T) * s.c * s.d);
    add_product(s.c, s.d, s.u, a.hidden, s.u, w1, s.d, out, s.d);
}
// ⟨read, M(x)⟩ + bias of each token
template <class T>
void score(const Size& s, const Applied<T>& a, const T* w1, const T* w2, const T* read, T bias, T* out, T* z, T* row) {
    product(s.c, s.u, s.d, a.given, s.d, w2, s.u, z, s.u);
    silu(int64_t(s.c) * s.u, z, a.hidden, a.slope);
    for (int i = 0; i < s.u; i++) row[i] = dot(s.d, w1 + i * s.d, read);
    for (int t = 0; t < s.c; t++) out[t] = dot(s.d, a.given + t * s.d, read) + dot(s.u, a.hidden + t * s.u, row) + bias;
}
// γ' X S₀ᵀ + (1 − γ') X Aᵀ + w0' X m₀ᵀ into ``share``; X (S₀ − A)ᵀ and X m₀ᵀ are kept; ``moved`` is X S₀ᵀ
template <class T>
void carry(int c, int in, int out, const T* x, const T* moved, const T* anchor, const T* momentum, const T* kept,
           const T* leak, T* free, T* leaked, T* share) {
    if (anchor) product(c, out, in, x, in, anchor, out, share, out);
    if (momentum) product(c, out, in, x, in, momentum, out, leaked, out);
    for (int t = 0; t < c; t++)
        for (int j = t * out; j < (t + 1) * out; j += LANES<T>) {
            Vec<T> rest{};
            if (anchor) rest = at(share + j);
            const Vec<T> f = at(moved + j) - rest;
            at(free + j) = f;
            Vec<T> total = rest + f * kept[t];
            if (momentum) total += at(leaked + j) * leak[t];
            at(share + j) = total;
        }
}

// R', W' and their last rows, γ', w0' and theirs, of the chunk's first ``size`` tokens
template <class T>
void decays(const Spec& spec, Record<T>& r) {
    const int c = spec.size(r.size).c, n = r.size;
    const T mu = T(spec.momentum);
    const bool moment = spec.momentum != 0;
    std::memset(r.ratio, 0, sizeof(T) * c * c);
    if (moment) std::memset(r.moment, 0, sizeof(T) * c * c);
    T gamma = 1, leak = 0;
    T power = mu;  // μ^(t+1)
    std::memset(r.retain_end, 0, sizeof(T) * c), std::memset(r.moment_end, 0, sizeof(T) * c);
    std::memset(r.power_end, 0, sizeof(T) * c);
    for (int t = 0; t < c; t++) {
        r.kept[t] = gamma, r.leak[t] = leak;
        if (t >= n) continue;  // rows of nobody: zeros
        gamma *= r.alpha[t];
        leak = r.alpha[t] * leak + power;
        power *= mu;
        T* next = t + 1 < n ? r.ratio + (t + 1) * c : r.retain_end;
        const T* row = r.ratio + t * c;
        for (int j = 0; j < t; j++) next[j] = r.alpha[t] * row[j];
        next[t] = 1;
        if (!moment) continue;
        T* after = t + 1 < n ? r.moment + (t + 1) * c : r.moment_end;
        const T* before = r.moment + t * c;
        T step = 1;
        for (int j = t; j >= 0; j--, step *= mu) after[j] = (j < t ? r.alpha[t] * before[j] : 0) + step;
    }
    if (!moment) std::memcpy(r.moment_end, r.retain_end, sizeof(T) * c);
    T step = 1;
    for (int j = n - 1; j >= 0; j--, step *= mu) r.power_end[j] = step;
    r.ends[0] = gamma, r.ends[1] = leak, r.ends[2] = step;
}

// gain, Ĝ, P and E of one layer's writes; ``reads`` holds the share
template <class T>
void solve(int c, int in, int out, const T* x, const T* g, const T* rate, const T* solve_matrix, const T* write_matrix,
           T* gain, T* reads, T* erased, T* updates) {
    for (int t = 0; t < c; t++) gain[t] = rate[t] / (1 + rate[t] * dot(in, x + t * in, x + t * in));
    scale_rows(c, out, gain, g, updates);
    product<T, Mode::SUB, false, Shape::LOWER_A>(c, out, c, write_matrix, c, updates, out, reads, out);
    substitute<T, false>(c, out, solve_matrix, gain, reads, erased);
}
// S ← γ_C S + (1 − γ_C) A + w0_C m − leftᵀ X and m ← μ^C m − movedᵀ X, transposed
template <class T>
void end(const Record<T>& r, const Size& s, int in, int out, const T* x, const T* updates, const T* erased,
         const T* anchor, bool moment, bool last, T* state, T* momentum, T* side) {
    const int64_t count = s.weights();
    const T kept = r.ends[0], leak = r.ends[1], mu = r.ends[2];
    for (int64_t i = 0; i < count; i += LANES<T>) {
        Vec<T> total = at(state + i) * kept;
        if (anchor) total += at(anchor + i) * (1 - kept);
        if (moment) total += at(momentum + i) * leak;
        at(state + i) = total;
        if (moment) at(momentum + i) *= mu;
    }
    for (int t = 0; t < s.c; t++)
        for (int j = t * out; j < (t + 1) * out; j += LANES<T>)
            at(side + j) = at(updates + j) * r.moment_end[t] + at(erased + j) * r.retain_end[t];
    product<T, Mode::SUB, true>(in, out, s.c, x, in, side, out, state, out);
    if (!moment && !last) return;
    if (!moment) std::memset(momentum, 0, sizeof(T) * count);
    scale_rows(s.c, out, r.power_end, updates, side);
    product<T, Mode::SUB, true>(in, out, s.c, x, in, side, out, momentum, out);
}

template <class T>
struct Scratch {
    T *cd, *cu, *cd2, *transposed, *side, *row;
    T *error2, *erased1, *updates1, *erased2, *updates2;  // of the memory whose turn it is
    static int64_t lay_out(const Size& s, T* base, Scratch& x) {
        Layout<T> a{base};
        const int64_t widest = s.d > s.u ? s.d : s.u;
        x.cd = a.take(s.c * s.d), x.cd2 = a.take(s.weights());
        x.cu = a.take(s.c * s.u), x.side = a.take(s.c * s.c);
        x.transposed = a.take(s.c * widest), x.row = a.take(widest);
        for (T** p : {&x.erased1, &x.updates1}) *p = a.take(s.c * s.d);
        for (T** p : {&x.error2, &x.erased2, &x.updates2}) *p = a.take(s.c * s.u);
        return a.used;
    }
};

template <class T>
struct Head {                                         // what one head of one row is given, padded
    const T *rate_read, *retain_read, *scales, *mix;  // scales and mix of the written memories
    T rate_bias, retain_bias;
    Anchors<T>* anchors;  // of each written memory
};

// share(q) − ((Q Xᵀ) ∘ W') Ĝ − ((Q Xᵀ) ∘ R') E onto ``out``, which holds the share; products is Q Xᵀ, lower
template <class T>
void recall(const Record<T>& r, const Size& s, bool moment, int in, int out_width, const T* q, const T* x,
            const T* updates, const T* erased, T* products, T* transposed, T* side, T* out) {
    transpose(s.c, in, x, transposed);
    product<T, Mode::SET, false, Shape::LOWER_RESULT>(s.c, s.c, in, q, in, transposed, s.c, products, s.c);
    times_lower(s.c, products, r.ratio, side), clear_upper(s.c, side);
    product<T, Mode::SUB, false, Shape::LOWER_A>(s.c, out_width, s.c, side, s.c, erased, out_width, out, out_width);
    if (moment) times_lower(s.c, products, r.moment, side);
    product<T, Mode::SUB, false, Shape::LOWER_A>(s.c, out_width, s.c, side, s.c, updates, out_width, out, out_width);
}

template <class T>
void read(const Spec& spec, const T* s1, const T* s2, const T* m1, const T* m2, const T* a1, const T* a2, Record<T>& r,
          Scratch<T>& tmp, T* y) {
    const Size s = spec.size(r.size);
    const bool moment = spec.momentum != 0;
    const Written<T>& w = r.memory[spec.written - 1];
    product(s.c, s.u, s.d, r.q, s.d, s2, s.u, tmp.cu, s.u);
    carry(s.c, s.d, s.u, r.q, tmp.cu, a2, m2, r.kept, r.leak, r.read.free2, r.read.leak2, r.read.out2);
    recall(r, s, moment, s.d, s.u, r.q, r.k, tmp.updates2, tmp.erased2, r.read.products2, tmp.transposed, tmp.side,
           r.read.out2);
    silu(int64_t(s.c) * s.u, r.read.out2, r.read.inner, r.read.slope);
    product(s.c, s.d, s.u, r.read.inner, s.u, s1, s.d, tmp.cd, s.d);
    carry(s.c, s.u, s.d, r.read.inner, tmp.cd, a1, m1, r.kept, r.leak, r.read.free1, r.read.leak1, y);
    recall(r, s, moment, s.u, s.d, r.read.inner, w.hidden, tmp.updates1, tmp.erased1, r.read.products1, tmp.transposed,
           tmp.side, y);
    for (int64_t i = 0; i < int64_t(s.c) * s.d; i += LANES<T>) at(y + i) += at(r.q + i);
}

// y (C, D) and what happened; with ``moves``, ``state`` becomes the one after the chunk. ``origin`` holds the weights
// at its start, and is ``state`` where it starts here. r holds x, value, query and size.
template <class T>
void run_chunk(const Spec& spec, const Head<T>& head, const State<T>& state, const State<T>& origin, Record<T>& r,
               Scratch<T>& tmp, T* y, bool last, bool moves) {
    const Size s = spec.size(r.size);
    const bool moment = spec.momentum != 0;
    const int64_t fixed = spec.fixed();
    const bool here = origin.base == state.base;
    apply_map(s, r.key, origin.w1(spec.key), origin.w2(spec.key), r.k, tmp.cu);
    normalise(s.c, s.d, r.k, r.k_inverse);
    apply_map(s, r.content, origin.w1(spec.value), origin.w2(spec.value), r.v, tmp.cu);
    if (spec.query >= 0) {
        apply_map(s, r.asked, origin.w1(spec.query), origin.w2(spec.query), r.q, tmp.cu);
        normalise(s.c, s.d, r.q, r.q_inverse);
    } else {
        std::memcpy(r.q, r.query, sizeof(T) * s.c * s.d);
    }
    score(s, r.rate, origin.w1(spec.rate), origin.w2(spec.rate), head.rate_read, head.rate_bias, r.opened, tmp.cu,
          tmp.row);
    if (spec.retention)
        score(s, r.retain, origin.w1(spec.retain), origin.w2(spec.retain), head.retain_read, head.retain_bias, r.closed,
              tmp.cu, tmp.row);
    for (int t = 0; t < s.c; t++) {
        const bool valid = t < r.size;
        r.opened[t] = valid ? 1 / (1 + std::exp(-r.opened[t])) : 0;
        r.alpha[t] = 1;
        if (!valid || !spec.retention) continue;
        const T log_alpha = std::fmin(r.closed[t], T(0)) - std::log1p(std::exp(-std::fabs(r.closed[t])));
        const bool above = !(log_alpha <= T(LOG_FLOOR));
        r.alpha[t] = std::exp(above ? log_alpha : T(LOG_FLOOR));
        r.closed[t] = above ? 1 / (1 + std::exp(r.closed[t])) : 0;  // d log α of the logit
        if (std::isnan(log_alpha)) r.alpha[t] = r.closed[t] = log_alpha;
    }
    decays(spec, r);
    transpose(s.c, s.d, r.k, tmp.transposed);
    product<T, Mode::SET, false, Shape::LOWER_RESULT>(s.c, s.c, s.d, r.k, s.d, tmp.transposed, s.c, r.gram, s.c);
    times_lower(s.c, r.gram, r.ratio, r.solve), clear_upper(s.c, r.solve);
    if (moment) times_lower(s.c, r.gram, r.moment, r.write), clear_upper(s.c, r.write);

    for (int64_t g = 0; g < spec.written; g++) {
        Written<T>& w = r.memory[g];
        T *s1 = state.w1(fixed + g), *s2 = state.w2(fixed + g);
        T *m1 = moment ? state.m1(fixed + g) : nullptr, *m2 = moment ? state.m2(fixed + g) : nullptr;
        T *a1 = spec.anchored ? head.anchors[g].t1 : nullptr, *a2 = spec.anchored ? head.anchors[g].t2 : nullptr;
        for (int t = 0; t < s.c; t++) r.own[t] = T(spec.rate_max) * head.scales[g] * r.opened[t];
        const T *o1 = origin.w1(fixed + g), *o2 = origin.w2(fixed + g);
        product(s.c, s.u, s.d, r.k, s.d, o2, s.u, w.z, s.u);
        silu(int64_t(s.c) * s.u, w.z, w.hidden, w.slope);
        if (!here) product(s.c, s.u, s.d, r.k, s.d, s2, s.u, tmp.cu, s.u);
        carry(s.c, s.d, s.u, r.k, here ? w.z : tmp.cu, a2, m2, r.kept, r.leak, w.free2, w.leak2, w.reads2);
        product(s.c, s.d, s.u, w.hidden, s.u, s1, s.d, tmp.cd, s.d);
        carry(s.c, s.u, s.d, w.hidden, tmp.cd, a1, m1, r.kept, r.leak, w.free1, w.leak1, w.reads1);
        if (!here && spec.mixed) product(s.c, s.d, s.u, w.hidden, s.u, o1, s.d, tmp.cd, s.d);
        apply_map(s, w.target, o1, o2, w.wanted, tmp.cu);
        if (spec.normalise) normalise(s.c, s.d, w.wanted, w.inverse);
        for (int64_t i = 0; i < int64_t(s.c) * s.d; i += LANES<T>) {
            Vec<T> error = -at(w.wanted + i);
            at(w.wanted + i) = error;
            if (!spec.mixed) continue;
            at(w.image + i) = at(r.k + i) + at(tmp.cd + i);
            error += at(w.image + i) * head.mix[g];
            at(w.error + i) = error;
        }
        transpose(s.u, s.d, o1, tmp.cd2);
        product(s.c, s.u, s.d, w.error, s.d, tmp.cd2, s.u, w.pulled, s.u);
        for (int64_t i = 0; i < int64_t(s.c) * s.u; i += LANES<T>)
            at(tmp.error2 + i) = at(w.pulled + i) * at(w.slope + i);
        solve(s.c, s.d, s.u, r.k, tmp.error2, r.own, r.solve, r.write, w.gain2, w.reads2, tmp.erased2, tmp.updates2);
        transpose(s.c, s.u, w.hidden, tmp.transposed);
        product<T, Mode::SET, false, Shape::LOWER_RESULT>(s.c, s.c, s.u, w.hidden, s.u, tmp.transposed, s.c, w.gram1,
                                                          s.c);
        times_lower(s.c, w.gram1, r.ratio, w.solve1), clear_upper(s.c, w.solve1);
        if (moment) times_lower(s.c, w.gram1, r.moment, w.write1), clear_upper(s.c, w.write1);
        solve(s.c, s.u, s.d, w.hidden, w.error, r.own, w.solve1, w.write1, w.gain1, w.reads1, tmp.erased1,
              tmp.updates1);
        if (g == spec.written - 1) read(spec, s1, s2, m1, m2, a1, a2, r, tmp, y);
        if (!moves) continue;
        end(r, s, s.d, s.u, r.k, tmp.updates2, tmp.erased2, a2, moment, last, s2, state.m2(fixed + g), tmp.cu);
        end(r, s, s.u, s.d, w.hidden, tmp.updates1, tmp.erased1, a1, moment, last, s1, state.m1(fixed + g), tmp.cd);
    }
}
