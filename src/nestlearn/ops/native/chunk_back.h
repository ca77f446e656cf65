// One chunk of the inner loop backwards, for one head of one row, through NL Eq. 86–93.

#pragma once

#include "pieces_back.h"

// d log α from all decays: running products backwards. R[t,t] = 1 whatever α is, and is left out.
template <class T>
void decays_back(const Size& s, const Record<T>& r, bool moment, BackScratch<T>& b) {
    const int c = s.c, n = r.size;
    T d_gamma = b.ends[0], d_leak = b.ends[1];
    for (int t = n - 1; t >= 0; t--) {
        const T alpha = r.alpha[t], *row = t + 1 < n ? r.ratio + (t + 1) * c : r.retain_end;
        T found = d_gamma * r.kept[t] * alpha;
        for (int j = 0; j < t; j++) found += b.retain_end[j] * row[j];
        for (int j = 0; j < t; j++) b.retain_end[j] = alpha * b.retain_end[j] + b.ratio[t * c + j];
        d_gamma = alpha * d_gamma + b.kept[t];
        if (moment) {
            found += d_leak * alpha * r.leak[t];
            d_leak = alpha * d_leak + b.leak[t];
            T along = 0;
            for (int j = 0; j < t; j++) along += b.moment_end[j] * r.moment[t * c + j];
            found += alpha * along;
            for (int j = 0; j < t; j++) b.moment_end[j] = alpha * b.moment_end[j] + b.moment[t * c + j];
        }
        b.log_alpha[t] = found;
    }
}

// Gradients of x, value, query of a chunk (C, D), which are overwritten. ``grads`` becomes that of the state before it;
// that of the chunk's origin is added to ``starts``: one and the same where the chunk starts here.
template <class T>
void chunk_back(const Spec& spec, const Head<T>& head, Record<T>& r, const State<T>& grads, const State<T>& starts,
                const Totals<T>& totals, BackScratch<T>& b, const T* dy, T* dx, T* d_value, T* d_query, bool last) {
    const Size s = spec.size(r.size);
    const bool moment = spec.momentum != 0, here = r.origin.base == r.state.base;
    const int64_t fixed = spec.fixed(), cd = int64_t(s.c) * s.d, cu = int64_t(s.c) * s.u, cc = int64_t(s.c) * s.c;
    auto clear = [](T* p, int64_t count) { std::memset(p, 0, sizeof(T) * count); };
    for (T* p : {b.dk, b.dv, dx, d_value, d_query}) clear(p, cd);
    for (T* p : {b.ratio, b.moment}) clear(p, cc);
    for (T* p : {b.retain_end, b.moment_end, b.kept, b.leak, b.opened, b.log_alpha}) clear(p, s.c);
    clear(b.ends, 2);
    std::memcpy(b.dq, dy, sizeof(T) * cd);

    for (int64_t g = 0; g < spec.written; g++) {
        Written<T>& w = r.memory[g];
        const int64_t m = fixed + g;
        const Anchors<T> anchor = spec.anchored ? head.anchors[g] : Anchors<T>{};
        const Anchors<T> d_anchor = spec.anchored ? totals.anchors[g] : Anchors<T>{};
        const T *s1 = r.state.w1(m), *s2 = r.state.w2(m), *m1 = r.state.m1(m), *m2 = r.state.m2(m);
        T *d1 = grads.w1(m), *d2 = grads.w2(m), *od1 = starts.w1(m), *od2 = starts.w2(m);
        transpose(s.u, s.d, s1, b.s1), transpose(s.d, s.u, s2, b.s2);
        const T *o1 = b.s1, *o2 = b.s2;
        if (!here) {
            transpose(s.u, s.d, r.origin.w1(m), b.o1), transpose(s.d, s.u, r.origin.w2(m), b.o2);
            o1 = b.o1, o2 = b.o2;
        }
        if (moment) transpose(s.u, s.d, m1, b.n1), transpose(s.d, s.u, m2, b.n2);
        const Layer<T> one{
            s.u,      s.d,         w.hidden,   w.error, w.gain1, w.reads1, b.e1,      b.u1,
            w.solve1, w.write1,    w.gram1,    w.free1, w.leak1, b.s1,     anchor.p1, moment ? b.n1 : nullptr,
            d1,       d_anchor.t1, grads.m1(m)};
        const Layer<T> two{
            s.d,     s.u,         r.k,        b.g2,    w.gain2, w.reads2, b.e2,      b.u2,
            r.solve, r.write,     r.gram,     w.free2, w.leak2, b.s2,     anchor.p2, moment ? b.n2 : nullptr,
            d2,      d_anchor.t2, grads.m2(m)};
        for (int64_t i = 0; i < cu; i += LANES<T>) at(b.g2 + i) = at(w.pulled + i) * at(w.slope + i);
        scale_rows(s.c, s.d, w.gain1, w.reads1, b.e1), scale_rows(s.c, s.d, w.gain1, w.error, b.u1);
        scale_rows(s.c, s.u, w.gain2, w.reads2, b.e2), scale_rows(s.c, s.u, w.gain2, b.g2, b.u2);
        clear(b.hidden, cu), clear(b.rate, s.c);
        for (int t = 0; t < s.c; t++) r.own[t] = T(spec.rate_max) * head.scales[g] * r.opened[t];
        end_back(s, one, r, s1, anchor.t1, m1, moment, last, b, b.left1, b.moved1, b.hidden, b.cd, b.w1);
        end_back(s, two, r, s2, anchor.t2, m2, moment, last, b, b.left2, b.moved2, b.dk, b.cu, b.w1);
        const bool reads = g == spec.written - 1;
        if (reads) {
            clear(b.inner, cu);
            read_back(s, moment, one, dy, r.read.inner, r.read.products1, r.read.free1, r.read.leak1, r, b, b.inner,
                      b.hidden, b.erased1, b.updates1, b.cd);
            for (int64_t i = 0; i < cu; i += LANES<T>) at(b.inner + i) *= at(r.read.slope + i);
            read_back(s, moment, two, b.inner, r.q, r.read.products2, r.read.free2, r.read.leak2, r, b, b.dq, b.dk,
                      b.erased2, b.updates2, b.cu);
        }
        solve_back(s, moment, last, two, b.left2, b.moved2, reads ? b.erased2 : nullptr, reads ? b.updates2 : nullptr,
                   r, b, b.right2, b.error2, b.gain2, b.dk, b.cu);
        solve_back(s, moment, last, one, b.left1, b.moved1, reads ? b.erased1 : nullptr, reads ? b.updates1 : nullptr,
                   r, b, b.right1, b.error, b.gain1, b.hidden, b.cd);
        for (int64_t i = 0; i < cu; i += LANES<T>) at(b.cu + i) = at(b.error2 + i) * at(w.slope + i);  // of w1ᵀ e
        add_product(s.c, s.d, s.u, b.cu, s.u, r.origin.w1(m), s.d, b.error, s.d);
        add_outer(s.u, s.d, s.c, b.cu, w.error, od1);
        T* extra = nullptr;
        if (spec.mixed) {
            totals.mix[g] += dot(int(cd), b.error, w.image);
            extra = b.cd2;
            for (int64_t i = 0; i < cd; i += LANES<T>) {
                at(extra + i) = at(b.error + i) * head.mix[g];
                at(b.dk + i) += at(extra + i);
            }
        }
        if (extra && !here) {
            add_product(s.c, s.u, s.d, extra, s.d, o1, s.u, b.hidden, s.u);
            add_outer(s.u, s.d, s.c, w.hidden, extra, od1);
            extra = nullptr;
        }
        carry_back(s, one, b.right1, extra, w.hidden, r, w.free1, w.leak1, b, b.hidden, b.cd);
        gain_back(s, one, b.gain1, r.own, b.rate, b.hidden);
        for (int64_t i = 0; i < cu; i += LANES<T>) {  // σ'' = s (1 − s) (2 + z (1 − 2 s))
            const Vec<T> z = at(w.z + i), gate = sigmoid<T>(z);
            const Vec<T> curve = gate * (T(1) - gate) * (T(2) + z * (T(1) - T(2) * gate));
            at(b.cu2 + i) = at(b.hidden + i) * at(w.slope + i) + at(b.error2 + i) * at(w.pulled + i) * curve;
        }
        if (!here) {
            add_product(s.c, s.d, s.u, b.cu2, s.u, o2, s.d, b.dk, s.d);
            add_outer(s.d, s.u, s.c, r.k, b.cu2, od2);
        }
        carry_back(s, two, b.right2, here ? b.cu2 : nullptr, r.k, r, w.free2, w.leak2, b, b.dk, b.cu);
        gain_back(s, two, b.gain2, r.own, b.rate, b.dk);
        for (int64_t i = 0; i < cd; i += LANES<T>) at(b.cd + i) = -at(b.error + i);
        if (spec.normalise) normalise_back(s.c, s.d, w.wanted, w.inverse, b.cd);
        map_back(s, b.cd, w.target, o1, o2, b.dv, od1, od2, b.cu);
        for (int t = 0; t < r.size; t++) {
            totals.scales[g] += b.rate[t] * T(spec.rate_max) * r.opened[t];
            b.opened[t] += b.rate[t] * T(spec.rate_max) * head.scales[g];
        }
    }
    if (spec.retention) decays_back(s, r, moment, b);

    auto plain = [&](int64_t m) {
        transpose(s.u, s.d, r.origin.w1(m), b.w1), transpose(s.d, s.u, r.origin.w2(m), b.w2);
    };
    plain(spec.rate);
    for (int t = 0; t < s.c; t++) b.opened[t] *= r.opened[t] * (1 - r.opened[t]), totals.biases[0] += b.opened[t];
    score_back(s, b.opened, r.rate, r.origin.w1(spec.rate), b.w2, head.rate_read, dx, starts.w1(spec.rate),
               starts.w2(spec.rate), totals.rate_read, b.cu, b.row);
    if (spec.retention) {
        plain(spec.retain);
        for (int t = 0; t < r.size; t++) b.log_alpha[t] *= r.closed[t], totals.biases[1] += b.log_alpha[t];
        score_back(s, b.log_alpha, r.retain, r.origin.w1(spec.retain), b.w2, head.retain_read, dx,
                   starts.w1(spec.retain), starts.w2(spec.retain), totals.retain_read, b.cu, b.row);
    }
    plain(spec.key);
    normalise_back(s.c, s.d, r.k, r.k_inverse, b.dk);
    map_back(s, b.dk, r.key, b.w1, b.w2, dx, starts.w1(spec.key), starts.w2(spec.key), b.cu);
    plain(spec.value);
    map_back(s, b.dv, r.content, b.w1, b.w2, d_value, starts.w1(spec.value), starts.w2(spec.value), b.cu);
    if (spec.query < 0) {
        std::memcpy(d_query, b.dq, sizeof(T) * cd);
        return;
    }
    plain(spec.query);
    normalise_back(s.c, s.d, r.q, r.q_inverse, b.dq);
    map_back(s, b.dq, r.asked, b.w1, b.w2, d_query, starts.w1(spec.query), starts.w2(spec.query), b.cu);
}
