// Q4_0 with AVX-512 (VBMI, VNNI, BF16): a cache line of a row at a time.
//
// Integer products follow ggml: 4-bit weights are unsigned with an offset of 8, so w . x = q . x - 8 sum(x), and the
// offset is folded into the accumulator's start.
#pragma once

#include <algorithm>

#include "x86.h"

namespace {

// Rows by groups of 128 columns: the 72 bytes of four blocks at a time, one block's nibbles in each lane of 16 bytes.
struct q4_0_group {
    static constexpr int64_t COLUMNS = 128;
    static constexpr int64_t BYTES = 4 * sizeof(block_q4_0);

    __m512i first;   // the group's first 64 bytes: all four scales are there
    __m512i quants;  // 64 bytes of two weights each

    // blocks: of the group that the row still has, 1 to 4; the others read as zeros
    static q4_0_group whole(const char * p) { return of(_mm512_loadu_si512(p), _mm_loadl_epi64(reinterpret_cast<const __m128i *>(p + 64))); }
    static q4_0_group part(const char * p, int blocks) {
        return of(_mm512_maskz_loadu_epi8((1ull << blocks * sizeof(block_q4_0)) - 1, p), _mm_setzero_si128());
    }

  private:
    static q4_0_group of(__m512i first, __m128i rest) {
        const __m512i from = _mm512_set_epi8(71, 70, 69, 68, 67, 66, 65, 64, 63, 62, 61, 60, 59, 58, 57, 56, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 35, 34,
                                             33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2);
        return {first, _mm512_permutex2var_epi8(first, from, _mm512_castsi128_si512(rest))};
    }
};

// Products take four groups at a time: the sums of their blocks lie side by side in one vector, that of block `lane` of
// group g at 4 lane + g. So one conversion, one scale and one addition serve 512 columns, and x is small: that of four
// tokens stays in L1. What is left of a row comes group by group.
constexpr int GROUPS = 4;
constexpr int64_t WHOLE_COLUMNS = GROUPS * q4_0_group::COLUMNS;
constexpr int64_t WHOLE_BYTES = GROUPS * q4_0_group::BYTES;

// x of some groups: what belongs to the low nibbles of each, to the high ones, the sums that fold in the offset of 8, and
// the scales; of a single group, a block's scale is there four times, and its sum once.
template <int N> struct alignas(64) q4_0_x {
    int8_t low[N][64];
    int8_t high[N][64];
    int32_t start[16];
    float d[16];
};

// An arranged x: n / WHOLE_COLUMNS times four groups, then single ones.
const q4_0_x<GROUPS> * q4_0_wholes(const void * x, int64_t i) { return static_cast<const q4_0_x<GROUPS> *>(x) + i; }
const q4_0_x<1> * q4_0_singles(const void * x, int64_t n, int64_t i) { return reinterpret_cast<const q4_0_x<1> *>(q4_0_wholes(x, n / WHOLE_COLUMNS)) + i; }

size_t q4_0_arranged_size(int64_t n) {
    const int64_t singles = (n % WHOLE_COLUMNS + q4_0_group::COLUMNS - 1) / q4_0_group::COLUMNS;
    return n / WHOLE_COLUMNS * sizeof(q4_0_x<GROUPS>) + singles * sizeof(q4_0_x<1>);
}

// Block `lane` of group g; returns minus eight times its sum.
template <int N> int q4_0_put(const block_q8_0 & from, int64_t g, int64_t lane, q4_0_x<N> & to) {
    std::memcpy(to.low[g] + 16 * lane, from.qs, 16);
    std::memcpy(to.high[g] + 16 * lane, from.qs + 16, 16);
    int sum = 0;
    for (const int8_t q : from.qs) {
        sum += q;
    }
    return -8 * sum;
}

void q4_0_arrange(int64_t n, const void * x, void * out) {
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    std::memset(out, 0, q4_0_arranged_size(n));
    const int64_t wholes = n / WHOLE_COLUMNS;
    for (int64_t b = 0; b < n / BLOCK; b++) {
        const int64_t group = b / 4, lane = b % 4, g = group % GROUPS;
        if (group < wholes * GROUPS) {
            q4_0_x<GROUPS> & to = const_cast<q4_0_x<GROUPS> &>(*q4_0_wholes(out, group / GROUPS));
            to.start[4 * lane + g] = q4_0_put(xs[b], g, lane, to);
            to.d[4 * lane + g] = f16(xs[b].d);
        } else {
            q4_0_x<1> & to = const_cast<q4_0_x<1> &>(*q4_0_singles(out, n, g));
            to.start[4 * lane] = q4_0_put(xs[b], 0, lane, to);
            std::fill(to.d + 4 * lane, to.d + 4 * lane + 4, f16(xs[b].d));
        }
    }
}

// The products of a group's weights, of whose x `start` is the first sum.
__m512i q4_0_integers(__m512i start, __m512i low, __m512i high, const int8_t * x_low, const int8_t * x_high) {
    return _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, low, _mm512_load_si512(x_low)), high, _mm512_load_si512(x_high));
}
__m512i q4_0_low(const q4_0_group & w) { return _mm512_and_si512(w.quants, _mm512_set1_epi8(15)); }
__m512i q4_0_high(const q4_0_group & w) { return _mm512_and_si512(_mm512_srli_epi16(w.quants, 4), _mm512_set1_epi8(15)); }

// acc[t] + the products of four groups of a row with each token.
template <int T> __attribute__((always_inline)) inline void q4_0_dot(const q4_0_group * w, const q4_0_x<GROUPS> * const * x, vec * acc) {
    // The scales of blocks 0 to 3 of two groups, for the first two words of each four.
    const __m512i two_scales = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 59, 27, 59, 27, 50, 18, 50, 18, 41, 9, 41, 9, 32, 0, 32, 0);
    const __m512i first = _mm512_permutex2var_epi16(w[0].first, two_scales, w[1].first);
    const __m512i second = _mm512_permutex2var_epi16(w[2].first, two_scales, w[3].first);
    const vec d = _mm512_cvtph_ps(_mm256_mask_blend_epi16(0xcccc, _mm512_castsi512_si256(first), _mm512_castsi512_si256(second)));
    __m512i low[GROUPS], high[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        low[g] = q4_0_low(w[g]);
        high[g] = q4_0_high(w[g]);
    }
    for (int t = 0; t < T; t++) {
        __m512i p[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            p[g] = q4_0_integers(_mm512_setzero_si512(), low[g], high[g], x[t]->low[g], x[t]->high[g]);
        }
        const __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
        const __m512i v = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
        const __m512i sums = _mm512_add_epi32(_mm512_unpacklo_epi64(u, v), _mm512_unpackhi_epi64(u, v));
        const __m512i whole = _mm512_add_epi32(sums, _mm512_load_si512(x[t]->start));
        acc[t] = fma(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(d, _mm512_load_ps(x[t]->d)), acc[t]);
    }
}

// The same of one group; every lane of 16 bytes has its own scale.
template <int T> __attribute__((always_inline)) inline void q4_0_dot(const q4_0_group & w, const q4_0_x<1> * const * x, vec * acc) {
    const __m512i scale_words = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 27, 27, 27, 27, 18, 18, 18, 18, 9, 9, 9, 9, 0, 0, 0, 0);
    const __m512i low = q4_0_low(w), high = q4_0_high(w);
    const vec d = _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutexvar_epi16(scale_words, w.first)));
    for (int t = 0; t < T; t++) {
        const __m512i p = q4_0_integers(_mm512_load_si512(x[t]->start), low, high, x[t]->low[0], x[t]->high[0]);
        acc[t] = fma(_mm512_cvtepi32_ps(p), _mm512_mul_ps(d, _mm512_load_ps(x[t]->d)), acc[t]);
    }
}

// The sums of four vectors, each with the additions of `sum`.
void four_sums(const vec * v, float * out) {
    const vec u = add(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    const vec w = add(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    const vec quarters = add(_mm512_shuffle_f32x4(u, w, 0x88), _mm512_shuffle_f32x4(u, w, 0xdd));
    const vec pairs = add(quarters, _mm512_permute_ps(quarters, 0x4e));
    const vec sums = add(pairs, _mm512_permute_ps(pairs, 0xb1));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(_mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0), sums)));
}

constexpr int64_t LONG = 6144;  // columns: the x of four tokens does not stay in L1, and two rows at once take it from L2

struct q4_0_products {
    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        if constexpr (T == 1) {
            return all<R, R, 1>(n, rows, next, xs, out);
        } else if constexpr (R % 2 == 0) {
            if (n > LONG) {
                return all<R, 2, T>(n, rows, next, xs, out);
            }
        }
        all<R, 1, T>(n, rows, next, xs, out);
    }

  private:
    template <int R, int TOGETHER, int T> static void all(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        vec acc[R][T];
        for (int k = 0; k < R; k += TOGETHER) {
            some<TOGETHER, T>(n, rows + k, next ? next + k : nullptr, xs, acc + k);
        }
        int i = 0;
        for (const vec * of = acc[0]; i + 4 <= R * T; i += 4) {
            four_sums(of + i, out + i);
        }
        for (const vec * of = acc[0]; i < R * T; i++) {
            out[i] = sum(of[i]);
        }
    }

    template <int R, int T> static void some(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, vec (*result)[T]) {
        vec acc[R][T];
        for (auto & row : acc) {
            for (vec & a : row) {
                a = zero();
            }
        }
        for (int64_t i = 0; i < n / WHOLE_COLUMNS; i++) {
            fetch<WHOLE_BYTES>(next, R, i * WHOLE_BYTES);
            const q4_0_x<GROUPS> * x[T];
            for (int t = 0; t < T; t++) {
                x[t] = q4_0_wholes(xs[t], i);
            }
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                const char * p = rows[k] + i * WHOLE_BYTES;
                const q4_0_group w[GROUPS] = {q4_0_group::whole(p), q4_0_group::whole(p + q4_0_group::BYTES), q4_0_group::whole(p + 2 * q4_0_group::BYTES), q4_0_group::whole(p + 3 * q4_0_group::BYTES)};
                q4_0_dot<T>(w, x, acc[k]);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < R; k++) {
            singles<T>(n, rows[k], xs, acc[k]);
            std::copy(acc[k], acc[k] + T, result[k]);
        }
    }

    template <int T> static void singles(int64_t n, const char * row, const void * const * xs, vec * acc) {
        int64_t i = 0;
        for (int64_t c = n / WHOLE_COLUMNS * WHOLE_COLUMNS; c < n; c += q4_0_group::COLUMNS, i++) {
            const char * p = row + c / BLOCK * sizeof(block_q4_0);
            const q4_0_x<1> * x[T];
            for (int t = 0; t < T; t++) {
                x[t] = q4_0_singles(xs[t], n, i);
            }
            const bool whole = c + q4_0_group::COLUMNS <= n;
            q4_0_dot<T>(whole ? q4_0_group::whole(p) : q4_0_group::part(p, static_cast<int>((n - c) / BLOCK)), x, acc);
        }
    }
};

template <> constexpr int TOKEN_ROWS<q4_0_products> = 4;

// Two rows of one group, ready to be added: the words of both alternate, and so do their coefficients a * scale,
// rounded to bfloat16 (a 4-bit weight is exact in it).
struct q4_0_pair {
    __m512i low, high;  // of the lanes: words 0 to 3 and 4 to 7 of each
    __m512bh c;

    q4_0_pair() = default;
    q4_0_pair(const q4_0_group & u, const q4_0_group & v, const float * a) {
        const __m512i scale_words = _mm512_set_epi16(59, 27, 59, 27, 59, 27, 59, 27, 50, 18, 50, 18, 50, 18, 50, 18, 41, 9, 41, 9, 41, 9, 41, 9, 32, 0, 32, 0, 32, 0, 32, 0);
        const __m512i d = _mm512_permutex2var_epi16(u.first, scale_words, v.first);
        int64_t two;
        std::memcpy(&two, a, sizeof(two));
        const vec both = _mm512_castsi512_ps(_mm512_set1_epi64(two));
        const vec first = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(d)), both);
        c = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(d, 1)), both), first);
        low = _mm512_unpacklo_epi16(u.quants, v.quants);
        high = _mm512_unpackhi_epi16(u.quants, v.quants);
    }
};

// Sums of one group: 2 s + h holds, in each lane, nibble s of words 4 h to 4 h + 3, that is columns 8 h + s / 2 + {0,
// 2, 4, 6}, + 16 where s is odd.
struct q4_0_sums {
    vec of[8];

    void add(const q4_0_pair & p) {
        // bfloat16 of -8 to 7, twice: the fifth bit of an index belongs to the next nibble.
        const __m512i weights = _mm512_set_epi16(0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00, 0x40e0,
                                                 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
        const __m512i words[8] = {p.low,
                                  p.high,
                                  _mm512_srli_epi16(p.low, 4),
                                  _mm512_srli_epi16(p.high, 4),
                                  _mm512_srli_epi16(p.low, 8),
                                  _mm512_srli_epi16(p.high, 8),
                                  _mm512_srli_epi16(p.low, 12),
                                  _mm512_srli_epi16(p.high, 12)};
        for (int j = 0; j < 8; j++) {
            of[j] = _mm512_dpbf16_ps(of[j], (__m512bh)_mm512_permutexvar_epi16(words[j], weights), p.c);
        }
    }
};

// One group of columns; get is (row) -> q4_0_group. The next pair is made ready while one is added: they do not wait
// for each other.
template <typename Get> void axpys_q4_0_group(int n_rows, const float * a, float * y, Get get) {
    q4_0_sums sums;
    for (vec & s : sums.of) {
        s = zero();
    }
    q4_0_pair now(get(0), get(1), a);
    for (int k = 2; k < n_rows; k += 2) {
        const q4_0_pair ahead(get(k), get(k + 1), a + k);
        sums.add(now);
        now = ahead;
    }
    sums.add(now);
    add_pass(sums.of, 8, y);
}

void axpys_q4_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    float even[AXPY_ROWS] = {};
    const char * w[AXPY_ROWS];
    std::memcpy(even, a, n_rows * sizeof(float));
    for (int k = 0; k < n_rows; k++) {
        w[k] = rows[k];
    }
    if (n_rows % 2) {
        w[n_rows] = w[n_rows - 1];  // times 0
    }
    const int64_t whole = n / q4_0_group::COLUMNS;
    const int rest = static_cast<int>(n % q4_0_group::COLUMNS / BLOCK);
    for (int64_t g = 0; g < whole; g++) {
        fetch<q4_0_group::BYTES>(next, n_rows, g * q4_0_group::BYTES);
        axpys_q4_0_group(n_rows, even, y + g * q4_0_group::COLUMNS, [&](int k) { return q4_0_group::whole(w[k] + g * q4_0_group::BYTES); });
    }
    if (rest) {
        axpys_q4_0_group(n_rows, even, y + whole * q4_0_group::COLUMNS, [&](int k) { return q4_0_group::part(w[k] + whole * q4_0_group::BYTES, rest); });
    }
}

void q4_0_finish(int64_t n, float * y) {
    for (int64_t g = 0; g < (n + q4_0_group::COLUMNS - 1) / q4_0_group::COLUMNS; g++) {
        alignas(64) float sums[8][16];
        float * out = y + g * q4_0_group::COLUMNS;
        std::memcpy(sums, out, sizeof(sums));
        for (int s = 0; s < 4; s++) {
            for (int h = 0; h < 2; h++) {
                for (int i = 0; i < 16; i++) {
                    out[i / 4 * BLOCK + s % 2 * 16 + 8 * h + s / 2 + 2 * (i % 4)] = sums[2 * s + h][i];
                }
            }
        }
    }
}

}  // namespace
