// q4_K, q5_K and q6_K with AVX2, or AVX-VNNI: 32 weights at a time, eighth j of a block.
#pragma once

#include "k_quants.h"
#include "integers_avx2.h"
#include "packed_avx2.h"

namespace {

// Which bytes of eight words, in both lanes of 16 bytes, are the scales of eighths j and k of a block: of j in the first
// four words of each lane, of k in the others. From memory: gcc would put such constants together in the loop.
struct alignas(32) scale_places {
    uint8_t at[32];

    // run: weights of one scale; an eighth of 32 has one of them, or one in each lane
    constexpr scale_places(int run, int j, int k) : at{} {
        for (int i = 0; i < 32; i++) {
            const int eighth = i % 16 < 8 ? j : k, scale = run == 32 ? eighth : 2 * eighth + i / 16;
            at[i] = static_cast<uint8_t>(2 * (scale % 8) + i % 2);
        }
    }
};

// Of eighths j and j + 1, for each of `whose`.
template <int RUN, int j> constexpr scale_places PLACES[3] = {{RUN, j, j + 1}, {RUN, j, j}, {RUN, j + 1, j + 1}};

// Adds what eighths j and j + 1 of a block give with each token. words: eight with their scales among them, twice.
template <typename Rows, int T, int j> void add_products(const typename Rows::block & b, const k_x * const * x, __m256i words, __m256i * p) {
    const auto scales = [=](whose of) { return _mm256_shuffle_epi8(words, _mm256_load_si256(reinterpret_cast<const __m256i *>(PLACES<Rows::RUN, j>[of].at))); };
    const scaled_products products = scaled_products::of(Rows::bytes(b, j), Rows::bytes(b, j + 1), scales);
    for (int t = 0; t < T; t++) {
        p[t] = products.add_to(p[t], x[t]->q + 32 * j);
    }
}

// p[t] = the block's scaled products with each token: below 2^28, as scales are at most 128. first, second: the words of
// each half of the block.
template <typename Rows, int T> void scaled_dots(const typename Rows::block & b, const k_x * const * x, __m256i first, __m256i second, __m256i * p) {
    for (int t = 0; t < T; t++) {
        p[t] = _mm256_setzero_si256();
    }
    add_products<Rows, T, 0>(b, x, first, p);
    add_products<Rows, T, 2>(b, x, first, p);
    add_products<Rows, T, 4>(b, x, second, p);
    add_products<Rows, T, 6>(b, x, second, p);
}

// What q4_K and q5_K share: eight scales and eight minima of 6 bits. Rows: the one or the other.
template <typename Rows, typename Block> struct rows_with_minima {
    using block = Block;
    static constexpr int RUN = 32;  // weights of one scale

    static int place(int column) { return column; }

    // Eight scales, eight minima.
    static __m128i scales(const block & b) {
        const __m128i head = _mm_loadu_si128(reinterpret_cast<const __m128i *>(&b));  // d and dmin before them
        const __m128i lower = _mm_srlv_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1)), _mm_set_epi32(4, 0, 0, 0));
        const __m128i upper = _mm_srli_epi32(_mm_shuffle_epi32(head, _MM_SHUFFLE(2, 2, 1, 1)), 2);
        return _mm_or_si128(_mm_and_si128(lower, _mm_set1_epi64x(0x0f0f0f0f3f3f3f3f)), _mm_and_si128(upper, _mm_set1_epi64x(0x3030303000000000)));
    }

    template <int T> static void dot(const block & b, const k_x * const * x, vec * acc) {
        const __m256i both = _mm256_cvtepu8_epi16(scales(b)), scale = _mm256_permute2x128_si256(both, both, 0x00);
        __m256i p[T];
        scaled_dots<Rows, T>(b, x, scale, scale, p);
        const __m128i least = _mm256_extracti128_si256(both, 1);
        for (int t = 0; t < T; t++) {
            const __m128i minus = _mm_madd_epi16(least, _mm_load_si128(reinterpret_cast<const __m128i *>(x[t]->sums)));
            acc[t] = fma(_mm256_cvtepi32_ps(p[t]), all(f16(b.d) * x[t]->d), acc[t]);
            acc[t] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(_mm256_zextsi128_si256(minus)), all(f16(b.dmin) * x[t]->d), acc[t]);
        }
    }

    // For each run: the coefficient, and what it adds to every weight.
    static void coefficients(const block & b, float a, float * c, vec * off) {
        const __m128i both = scales(b);
        store(c, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(both)), all(a * f16(b.d))));
        off[0] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8))), all(a * f16(b.dmin)), off[0]);
    }

  protected:
    static __m256i nibbles(const block & b, int j) {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs + j / 2 * 32));
        return _mm256_and_si256(j % 2 ? _mm256_srli_epi16(q, 4) : q, _mm256_set1_epi8(15));
    }
};

struct q4_K_rows : rows_with_minima<q4_K_rows, block_q4_K> {
    static __m256i bytes(const block & b, int j) { return nibbles(b, j); }

    // Quarter g: a run in the low nibbles, one in the high ones.
    static constexpr int BITS = 4;
    static void add(const block & b, int g, const float * c, vec * sums) {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs + 32 * g));
        const vec low = _mm256_broadcast_ss(c + 2 * g), high = _mm256_broadcast_ss(c + 2 * g + 1);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            sums[j] = fma(packed<4>::weights(q, j), j % 2 ? high : low, sums[j]);
        }
    }
    static int unit(int j) { return j; }
    static vec offset(const float * off, int g, int j) { return _mm256_broadcast_ss(off + 2 * g + j % 2); }
    static void finish(const vec * sums, float * y) {
        store_words<4>(sums, 0, y, y + 16);
        store_words<4>(sums, 1, y + 32, y + 48);
    }
};

// Two vectors of 32 bytes, a weight in each byte.
struct sums_of_bytes {
    // A coefficient in each lane.
    static vec two_runs(const float * c) {
        double both;
        std::memcpy(&both, c, sizeof(both));
        return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
    }
    static constexpr int BITS = 8;
    static int unit(int j) { return j % 4; }
    static void add_bytes_times(__m256i w, vec factor, vec * sums) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sums[j] = fma(packed<8>::weights(w, j), factor, sums[j]);
        }
    }
    static void finish(const vec * sums, float * y) {
        store_words<8>(sums, 0, y, y + 16);
        store_words<8>(sums + 4, 0, y + 32, y + 48);
    }
};

struct q5_K_rows : rows_with_minima<q5_K_rows, block_q5_K>, sums_of_bytes {
    static __m256i bytes(const block & b, int j) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh));
        const __m256i fifth = j < 4 ? _mm256_slli_epi16(bits, 4 - j) : _mm256_srli_epi16(bits, j - 4);
        return _mm256_or_si256(nibbles(b, j), _mm256_and_si256(fifth, _mm256_set1_epi8(16)));
    }

    // Quarter g: two runs.
    static void add(const block & b, int g, const float * c, vec * sums) {
        for (int e = 0; e < 2; e++) {
            add_bytes_times(bytes(b, 2 * g + e), _mm256_broadcast_ss(c + 2 * g + e), sums + 4 * e);
        }
    }
    static vec offset(const float * off, int g, int j) { return _mm256_broadcast_ss(off + 2 * g + j / 4); }
};

struct q6_K_rows : sums_of_bytes {
    using block = block_q6_K;
    static constexpr int RUN = 16;

    static int place(int column) { return column; }

    static __m256i bytes(const block & b, int j) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.ql + j / 4 * 64 + j % 2 * 32));
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh + j / 4 * 32));
        const __m256i nibbles = _mm256_and_si256(j % 4 < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(15));
        const __m256i shifted = j % 4 < 2 ? _mm256_slli_epi16(pairs, 4 - j % 4 * 2) : _mm256_srli_epi16(pairs, j % 4 * 2 - 4);
        return _mm256_or_si256(nibbles, _mm256_and_si256(shifted, _mm256_set1_epi8(0x30)));
    }
    static __m256i scales(const block & b) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b.scales))); }

    template <int T> static void dot(const block & b, const k_x * const * x, vec * acc) {
        const __m256i scale = scales(b);
        __m256i p[T];
        scaled_dots<q6_K_rows, T>(b, x, _mm256_permute2x128_si256(scale, scale, 0x00), _mm256_permute2x128_si256(scale, scale, 0x11), p);
        for (int t = 0; t < T; t++) {
            const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(scale, _mm256_load_si256(reinterpret_cast<const __m256i *>(x[t]->sums))), 5);
            acc[t] = fma(_mm256_cvtepi32_ps(_mm256_sub_epi32(p[t], offset)), all(f16(b.d) * x[t]->d), acc[t]);
        }
    }

    static void coefficients(const block & b, float a, float * c, vec * off) {
        for (int half = 0; half < 2; half++) {
            const vec scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(b.scales + 8 * half)))), all(a * f16(b.d)));
            store(c + 8 * half, scale);
            off[half] = _mm256_fnmadd_ps(scale, all(32.0f), off[half]);
        }
    }

    // Quarter g: twice 32 columns, a run in each half.
    static void add(const block & b, int g, const float * c, vec * sums) {
        for (int e = 0; e < 2; e++) {
            add_bytes_times(bytes(b, 2 * g + e), two_runs(c + 4 * g + 2 * e), sums + 4 * e);
        }
    }
    static vec offset(const float * off, int g, int j) { return two_runs(off + 4 * g + j / 4 * 2); }
};

template <typename Rows, int g> void add_quarter(int n_rows, const typename Rows::block * const * w, const float (*c)[16], const float * off, float * y) {
    vec sums[8];
    for (vec & s : sums) {
        s = zero();
    }
    for (int k = 0; k < n_rows; k++) {
        Rows::add(*w[k], g, c[k], sums);
    }
    for (int j = 0; j < 8; j++) {
        sums[j] = add_offset<Rows::BITS>(sums[j], Rows::offset(off, g, j), Rows::unit(j));
    }
    add_pass(sums, 8, y + 64 * g);
}

template <typename Rows> void axpys_k(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        const block * w[AXPY_ROWS];
        float c[AXPY_ROWS][16], off[16];
        vec sums[2] = {zero(), zero()};
        for (int k = 0; k < n_rows; k++) {
            w[k] = reinterpret_cast<const block *>(rows[k]) + i;
            Rows::coefficients(*w[k], a[k], c[k], sums);
        }
        store(off, sums[0]);
        store(off + 8, sums[1]);
        float * out = y + i * K_COLUMNS;
        add_quarter<Rows, 0>(n_rows, w, c, off, out);
        add_quarter<Rows, 1>(n_rows, w, c, off, out);
        add_quarter<Rows, 2>(n_rows, w, c, off, out);
        add_quarter<Rows, 3>(n_rows, w, c, off, out);
    }
}

}  // namespace
