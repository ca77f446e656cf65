// The whole inner loop on a CPU: each head of each row by itself, chunk after chunk. Called by loop.py.
//
// Only the state at every ``keep``-th chunk is kept; the backward pass runs a group of chunks again from there, writing
// down what happened, and walks it backwards. To keep what happened instead would cost more than to run it again: it is
// many times as much memory, which the machine must first find, where a group's stays in the caches.

#include <cstdlib>
#include <type_traits>

#include "chunk_back.h"
#include "token.h"

template <class T>
struct View {  // (batch, heads, tokens, width), the last side without a gap
    T* base;
    int64_t row, head, token;
    T* place(int64_t b, int64_t h, int64_t t) const { return base + b * row + h * head + t * token; }
};

template <class T>
struct Given {
    View<T> x, value, query;
    T *w1, *w2, *m1, *m2;  // (batch, memories, heads, …)
    T *initial1, *initial2, *scales, *rate_weight, *rate_bias, *retain_weight, *retain_bias, *mix;
    T *start1, *start2;  // weights at the start of a chunk that was begun before
    T* kept;
};
template <class T>
struct After {
    View<T> y;
    T *w1, *w2, *m1, *m2;
    T *start1, *start2;  // of a last chunk that goes on
};
template <class T>
struct Back {
    View<T> dy;
    T *w1, *w2, *m1, *m2, *start1, *start2;  // gradients of the state after
    View<T> dx, d_value, d_query;
    T *d_w1, *d_w2, *d_m1, *d_m2, *d_start1, *d_start2;                       // of the state before
    T *initial1, *initial2;                                                   // (batch, written, heads, …)
    T *scales, *rate_weight, *rate_bias, *retain_weight, *retain_bias, *mix;  // each with a batch in front
};

namespace {

template <class T>
T* scratch(int64_t count) {
    struct Room {
        T* base = nullptr;
        int64_t size = 0;
        ~Room() { std::free(base); }
    };
    static thread_local Room room;
    if (count > room.size) {
        std::free(room.base);
        room.base = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
        room.size = room.base ? count : 0;
    }
    return room.base;
}

// a (rows, columns) matrix into a padded one, zeros around it; and back
template <class T>
void load(int64_t rows, int64_t columns, const T* a, int64_t stride, int64_t padded_rows, int64_t padded, T* out) {
    if (rows < padded_rows || columns < padded) std::memset(out, 0, sizeof(T) * padded_rows * padded);
    for (int64_t i = 0; i < rows; i++) std::memcpy(out + i * padded, a + i * stride, sizeof(T) * columns);
}
template <class T>
void store(int64_t rows, int64_t columns, const T* a, int64_t padded, T* out, int64_t stride) {
    for (int64_t i = 0; i < rows; i++) std::memcpy(out + i * stride, a + i * padded, sizeof(T) * columns);
}
// the same, transposed: a (rows, columns) without gaps, out (padded columns, padded rows). Null is zeros, or not
// wanted.
template <class T>
void load_turned(int64_t rows, int64_t columns, const T* a, int64_t padded_rows, int64_t padded_columns, T* out) {
    if (a && rows == padded_rows && columns == padded_columns) return transpose(int(rows), int(columns), a, out);
    std::memset(out, 0, sizeof(T) * padded_rows * padded_columns);
    if (!a) return;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[j * padded_rows + i] = a[i * columns + j];
}
template <class T>
void store_turned(int64_t rows, int64_t columns, const T* a, int64_t padded_rows, int64_t padded_columns, T* out) {
    if (!out) return;
    if (rows == padded_rows && columns == padded_columns) return transpose(int(columns), int(rows), a, out);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) out[i * columns + j] = a[j * padded_rows + i];
}

// One head of one row: where its numbers are, and its padded constants.
template <class T>
struct Program {
    const Spec& spec;
    const Given<T>& given;
    int64_t b, h;
    Size s;
    Head<T> head;
    Anchors<T> anchors[MOST_MEMORIES];
    T *rate_read, *retain_read, *scales, *mix;

    Program(const Spec& spec, const Given<T>& given, int64_t number, Layout<T>& room)
        : spec(spec), given(given), b(number / spec.heads), h(number % spec.heads), s(spec.size()) {
        rate_read = room.take(s.d), retain_read = room.take(s.d);
        scales = room.take(spec.written), mix = room.take(spec.written);
        if (spec.anchored)
            for (int64_t g = 0; g < spec.written; g++)
                for (T** p : {&anchors[g].t1, &anchors[g].t2, &anchors[g].p1, &anchors[g].p2})
                    *p = room.take(s.weights());
        if (!room.base) return;
        const int64_t d = spec.width, u = spec.hidden;
        load<T>(1, d, given.rate_weight + h * d, d, 1, s.d, rate_read);
        load<T>(1, d, given.retain_weight + h * d, d, 1, s.d, retain_read);
        for (int64_t g = 0; g < spec.written; g++) {
            scales[g] = given.scales[g * spec.heads + h];
            mix[g] = spec.mixed ? given.mix[g * spec.heads + h] : 0;
            if (!spec.anchored) continue;
            const int64_t at = ((spec.fixed() + g) * spec.heads + h) * d * u;
            load_turned(d, u, given.initial1 + at, s.d, s.u, anchors[g].t1);
            load_turned(u, d, given.initial2 + at, s.u, s.d, anchors[g].t2);
            load<T>(d, u, given.initial1 + at, u, s.d, s.u, anchors[g].p1);
            load<T>(u, d, given.initial2 + at, d, s.u, s.d, anchors[g].p2);
        }
        head = {rate_read, retain_read, scales, mix, given.rate_bias[h], given.retain_bias[h], anchors};
    }
    int64_t place(int64_t memory) const {
        return ((b * spec.memories + memory) * spec.heads + h) * spec.width * spec.hidden;
    }
    T* of(T* base, int64_t memory) const { return base ? base + place(memory) : nullptr; }
    void load_weights(T* w1, T* w2, const State<T>& state) const {
        for (int64_t m = 0; m < spec.memories; m++) {
            load_turned(spec.width, spec.hidden, of(w1, m), s.d, s.u, state.w1(m));
            load_turned(spec.hidden, spec.width, of(w2, m), s.u, s.d, state.w2(m));
        }
    }
    void store_weights(const State<T>& state, T* w1, T* w2) const {
        for (int64_t m = 0; m < spec.memories; m++) {
            store_turned(spec.width, spec.hidden, state.w1(m), s.d, s.u, of(w1, m));
            store_turned(spec.hidden, spec.width, state.w2(m), s.u, s.d, of(w2, m));
        }
    }
    void read_in(const View<T>& view, int64_t chunk, T* out) const {
        const int64_t tokens = spec.tokens(chunk);
        load<T>(tokens, spec.width, view.place(b, h, spec.begin(chunk)), view.token, spec.size(tokens).c, s.d, out);
    }
    void write_out(const T* a, int64_t chunk, const View<T>& view) const {
        store<T>(spec.tokens(chunk), spec.width, a, s.d, view.place(b, h, spec.begin(chunk)), view.token);
    }
    // what happens in a chunk, into ``r``; the state before it too where it is held
    void run(int64_t chunk, const State<T>& state, const State<T>& start, Record<T>& r, Scratch<T>& tmp, T* y,
             bool hold, bool moves) const {
        read_in(given.x, chunk, r.x), read_in(given.value, chunk, r.value), read_in(given.query, chunk, r.query);
        r.size = int(spec.tokens(chunk));
        if (hold) std::memcpy(r.state.base, state.base, sizeof(T) * spec.kept_numbers());
        const bool here = chunk || !spec.offset;
        run_chunk(spec, head, state, here ? state : start, r, tmp, y, chunk == spec.chunks() - 1, moves);
    }
};

template <class T>
int64_t record_numbers(const Spec& spec) {
    Record<T> r;
    return lay_out<T>(spec, nullptr, r);
}

// Twice: first to count what is needed, then on what was found. False where the machine has not that much memory.
template <class T, class F>
bool twice(F use) {
    Layout<T> room{nullptr};
    use(room);
    Layout<T> found{scratch<T>(room.used)};
    if (!found.base) return false;
    use(found);
    return true;
}

template <class T>
bool forward(const Spec& spec, const Given<T>& given, const After<T>& after, int64_t number) {
    const Size s = spec.size();
    const int64_t states = spec.state_numbers(), kept = spec.kept_numbers(), chunks = spec.chunks();
    return twice<T>([&](Layout<T>& room) {
        const Program<T> program(spec, given, number, room);
        const State<T> state{room.take(states), spec.memories, s.weights()};
        const State<T> start{room.take(spec.origin_numbers()), spec.memories, s.weights()};
        Scratch<T> tmp;
        T* scratch = room.take(Scratch<T>::lay_out(s, nullptr, tmp));
        T* y = room.take(s.c * s.d);
        T* place = room.take(record_numbers<T>(spec));
        if (!room.base) return;
        Scratch<T>::lay_out(s, scratch, tmp);
        program.load_weights(given.w1, given.w2, state), program.load_weights(given.m1, given.m2, state.momenta());
        if (spec.offset) program.load_weights(given.start1, given.start2, start);
        Record<T> r;
        lay_out(spec, place, r);
        const int64_t groups = (chunks + spec.keep - 1) / spec.keep;
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            if (given.kept && chunk % spec.keep == 0)
                std::memcpy(given.kept + (number * groups + chunk / spec.keep) * kept, state.base, sizeof(T) * kept);
            const bool here = chunk || !spec.offset, goes_on = chunk == chunks - 1 && spec.open();
            if (goes_on) program.store_weights(here ? state : start, after.start1, after.start2);
            program.run(chunk, state, start, r, tmp, y, false, true);
            program.write_out(y, chunk, after.y);
        }
        program.store_weights(state, after.w1, after.w2), program.store_weights(state.momenta(), after.m1, after.m2);
    });
}

template <class T>
bool backward(const Spec& spec, const Given<T>& given, const Back<T>& back, int64_t number) {
    const Size s = spec.size();
    const int64_t record = record_numbers<T>(spec), states = spec.state_numbers(), chunks = spec.chunks();
    const int64_t kept = spec.kept_numbers();
    const int64_t group = spec.keep, groups = (chunks + group - 1) / group;
    const int64_t d = spec.width, u = spec.hidden;
    return twice<T>([&](Layout<T>& room) {
        const Program<T> program(spec, given, number, room);
        const State<T> state{room.take(states), spec.memories, s.weights()};
        const State<T> grads{room.take(states), spec.memories, s.weights()};
        const State<T> start{room.take(spec.origin_numbers()), spec.memories, s.weights()};
        const State<T> d_start{room.take(spec.origin_numbers()), spec.memories, s.weights()};
        Scratch<T> tmp;
        T* scratch = room.take(Scratch<T>::lay_out(s, nullptr, tmp));
        BackScratch<T> b;
        T* back_scratch = room.take(BackScratch<T>::lay_out(s, nullptr, b));
        T *y = room.take(s.c * s.d), *dy = room.take(s.c * s.d);
        T *dx = room.take(s.c * s.d), *d_value = room.take(s.c * s.d), *d_query = room.take(s.c * s.d);
        Anchors<T> anchors[MOST_MEMORIES];
        const int64_t begin = room.used;
        if (spec.anchored)
            for (int64_t g = 0; g < spec.written; g++)
                for (T** p : {&anchors[g].t1, &anchors[g].t2}) *p = room.take(s.weights());
        const Totals<T> totals{
            anchors, room.take(s.d), room.take(s.d), room.take(spec.written), room.take(spec.written), room.take(2)};
        const int64_t ending = room.used;
        T* records = room.take(group * record);
        if (!room.base) return;
        std::memset(room.base + begin, 0, sizeof(T) * (ending - begin));
        Scratch<T>::lay_out(s, scratch, tmp), BackScratch<T>::lay_out(s, back_scratch, b);
        program.load_weights(back.w1, back.w2, grads), program.load_weights(back.m1, back.m2, grads.momenta());
        program.load_weights(back.start1, back.start2, d_start);  // of the last chunk's start, then of the first's
        if (spec.offset) program.load_weights(given.start1, given.start2, start);
        Record<T> r;
        for (int64_t first = (groups - 1) * group; first >= 0; first -= group) {
            const int64_t beyond = first + group < chunks ? first + group : chunks;
            std::memcpy(state.base, given.kept + (number * groups + first / group) * kept, sizeof(T) * kept);
            for (int64_t chunk = first; chunk < beyond; chunk++) {
                lay_out(spec, records + (chunk - first) * record, r);
                program.run(chunk, state, start, r, tmp, y, true, chunk + 1 < beyond);
            }
            for (int64_t chunk = beyond - 1; chunk >= first; chunk--) {
                lay_out(spec, records + (chunk - first) * record, r);
                r.size = int(spec.tokens(chunk));
                program.read_in(back.dy, chunk, dy);
                const bool here = chunk || !spec.offset, last = chunk == chunks - 1;
                if (!here) r.origin = start;
                chunk_back(spec, program.head, r, grads, here ? grads : d_start, totals, b, dy, dx, d_value, d_query,
                           last);
                if (here && last && spec.open()) {
                    add(spec.origin_numbers(), d_start.base, grads.base);
                    std::memset(d_start.base, 0, sizeof(T) * spec.origin_numbers());
                }
                program.write_out(dx, chunk, back.dx), program.write_out(d_value, chunk, back.d_value);
                program.write_out(d_query, chunk, back.d_query);
            }
        }
        program.store_weights(grads, back.d_w1, back.d_w2),
            program.store_weights(grads.momenta(), back.d_m1, back.d_m2);
        program.store_weights(d_start, back.d_start1, back.d_start2);
        for (int64_t g = 0; g < spec.written; g++) {
            const int64_t at = (program.b * spec.written + g) * spec.heads + program.h;
            back.scales[at] = totals.scales[g];
            if (spec.mixed) back.mix[at] = totals.mix[g];
            if (!spec.anchored) continue;
            store_turned(d, u, anchors[g].t1, s.d, s.u, back.initial1 + at * d * u);
            store_turned(u, d, anchors[g].t2, s.u, s.d, back.initial2 + at * d * u);
        }
        store<T>(1, d, totals.rate_read, s.d, back.rate_weight + number * d, d);
        store<T>(1, d, totals.retain_read, s.d, back.retain_weight + number * d, d);
        back.rate_bias[number] = totals.biases[0], back.retain_bias[number] = totals.biases[1];
    });
}

template <class T>
bool tokens(const TokenSpec& spec, const TokenGiven<T>& given, const TokenAfter<T>& after, int64_t from, int64_t to) {
    TokenRoom<T> room;
    const int64_t count = TokenRoom<T>::lay_out(spec.width, spec.hidden, nullptr, room);
    T* base = scratch<T>(count);
    if (!base) return false;
    std::memset(base, 0, sizeof(T) * count);  // what pads a vector is computed with
    TokenRoom<T>::lay_out(spec.width, spec.hidden, base, room);
    for (int64_t i = from; i < to; i++) one_token(spec, given, after, i, room);
    return true;
}

}  // namespace

#define EXPORT(T, NAME)                                                                                          \
    extern "C" bool forward_##NAME(const Spec* spec, const Given<T>* given, const After<T>* after, int64_t from, \
                                   int64_t to) {                                                                 \
        bool done = true;                                                                                        \
        for (int64_t i = from; done && i < to; i++) done = forward<T>(*spec, *given, *after, i);                 \
        return done;                                                                                             \
    }                                                                                                            \
    extern "C" bool backward_##NAME(const Spec* spec, const Given<T>* given, const Back<T>* back, int64_t from,  \
                                    int64_t to) {                                                                \
        bool done = true;                                                                                        \
        for (int64_t i = from; done && i < to; i++) done = backward<T>(*spec, *given, *back, i);                 \
        return done;                                                                                             \
    }                                                                                                            \
    extern "C" bool token_##NAME(const TokenSpec* spec, const TokenGiven<T>* given, const TokenAfter<T>* after,  \
                                 int64_t from, int64_t to) {                                                     \
        return tokens<T>(*spec, *given, *after, from, to);                                                       \
    }

EXPORT(float, float32)
EXPORT(double, float64)
