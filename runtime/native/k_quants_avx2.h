// q4_K and q6_K with AVX2: 32 weights at a time, eighth j of a block.
#pragma once

#include "k_quants.h"

namespace {

// Which bytes to take for one 16-bit number of eight in the lower 16 bytes, and one in the upper. From memory: gcc would put such constants together in the loop.
struct alignas(32) word_places {
    uint8_t at[32];

    constexpr word_places(int lower, int upper) : at{} {
        for (int i = 0; i < 32; i++) {
            at[i] = static_cast<uint8_t>(2 * (i < 16 ? lower : upper) + i % 2);
        }
    }
};
constexpr word_places SAME[8] = {{0, 0}, {1, 1}, {2, 2}, {3, 3}, {4, 4}, {5, 5}, {6, 6}, {7, 7}};
constexpr word_places NEIGHBOURS[4] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}};

__m256i words(__m256i eight_twice, const word_places & places) { return _mm256_shuffle_epi8(eight_twice, _mm256_load_si256(reinterpret_cast<const __m256i *>(places.at))); }

__m256i scaled_products(__m256i w, const int8_t * x, __m256i scale) { return _mm256_madd_epi16(_mm256_maddubs_epi16(w, _mm256_load_si256(reinterpret_cast<const __m256i *>(x))), scale); }

struct q4_K_rows {
    using block = block_q4_K;
    static constexpr int RUN = 32;  // weights of one scale

    static int place(int column) { return column; }
    static int stored(int column) { return column / 32 * 32 + column % 16 / 4 * 8 + column % 32 / 16 * 4 + column % 4; }

    static __m256i bytes(const block & b, int j) {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs + j / 2 * 32));
        return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(q, 4) : q, _mm256_set1_epi8(15));
    }

    // Eight scales, eight minima.
    static __m128i scales(const block & b) {
        const __m128i head = _mm_loadu_si128(reinterpret_cast<const __m128i *>(&b));  // d and dmin before them
        const __m128i lower = _mm_srlv_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1)), _mm_set_epi32(4, 0, 0, 0));
        const __m128i upper = _mm_srli_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(2, 2, 1, 1)), 2);
        return _mm_or_si128(_mm_and_si128(lower, _mm_set1_epi64x(0x0f0f0f0f3f3f3f3f)), _mm_and_si128(upper, _mm_set1_epi64x(0x3030303000000000)));
    }

    static vec dot(const block & b, const k_x & x, vec acc) {
        const __m256i both = _mm256_cvtepu8_epi16(scales(b)), scale = _mm256_permute2x128_si256(both, both, 0x00);
        __m256i p = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            p = _mm256_add_epi32(p, scaled_products(bytes(b, j), x.q + 32 * j, words(scale, SAME[j])));
        }
        const __m128i minus = _mm_madd_epi16(_mm256_extracti128_si256(both, 1), _mm_load_si128(reinterpret_cast<const __m128i *>(x.sums)));
        acc = fma(_mm256_cvtepi32_ps(p), all(f16(b.d) * x.d), acc);
        return _mm256_fnmadd_ps(_mm256_cvtepi32_ps(_mm256_zextsi128_si256(minus)), all(f16(b.dmin) * x.d), acc);
    }

    // For each run of 16: the coefficient, and what it adds to every weight. Products are c (w + 128).
    static void coefficients(const block & b, float a, float * c, float * off) {
        const __m128i both = scales(b);
        const vec scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both)), all(a * f16(b.d)));
        const vec least = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8))), all(a * f16(b.dmin)));
        const vec minus = fma(scale, all(128.0f), least);
        const twice cs(scale), minuses(minus);
        store(c, cs.low);
        store(c + 8, cs.high);
        store(off, _mm256_sub_ps(load(off), minuses.low));
        store(off + 8, _mm256_sub_ps(load(off + 8), minuses.high));
    }

  private:
    // Every number of a vector twice in a row.
    struct twice {
        vec low, high;

        explicit twice(vec v) {
            const vec even = _mm256_unpacklo_ps(v, v), odd = _mm256_unpackhi_ps(v, v);
            low = _mm256_permute2f128_ps(even, odd, 0x20);
            high = _mm256_permute2f128_ps(even, odd, 0x31);
        }
    };
};

struct q6_K_rows {
    using block = block_q6_K;
    static constexpr int RUN = 16;

    static int place(int column) { return column; }
    static int stored(int column) { return column / 32 * 32 + column % 16 / 4 * 8 + column % 32 / 16 * 4 + column % 4; }

    static __m256i bytes(const block & b, int j) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.ql + j / 4 * 64 + j % 2 * 32));
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh + j / 4 * 32));
        const __m256i nibbles = _mm256_and_si256(j % 4 < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(15));
        const __m256i shifted = j % 4 < 2 ? _mm256_slli_epi16(pairs, 4 - j % 4 * 2) : _mm256_srli_epi16(pairs, j % 4 * 2 - 4);
        return _mm256_or_si256(nibbles, _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)));
    }
    static __m256i scales(const block & b) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b.scales))); }

    static vec dot(const block & b, const k_x & x, vec acc) {
        const __m256i scale = scales(b), halves[2] = {_mm256_permute2x128_si256(scale, scale, 0x00), _mm256_permute2x128_si256(scale, scale, 0x11)};
        __m256i p = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            p = _mm256_add_epi32(p, scaled_products(bytes(b, j), x.q + 32 * j, words(halves[j / 4], NEIGHBOURS[j % 4])));
        }
        const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(scale, _mm256_load_si256(reinterpret_cast<const __m256i *>(x.sums))), 5);
        return fma(_mm256_cvtepi32_ps(_mm256_sub_epi32(p, offset)), all(f16(b.d) * x.d), acc);
    }

    static void coefficients(const block & b, float a, float * c, float * off) {
        for (int half = 0; half < 2; half++) {
            const vec scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(b.scales + 8 * half)))), all(a * f16(b.d)));
            store(c + 8 * half, scale);
            store(off + 8 * half, _mm256_fnmadd_ps(scale, all(160.0f), load(off + 8 * half)));
        }
    }
};

// Sixteen columns of one run in each half.
vec two_runs(const float * c) { return _mm256_set_m128(_mm_broadcast_ss(c + 1), _mm_broadcast_ss(c)); }

// 32 columns: the upper half of a float w + 128 is the byte w under the byte 0x43. Within 32 columns sums are kept by fours: 0 to 3 and 16 to 19, and so on.
template <typename Rows> void add_eighth(const typename Rows::block & b, int j, const float * c, vec * sums) {
    const __m256i w = Rows::bytes(b, j), above = _mm256_set1_epi8(0x43), none = _mm256_setzero_si256();
    const __m256i low = _mm256_unpacklo_epi8(w, above), high = _mm256_unpackhi_epi8(w, above);
    const vec factor = two_runs(c + 2 * j);
    sums[0] = fma(_mm256_castsi256_ps(_mm256_unpacklo_epi16(none, low)), factor, sums[0]);
    sums[1] = fma(_mm256_castsi256_ps(_mm256_unpackhi_epi16(none, low)), factor, sums[1]);
    sums[2] = fma(_mm256_castsi256_ps(_mm256_unpacklo_epi16(none, high)), factor, sums[2]);
    sums[3] = fma(_mm256_castsi256_ps(_mm256_unpackhi_epi16(none, high)), factor, sums[3]);
}

template <typename Rows, int j> void add_quarter(int n_rows, const typename Rows::block * const * w, const float (*c)[16], const float * off, float * y) {
    vec sums[8];
    for (int s = 0; s < 8; s++) {
        sums[s] = _mm256_add_ps(load(y + 32 * j + s * WIDTH), two_runs(off + 2 * (j + s / 4)));
    }
    for (int k = 0; k < n_rows; k++) {
        add_eighth<Rows>(*w[k], j, c[k], sums);
        add_eighth<Rows>(*w[k], j + 1, c[k], sums + 4);
    }
    for (int s = 0; s < 8; s++) {
        store(y + 32 * j + s * WIDTH, sums[s]);
    }
}

template <typename Rows> void axpys_k(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        const block * w[AXPY_ROWS];
        float c[AXPY_ROWS][16], off[16] = {};
        for (int k = 0; k < n_rows; k++) {
            w[k] = reinterpret_cast<const block *>(rows[k]) + i;
            Rows::coefficients(*w[k], a[k], c[k], off);
        }
        float * out = y + i * K_COLUMNS;
        add_quarter<Rows, 0>(n_rows, w, c, off, out);
        add_quarter<Rows, 2>(n_rows, w, c, off, out);
        add_quarter<Rows, 4>(n_rows, w, c, off, out);
        add_quarter<Rows, 6>(n_rows, w, c, off, out);
    }
}

}  // namespace
