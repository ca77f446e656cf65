// What is known of one problem, and what a chunk's backward pass needs of its forward pass.
//
// Every state is held transposed, w1ᵀ (U, D) and w2ᵀ (D, U), as the products of a chunk read it.
//
// Letters: C tokens of a chunk, D head width, U hidden width, all padded.

#pragma once

#include "tiles.h"

constexpr int MOST_MEMORIES = 6;  // k, v, η, α, q, memory

struct Size {
    int c, d, u;
    int weights() const { return d * u; }
};

// Numbers of one problem, the same for all chunks; mirrored by loop.py.
struct Spec {
    int64_t batch, heads, length, memories, written, width, hidden, chunk, keep;
    int64_t offset;                           // tokens that the first chunk had already
    int64_t key, value, rate, retain, query;  // places of the slow memories; query −1: as given
    int64_t retention, normalise, anchored, mixed;
    double momentum, rate_max;
    Size size(int64_t tokens) const {
        auto up = [](int64_t n) { return int((n + PAD - 1) / PAD * PAD); };
        return {up(tokens), up(width), up(hidden)};
    }
    Size size() const { return size(chunk); }
    int64_t chunks() const { return (offset + length + chunk - 1) / chunk; }
    int64_t begin(int64_t number) const { return number ? number * chunk - offset : 0; }
    int64_t tokens(int64_t number) const {
        return (number + 1 < chunks() ? begin(number + 1) : length) - begin(number);
    }
    bool open() const { return (offset + length) % chunk != 0; }  // whether the last chunk goes on
    int64_t fixed() const { return memories - written; }
    // one head's weights and momenta, in the padded, transposed form
    int64_t state_numbers() const { return 4 * memories * size().weights(); }
    int64_t origin_numbers() const { return state_numbers() / 2; }
    // of these, first, what a chunk needs of the state before it: without momentum, the weights
    int64_t kept_numbers() const { return (momentum ? 4 : 2) * memories * size().weights(); }
};

template <class T>
struct State {  // of one head, all memories
    T* base;
    int64_t memories;
    int weights;
    T* w1(int64_t m) const { return base + m * weights; }
    T* w2(int64_t m) const { return base + (memories + m) * weights; }
    State momenta() const { return {base + 2 * memories * weights, memories, weights}; }
    T* m1(int64_t m) const { return base + (2 * memories + m) * weights; }
    T* m2(int64_t m) const { return base + (3 * memories + m) * weights; }
};

template <class T>
struct Anchors {  // what retention pulls towards, of the written memories, transposed; and both as they are
    T *t1, *t2, *p1, *p2;
};

// A map applied: its input, a = σ(z) and σ'(z).
template <class T>
struct Applied {
    T *given, *hidden, *slope;
};

// One written memory in one chunk: what its backward pass needs.
template <class T>
struct Written {
    T *z, *hidden, *slope, *free2, *leak2, *free1, *leak1, *image;
    Applied<T> target;
    T *wanted, *inverse, *error;  // −v̂ and e, one and the same without λ
    T *pulled, *gain1, *gain2, *reads1, *reads2, *gram1, *solve1, *write1;
};

template <class T>
struct Read {  // y of the last memory
    T *out2, *inner, *slope, *products2, *products1, *free2, *leak2, *free1, *leak1;
};

template <class T>
struct Record {      // one chunk
    State<T> state;  // before its first token here, where it is held
    State<T>
        origin;  // weights at its start, at which errors are taken: those of ``state`` unless it was begun elsewhere
    T *x, *value, *query;
    Applied<T> key, content, rate, retain, asked;
    T *k, *k_inverse, *v, *q, *q_inverse, *opened, *closed, *alpha, *own;
    T *kept, *leak, *ratio, *moment, *retain_end, *moment_end, *power_end, *gram, *solve, *write;
    T* ends;  // γ_C, w0_C, μ^C
    Written<T> memory[MOST_MEMORIES];
    Read<T> read;
    int size;
};

// Lays out arrays one after another; from a null start it only counts.
template <class T>
struct Layout {
    T* base;
    int64_t used = 0;
    T* take(int64_t count) {
        T* place = base ? base + used : nullptr;
        used += (count + PAD - 1) / PAD * PAD;
        return place;
    }
};

template <class T>
int64_t lay_out(const Spec& spec, T* base, Record<T>& r) {
    const Size s = spec.size();
    const int64_t cd = int64_t(s.c) * s.d, cu = int64_t(s.c) * s.u, cc = int64_t(s.c) * s.c;
    Layout<T> a{base};
    r.origin = r.state = {a.take(spec.kept_numbers()), spec.memories, s.weights()};
    for (T** p : {&r.x, &r.value, &r.query, &r.k, &r.v, &r.q}) *p = a.take(cd);
    for (Applied<T>* m : {&r.key, &r.content, &r.rate, &r.retain, &r.asked})
        m->hidden = a.take(cu), m->slope = a.take(cu);
    r.key.given = r.rate.given = r.retain.given = r.x;
    r.content.given = r.value, r.asked.given = r.query;
    for (T** p : {&r.k_inverse, &r.q_inverse, &r.opened, &r.closed, &r.alpha, &r.own, &r.kept, &r.leak, &r.retain_end,
                  &r.moment_end, &r.power_end, &r.ends})
        *p = a.take(s.c);
    for (T** p : {&r.ratio, &r.gram, &r.solve}) *p = a.take(cc);
    r.moment = spec.momentum ? a.take(cc) : r.ratio;
    r.write = spec.momentum ? a.take(cc) : r.solve;
    for (int64_t g = 0; g < spec.written; g++) {
        Written<T>& w = r.memory[g];
        for (T** p : {&w.z, &w.hidden, &w.slope, &w.free2, &w.target.hidden, &w.target.slope, &w.pulled, &w.reads2})
            *p = a.take(cu);
        for (T** p : {&w.free1, &w.wanted, &w.reads1}) *p = a.take(cd);
        w.leak1 = spec.momentum ? a.take(cd) : nullptr, w.leak2 = spec.momentum ? a.take(cu) : nullptr;
        w.error = spec.mixed ? a.take(cd) : w.wanted;
        w.image = spec.mixed ? a.take(cd) : nullptr;
        for (T** p : {&w.inverse, &w.gain1, &w.gain2}) *p = a.take(s.c);
        w.gram1 = a.take(cc), w.solve1 = a.take(cc);
        w.write1 = spec.momentum ? a.take(cc) : w.solve1;
        w.target.given = r.v;
    }
    for (T** p : {&r.read.out2, &r.read.inner, &r.read.slope, &r.read.free2}) *p = a.take(cu);
    r.read.free1 = a.take(cd);
    r.read.leak1 = spec.momentum ? a.take(cd) : nullptr, r.read.leak2 = spec.momentum ? a.take(cu) : nullptr;
    r.read.products2 = a.take(cc), r.read.products1 = a.take(cc);
    return a.used;
}
