// What a chunk's backward pass is made of; d· marks a gradient. The comments of inner_layer.py
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
