// What the inner loop on a CPU is made of: vectors, products of small row-major matrices, triangular solves.
//
// All sides are multiples of PAD and all matrices aligned, so nothing here has a remainder. A matrix is a pointer and
// the length of its row. Sums have one fixed order: same inputs, same bits, whatever the batch and the number of
// threads.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#else
#define VECTOR_BYTES 32
#define TILE_ROWS 4
#endif

constexpr int PAD = 16;

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int LANES = VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T>& at(T* p) {
    return *reinterpret_cast<Vec<T>*>(p);
}
template <class T>
inline const Vec<T>& at(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
// the same anywhere in memory
template <class T>
struct LooseOf {
    typedef T type __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(sizeof(T))));
};
template <class T>
inline typename LooseOf<T>::type& loose(T* p) {
    return *reinterpret_cast<typename LooseOf<T>::type*>(p);
}
template <class T>
inline const typename LooseOf<T>::type& loose(const T* p) {
    return *reinterpret_cast<const typename LooseOf<T>::type*>(p);
}
template <class T>
inline Vec<T> splat(T value) {
    return value - Vec<T>{};
}
template <class T>
inline T sum(Vec<T> v) {
    T total = 0;
    for (int i = 0; i < LANES<T>; i++) total += v[i];
    return total;
}

// e^x. float: to 2e-7 of it between e^-87 and e^88, held there; NaN stays NaN.
inline Vec<float> exponential(Vec<float> x) {
    typedef int32_t Whole __attribute__((vector_size(VECTOR_BYTES)));
    const Vec<float> low = splat(-87.0f), high = splat(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec<float> magic = splat(12582912.0f);  // adding it rounds to a whole number
    Vec<float> n = x * 1.44269504088896341f + magic;
    n -= magic;
    Vec<float> r = x - n * 0.693359375f;
    r -= n * -2.12194440e-4f;
    Vec<float> y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Whole power = (__builtin_convertvector(n, Whole) + 127) << 23;
    return y * reinterpret_cast<const Vec<float>&>(power);
}
inline Vec<double> exponential(Vec<double> x) {
    for (int i = 0; i < LANES<double>; i++) x[i] = std::exp(x[i]);
    return x;
}
template <class T>
inline Vec<T> sigmoid(Vec<T> z) {
    return T(1) / (T(1) + exponential(-z));
}

// ---- products. Modes: what becomes of the product of A and B.
enum class Mode { SET, ADD, SUB };
// Which products are not there: A strictly lower (with its transpose where A is read transposed), or only the lower
// triangle of the result wanted. Blocks that are crossed by the diagonal are done whole.
enum class Shape { FULL, LOWER_A, LOWER_RESULT };

template <class T, int ROWS, int COLUMNS, Mode MODE, bool TRANSPOSED>
inline void tile(int from, int to, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
    Vec<T> total[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) total[i][j] = Vec<T>{};
    for (int p = from; p < to; p++) {
        Vec<T> row[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) row[j] = at(b + p * ldb + j * LANES<T>);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            const Vec<T> value = splat(TRANSPOSED ? a[p * lda + i] : a[i * lda + p]);
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) total[i][j] += value * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            Vec<T>& out = at(c + i * ldc + j * LANES<T>);
            if (MODE == Mode::SET)
                out = total[i][j];
            else if (MODE == Mode::ADD)
                out += total[i][j];
            else
                out -= total[i][j];
        }
}

// C (m, n) from A (m, k) and B (k, n); TRANSPOSED: A is given as (k, m).
template <class T, Mode MODE = Mode::SET, bool TRANSPOSED = false, Shape SHAPE = Shape::FULL>
void product(int m, int n, int k, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
    constexpr int R = TILE_ROWS, W = LANES<T>;
    for (int i = 0; i < m; i += R) {
        const int wide = SHAPE == Shape::LOWER_RESULT ? (i + R + PAD - 1) / PAD * PAD : n;
        const int from = SHAPE == Shape::LOWER_A && TRANSPOSED ? i : 0;
        const int to = SHAPE == Shape::LOWER_A && !TRANSPOSED ? i + R : k;
        const T* rows = TRANSPOSED ? a + i : a + i * lda;
        int j = 0;
        for (; j + 2 * W <= wide; j += 2 * W)
            tile<T, R, 2, MODE, TRANSPOSED>(from, to, rows, lda, b + j, ldb, c + i * ldc + j, ldc);
        for (; j < wide; j += W) tile<T, R, 1, MODE, TRANSPOSED>(from, to, rows, lda, b + j, ldb, c + i * ldc + j, ldc);
    }
}
template <class T>
inline void add_product(int m, int n, int k, const T* a, int lda, const T* b, int ldb, T* c, int ldc) {
    product<T, Mode::ADD>(m, n, k, a, lda, b, ldb, c, ldc);
}
// += Aᵀ B, A (k, m)
template <class T>
inline void add_outer(int m, int n, int k, const T* a, const T* b, T* c) {
    product<T, Mode::ADD, true>(m, n, k, a, m, b, n, c, n);
}

// B (columns, rows) = Aᵀ of A (rows, columns), a block of lanes by lanes at a time: bit by bit of the two places. Both
// may lie anywhere, but both sides are multiples of the lanes.
template <class T>
void transpose(int rows, int columns, const T* a, T* b) {
    constexpr int W = LANES<T>;
#if defined(__clang__)
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) b[j * rows + i] = a[i * columns + j];
#else
    typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
    typedef Index Mask __attribute__((vector_size(VECTOR_BYTES)));
    for (int i = 0; i < rows; i += W)
        for (int j = 0; j < columns; j += W) {
            Vec<T> block[W];
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) block[r] = loose(a + (i + r) * columns + j);
#pragma GCC unroll 4
            for (int bit = 1; bit < W; bit *= 2) {
                Mask first, second;
#pragma GCC unroll 16
                for (int l = 0; l < W; l++) {
                    first[l] = l & bit ? W + l - bit : l;
                    second[l] = l & bit ? W + l : l + bit;
                }
#pragma GCC unroll 16
                for (int r = 0; r < W; r++)
                    if (!(r & bit)) {
                        const Vec<T> upper = block[r], lower = block[r + bit];
                        block[r] = __builtin_shuffle(upper, lower, first);
                        block[r + bit] = __builtin_shuffle(upper, lower, second);
                    }
            }
#pragma GCC unroll 16
            for (int r = 0; r < W; r++) loose(b + (j + r) * rows + i) = block[r];
        }
#endif
}

// ---- triangular solves; N (size, size) strictly lower, D = diag(gain), X (size, wide), 16 rows at a time.

template <class T, int COLUMNS, bool UPWARDS>
inline void solve_rows(int begin, int size, int wide, const T* n, const T* gain, T* x, T* scaled) {
    constexpr int W = LANES<T>;
    for (int s = 0; s < PAD; s++) {
        const int t = UPWARDS ? begin + PAD - 1 - s : begin + s;
        Vec<T> row[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) row[j] = at(x + t * wide + j * W);
        for (int q = 0; q < s; q++) {
            const int r = UPWARDS ? begin + PAD - 1 - q : begin + q;
            const Vec<T> factor = splat(UPWARDS ? n[r * size + t] : n[t * size + r]);
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; j++) row[j] -= factor * at(scaled + r * wide + j * W);
        }
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            at(x + t * wide + j * W) = row[j];
            at(scaled + t * wide + j * W) = row[j] * gain[t];
        }
    }
}

// UPWARDS false: X ← (I + N D)⁻¹ X; true: X ← (I + Nᵀ D)⁻¹ X. ``scaled`` becomes D X.
template <class T, bool UPWARDS>
void substitute(int size, int wide, const T* n, const T* gain, T* x, T* scaled) {
    constexpr int W = LANES<T>;
    for (int block = 0; block < size; block += PAD) {
        const int begin = UPWARDS ? size - PAD - block : block, after = begin + PAD;
        if (UPWARDS)
            product<T, Mode::SUB, true>(PAD, wide, size - after, n + after * size + begin, size, scaled + after * wide,
                                        wide, x + begin * wide, wide);
        else
            product<T, Mode::SUB>(PAD, wide, begin, n + begin * size, size, scaled, wide, x + begin * wide, wide);
        int j = 0;
        for (; j + 4 * W <= wide; j += 4 * W) solve_rows<T, 4, UPWARDS>(begin, size, wide, n, gain, x + j, scaled + j);
        for (; j < wide; j += W) solve_rows<T, 1, UPWARDS>(begin, size, wide, n, gain, x + j, scaled + j);
    }
}
