// One chunk of the inner loop backwards, for one head of one row; d· marks a gradient. The comments of inner_layer.py
// say what is differentiated. Gradients of states are transposed, as states are.

#pragma once

#include "chunk.h"

template <class T>
struct Totals {           // of what does not change along the loop, of one head; collected
    Anchors<T>* anchors;  // t1, t2 of each written memory
    T *rate_read, *retain_read, *scales, *mix, *biases;
};

template <class T>
struct BackScratch {
    T *dk, *dv, *dq, *ratio, *moment, *retain_end, *moment_end, *kept, *leak, *ends, *rate, *opened, *log_alpha;
    T *s1, *s2, *n1, *n2, *o1, *o2, *w1, *w2;  // as they are, not transposed
    T *left1, *moved1, *left2, *moved2, *hidden, *error, *error2, *right1, *right2,
        *w;                                              // of the memory whose turn it is
    T *g2, *e1, *u1, *e2, *u2;                           // its e2, E and Ĝ, made again
    T *erased1, *updates1, *erased2, *updates2, *inner;  // what the read adds
    T *cd, *cu, *cd2, *cu2, *cc, *products, *transposed, *gain1, *gain2, *row;
    static int64_t lay_out(const Size& s, T* base, BackScratch& b) {
        Layout<T> a{base};
        const int64_t cd = s.c * s.d, cu = s.c * s.u, cc = s.c * s.c, widest = s.d > s.u ? s.d : s.u;
        for (T** p : {&b.dk, &b.dv, &b.dq, &b.left1, &b.moved1, &b.error, &b.right1, &b.erased1, &b.updates1, &b.cd,
                      &b.cd2, &b.e1, &b.u1})
            *p = a.take(cd);
        for (T** p : {&b.left2, &b.moved2, &b.hidden, &b.error2, &b.right2, &b.erased2, &b.updates2, &b.inner, &b.cu,
                      &b.cu2, &b.g2, &b.e2, &b.u2})
            *p = a.take(cu);
        for (T** p : {&b.ratio, &b.moment, &b.cc, &b.products}) *p = a.take(cc);
        for (T** p : {&b.s1, &b.s2, &b.n1, &b.n2, &b.o1, &b.o2, &b.w1, &b.w2}) *p = a.take(s.weights());
        for (T** p :
             {&b.retain_end, &b.moment_end, &b.kept, &b.leak, &b.rate, &b.opened, &b.log_alpha, &b.gain1, &b.gain2})
            *p = a.take(s.c);
        b.ends = a.take(PAD), b.w = a.take(s.c * widest), b.transposed = a.take(s.c * widest), b.row = a.take(widest);
        return a.used;
    }
};

// One layer of a memory: its state before the chunk, transposed (t·) and as it is, and what it read and wrote.
template <class T>
struct Layer {
    int in, out;
    const T *x, *g, *gain, *reads, *erased, *updates, *solve, *write, *gram, *free, *leaked;
    const T *plain, *anchor, *momentum;  // (out, in); the last two may be null
    T *d_state, *d_anchor, *d_momentum;  // (in, out)
};

template <class T>
inline void add(int64_t count, const T* a, T* total) {
    for (int64_t i = 0; i < count; i += LANES<T>) at(total + i) += at(a + i);
}
template <class T>
inline T inner(int64_t count, const T* a, const T* b) {
    Vec<T> total{};
    for (int64_t i = 0; i < count; i += LANES<T>) total += at(a + i) * at(b + i);
    return sum<T>(total);
}
// grad of z of y = n(z), in place; the same for y = −n(z) and the gradient of n(z)
template <class T>
void normalise_back(int rows, int wide, const T* y, const T* inverse, T* grad) {
    for (int t = 0; t < rows; t++) {
        const T along = dot(wide, y + t * wide, grad + t * wide);
        for (int j = t * wide; j < (t + 1) * wide; j += LANES<T>)
            at(grad + j) = (at(grad + j) - at(y + j) * along) * inverse[t];
    }
}
// dx += …, d w1ᵀ += …, d w2ᵀ += … of M(x); w1 and w2 as they are, dz is scratch
template <class T>
void map_back(const Size& s, const T* grad, const Applied<T>& a, const T* w1, const T* w2, T* dx, T* d_w1, T* d_w2,
              T* dz) {
    product(s.c, s.u, s.d, grad, s.d, w1, s.u, dz, s.u);
    for (int64_t i = 0; i < int64_t(s.c) * s.u; i += LANES<T>) at(dz + i) *= at(a.slope + i);
    add(int64_t(s.c) * s.d, grad, dx);
    add_product(s.c, s.d, s.u, dz, s.u, w2, s.d, dx, s.d);
    add_outer(s.u, s.d, s.c, a.hidden, grad, d_w1);
    add_outer(s.d, s.u, s.c, a.given, dz, d_w2);
}
// of ⟨read, M(x)⟩, for d_logit (C); w1ᵀ transposed, w2 as it is
template <class T>
void score_back(const Size& s, const T* d_logit, const Applied<T>& a, const T* w1t, const T* w2, const T* read, T* dx,
                T* d_w1, T* d_w2, T* d_read, T* dz, T* row) {
    for (int i = 0; i < s.u; i++) row[i] = dot(s.d, w1t + i * s.d, read);
    for (int t = 0; t < s.c; t++) {
        for (int j = 0; j < s.u; j += LANES<T>)
            at(dz + t * s.u + j) = at(a.slope + t * s.u + j) * at(row + j) * d_logit[t];
        for (int j = 0; j < s.d; j += LANES<T>) {
            at(dx + t * s.d + j) += at(read + j) * d_logit[t];
            at(d_read + j) += at(a.given + t * s.d + j) * d_logit[t];
        }
    }
    add_product(s.c, s.d, s.u, dz, s.u, w2, s.d, dx, s.d);
    add_outer(s.d, s.u, s.c, a.given, dz, d_w2);
    std::memset(row, 0, sizeof(T) * s.u);  // of w1ᵀ read
    for (int t = 0; t < s.c; t++)
        for (int j = 0; j < s.u; j += LANES<T>) at(row + j) += at(a.hidden + t * s.u + j) * d_logit[t];
    for (int i = 0; i < s.u; i++)
        for (int j = 0; j < s.d; j += LANES<T>) {
            at(d_w1 + i * s.d + j) += at(read + j) * row[i];
            at(d_read + j) += at(w1t + i * s.d + j) * row[i];
        }
}

// Through what X (or queries x) read of the state before the chunk. ``extra``, a gradient of X S₀ᵀ itself, may be null.
template <class T>
void carry_back(const Size& s, const Layer<T>& l, const T* d_share, const T* extra, const T* x, const Record<T>& r,
                const T* free, const T* leaked, BackScratch<T>& b, T* dx, T* side) {
    const int in = l.in, out = l.out;
    for (int t = 0; t < s.c; t++) {
        const T* row = d_share + t * out;
        b.kept[t] += dot(out, row, free + t * out);
        if (l.momentum) b.leak[t] += dot(out, row, leaked + t * out);
    }
    scale_rows(s.c, out, r.kept, d_share, side);
    if (l.anchor) {
        T* rest = b.transposed;
        for (int64_t i = 0; i < int64_t(s.c) * out; i += LANES<T>) at(rest + i) = at(d_share + i) - at(side + i);
        add_product(s.c, in, out, rest, out, l.anchor, in, dx, in);
        add_outer(in, out, s.c, x, rest, l.d_anchor);
    }
    if (extra) add(int64_t(s.c) * out, extra, side);
    add_product(s.c, in, out, side, out, l.plain, in, dx, in);
    add_outer(in, out, s.c, x, side, l.d_state);
    if (!l.momentum) return;
    scale_rows(s.c, out, r.leak, d_share, side);
    add_product(s.c, in, out, side, out, l.momentum, in, dx, in);
    add_outer(in, out, s.c, x, side, l.d_momentum);
}

// What the state after the chunk tells: dleft, dmoved, dX −= …, and its own way back to the state before, in place.
template <class T>
void end_back(const Size& s, const Layer<T>& l, const Record<T>& r, const T* state, const T* anchor, const T* momentum,
              bool moment, bool last, BackScratch<T>& b, T* left, T* moved, T* dx, T* side, T* plain) {
    const int in = l.in, out = l.out;
    const int64_t count = s.weights();
    std::memset(left, 0, sizeof(T) * s.c * out);
    product<T, Mode::SUB>(s.c, out, in, l.x, in, l.d_state, out, left, out);
    for (int t = 0; t < s.c; t++) {
        const T* row = left + t * out;
        b.retain_end[t] += dot(out, row, l.erased + t * out);
        (moment ? b.moment_end : b.retain_end)[t] += dot(out, row, l.updates + t * out);
        for (int j = t * out; j < (t + 1) * out; j += LANES<T>)
            at(side + j) = at(l.updates + j) * r.moment_end[t] + at(l.erased + j) * r.retain_end[t];
    }
    transpose(in, out, l.d_state, plain);
    product<T, Mode::SUB>(s.c, in, out, side, out, plain, in, dx, in);
    if (moment || last) {
        std::memset(moved, 0, sizeof(T) * s.c * out);
        product<T, Mode::SUB>(s.c, out, in, l.x, in, l.d_momentum, out, moved, out);
        scale_rows(s.c, out, r.power_end, l.updates, side);
        transpose(in, out, l.d_momentum, plain);
        product<T, Mode::SUB>(s.c, in, out, side, out, plain, in, dx, in);
    }
    const T kept = r.ends[0], leak = r.ends[1], mu = r.ends[2];
    Vec<T> d_kept{}, d_leak{};
    for (int64_t i = 0; i < count; i += LANES<T>) {
        const Vec<T> grad = at(l.d_state + i);
        d_kept += grad * (anchor ? at(state + i) - at(anchor + i) : at(state + i));
        if (anchor) at(l.d_anchor + i) += grad * (1 - kept);
        if (moment) d_leak += grad * at(momentum + i);
        if (moment || last) at(l.d_momentum + i) = grad * leak + at(l.d_momentum + i) * mu;
        at(l.d_state + i) = grad * kept;
    }
    b.ends[0] += sum<T>(d_kept), b.ends[1] += sum<T>(d_leak);
}

// d(A Bᵀ), lower, of A's rows d_out: total −= (d_out Bᵀ) ∘ products for the decays; onto ``into`` (d_out Bᵀ) ∘ decay.
template <class T, bool FIRST>
void outer_back(int c, int wide, const T* d_out, const T* rows, const T* products, const T* decay, T* total, T* into,
                T* transposed, T* outer) {
    transpose(c, wide, rows, transposed);
    product<T, Mode::SET, false, Shape::LOWER_RESULT>(c, c, wide, d_out, wide, transposed, c, outer, c);
    for (int t = 0; t < c; t++) {
        int j = t * c;
        for (; j < t * c + t; j += LANES<T>) {
            const Vec<T> found = at(outer + j);
            at(total + j) -= found * at(products + j);
            if (FIRST)
                at(into + j) = -(found * at(decay + j));
            else
                at(into + j) -= found * at(decay + j);
        }
        if (FIRST)
            for (; j < (t + 1) * c; j += LANES<T>) at(into + j) = Vec<T>{};
    }
}

// Both writes' outer products at once: into becomes the gradient of X Xᵀ or Q Xᵀ below the diagonal.
template <class T>
void gram_back(const Size& s, bool moment, int wide, const T* d_out, const T* erased, const T* updates,
               const T* products, const Record<T>& r, BackScratch<T>& b, T* into, T* side) {
    if (!moment) {  // W' = R': one product for both
        for (int64_t i = 0; i < int64_t(s.c) * wide; i += LANES<T>) at(side + i) = at(erased + i) + at(updates + i);
        outer_back<T, true>(s.c, wide, d_out, side, products, r.ratio, b.ratio, into, b.transposed, b.products);
        return;
    }
    outer_back<T, true>(s.c, wide, d_out, erased, products, r.ratio, b.ratio, into, b.transposed, b.products);
    outer_back<T, false>(s.c, wide, d_out, updates, products, r.moment, b.moment, into, b.transposed, b.products);
}

// Through a read of one layer: dq += …, dX += …, and what it adds to dE and dĜ.
template <class T>
void read_back(const Size& s, bool moment, const Layer<T>& l, const T* grad, const T* q, const T* products,
               const T* free, const T* leaked, const Record<T>& r, BackScratch<T>& b, T* dq, T* dx, T* d_erased,
               T* d_updates, T* side) {
    const int in = l.in, out = l.out;
    const int64_t bytes = sizeof(T) * s.c * out;
    times_lower(s.c, products, r.ratio, b.cc), clear_upper(s.c, b.cc);
    std::memset(d_erased, 0, bytes);
    product<T, Mode::SUB, true, Shape::LOWER_A>(s.c, out, s.c, b.cc, s.c, grad, out, d_erased, out);
    if (moment) {
        times_lower(s.c, products, r.moment, b.cc);
        std::memset(d_updates, 0, bytes);
        product<T, Mode::SUB, true, Shape::LOWER_A>(s.c, out, s.c, b.cc, s.c, grad, out, d_updates, out);
    } else {
        std::memcpy(d_updates, d_erased, bytes);
    }
    gram_back(s, moment, out, grad, l.erased, l.updates, products, r, b, b.cc, side);
    product<T, Mode::ADD, false, Shape::LOWER_A>(s.c, in, s.c, b.cc, s.c, l.x, in, dq, in);
    product<T, Mode::ADD, true, Shape::LOWER_A>(s.c, in, s.c, b.cc, s.c, q, in, dx, in);
    carry_back(s, l, grad, static_cast<const T*>(nullptr), q, r, free, leaked, b, dq, side);
}

// Through a layer's writes: d_right (C, out), dG in ``dg``, dgain, dX += …; d_erased and d_updates may be null.
template <class T>
void solve_back(const Size& s, bool moment, bool last, const Layer<T>& l, const T* left, const T* moved,
                const T* d_erased, const T* d_updates, const Record<T>& r, BackScratch<T>& b, T* right, T* dg,
                T* d_gain, T* dx, T* side) {
    const int in = l.in, out = l.out;
    const int64_t count = int64_t(s.c) * out;
    scale_rows(s.c, out, r.retain_end, left, b.w);
    if (d_erased) add(count, d_erased, b.w);
    substitute<T, true>(s.c, out, l.solve, l.gain, b.w, right);
    scale_rows(s.c, out, r.moment_end, left, dg);
    if (moment || last)
        for (int t = 0; t < s.c; t++)
            for (int j = t * out; j < (t + 1) * out; j += LANES<T>) at(dg + j) += at(moved + j) * r.power_end[t];
    if (d_updates) add(count, d_updates, dg);
    product<T, Mode::SUB, true, Shape::LOWER_A>(s.c, out, s.c, l.write, s.c, right, out, dg, out);
    for (int t = 0; t < s.c; t++)
        d_gain[t] = dot(out, b.w + t * out, l.reads + t * out) + dot(out, dg + t * out, l.g + t * out);
    scale_rows(s.c, out, l.gain, dg, dg);
    gram_back(s, moment, out, right, l.erased, l.updates, l.gram, r, b, b.cc, side);
    product<T, Mode::ADD, false, Shape::LOWER_A>(s.c, in, s.c, b.cc, s.c, l.x, in, dx, in);
    product<T, Mode::ADD, true, Shape::LOWER_A>(s.c, in, s.c, b.cc, s.c, l.x, in, dx, in);
}

// Through gain = ρ / (1 + ρ ‖x‖²): onto dρ and dX.
template <class T>
void gain_back(const Size& s, const Layer<T>& l, const T* d_gain, const T* rate, T* d_rate, T* dx) {
    for (int t = 0; t < s.c; t++) {
        const T* x = l.x + t * l.in;
        const T shrink = 1 / (1 + rate[t] * dot(l.in, x, x));
        d_rate[t] += d_gain[t] * shrink * shrink;
        const T factor = -2 * d_gain[t] * l.gain[t] * l.gain[t];
        for (int j = 0; j < l.in; j += LANES<T>) at(dx + t * l.in + j) += at(x + j) * factor;
    }
}

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

// Gradients of x, value, query of a chunk (C, D), which are overwritten; ``grads`` becomes that of the state before it,
// to
// ``starts`` is added that of the chunk's origin: one and the same where it starts here.
template <class T>
void chunk_back(const Spec& spec, const Head<T>& head, Record<T>& r, const State<T>& grads, const State<T>& starts,
                const Totals<T>& totals, BackScratch<T>& b, const T* dy, T* dx, T* d_value, T* d_query, bool last) {
    const Size s = spec.size();
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
            totals.mix[g] += inner(cd, b.error, w.image);
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
