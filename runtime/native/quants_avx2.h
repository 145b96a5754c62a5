// Q8_0 and Q4_0 with AVX2: a block of 32 columns at a time, or two.
//
// Integer products follow ggml: 4-bit weights are unsigned with an offset of 8, so w . x = q . x - 8 sum(x), and the
// offset is folded into the sums' start.
#pragma once

#include "packed_avx2.h"

namespace {

__m256i load_bytes(const void * p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// four-by-four sums of unsigned times signed bytes; two products are added in 16 bits: for weights of 4 bits at most 2
// * 15 * 128
__m256i dot_bytes(__m256i u, __m256i s) { return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)); }

// --- Q8_0 ------------------------------------------------------------------------------------------------------------

// The signs of the weights go to x: bytes are multiplied unsigned by signed, and two products are added in 16 bits. x
// is at least -127, so that they stay below 2 * 128 * 127, and -128 has a size.
template <int R> void dots_q8_0(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    vec acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = zero();
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const __m256i xv = load_bytes(xs[i].qs);
        const float xd = f16(xs[i].d);
        fetch<sizeof(block_q8_0)>(next, R, i * sizeof(block_q8_0));
        for (int k = 0; k < R; k++) {
            const block_q8_0 & b = reinterpret_cast<const block_q8_0 *>(rows[k])[i];
            const __m256i w = load_bytes(b.qs), p = dot_bytes(_mm256_abs_epi8(w), _mm256_sign_epi8(xv, w));
            acc[k] = fma(_mm256_cvtepi32_ps(p), all(f16(b.d) * xd), acc[k]);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = sum(acc[k]);
    }
}

// --- Q4_0 ------------------------------------------------------------------------------------------------------------

struct alignas(32) q4_0_x {
    int8_t q[32];
    int32_t start[8];  // folds in the offset of 8
    float d[8];
};

size_t q4_0_arranged_size(int64_t n) { return (n / BLOCK * sizeof(q4_0_x) + 63) / 64 * 64; }

void q4_0_arrange(int64_t n, const void * x, void * out) {
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    q4_0_x * to = static_cast<q4_0_x *>(out);
    for (int64_t b = 0; b < n / BLOCK; b++) {
        const __m256i q = load_bytes(xs[b].qs);
        _mm256_store_si256(reinterpret_cast<__m256i *>(to[b].q), q);
        _mm256_store_si256(reinterpret_cast<__m256i *>(to[b].start), _mm256_sub_epi32(_mm256_setzero_si256(), dot_bytes(_mm256_set1_epi8(8), q)));
        store(to[b].d, all(f16(xs[b].d)));
    }
}

template <int R> void dots_q4_0(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    const q4_0_x * xs = static_cast<const q4_0_x *>(x);
    vec acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = zero();
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const __m256i xv = load_bytes(xs[i].q), start = load_bytes(xs[i].start);
        fetch<sizeof(block_q4_0)>(next, R, i * sizeof(block_q4_0));
        for (int k = 0; k < R; k++) {
            const block_q4_0 & b = reinterpret_cast<const block_q4_0 *>(rows[k])[i];
            const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.qs));
            const __m256i w = _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1), _mm256_set1_epi8(15));
            acc[k] = fma(_mm256_cvtepi32_ps(_mm256_add_epi32(start, dot_bytes(w, xv))), _mm256_mul_ps(all(f16(b.d)), load(xs[i].d)), acc[k]);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = sum(acc[k]);
    }
}

// Two blocks of rows side by side, a block's four words in each half; or one, in the lower half, and zeros.
template <bool two> struct q4_0_blocks {
    using nibbles = packed<4>;

    static __m256i quants(const block_q4_0 * b) {
        const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b[0].qs));
        return two ? _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i *>(b[two].qs)), first) : _mm256_zextsi128_si256(first);
    }
    static vec scales(const block_q4_0 * b) {
        const __m128i first = _mm_set1_epi16(static_cast<short>(b[0].d));
        return _mm256_cvtph_ps(two ? _mm_unpacklo_epi64(first, _mm_set1_epi16(static_cast<short>(b[two].d))) : _mm_move_epi64(first));
    }

    // 8 j + w of y holds nibble j of word w; the offset of 8 is taken off once for all rows.
    static void add(int n_rows, const char * const * rows, int64_t at, const float * a, float * y) {
        vec sums[nibbles::PER_WORD], total = zero();
        for (vec & s : sums) {
            s = zero();
        }
        for (int k = 0; k < n_rows; k++) {
            const block_q4_0 * b = reinterpret_cast<const block_q4_0 *>(rows[k] + at);
            const vec c = _mm256_mul_ps(scales(b), all(a[k]));
            const __m256i q = quants(b);
            total = _mm256_add_ps(total, c);
#pragma GCC unroll 8
            for (int j = 0; j < nibbles::PER_WORD; j++) {
                sums[j] = fma(nibbles::weights(q, j), c, sums[j]);
            }
        }
        const vec offset = _mm256_mul_ps(total, all(-8.0f));
        for (int j = 0; j < nibbles::PER_WORD; j++) {
            sums[j] = add_offset<4>(sums[j], offset, j);
        }
        add_pass(sums, nibbles::PER_WORD, y);
    }
};

constexpr int64_t Q4_0_COLUMNS = 2 * BLOCK, Q4_0_BYTES = 2 * sizeof(block_q4_0);

void axpys_q4_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    const int64_t whole = n / Q4_0_COLUMNS;
    for (int64_t g = 0; g < whole; g++) {
        fetch<Q4_0_BYTES>(next, n_rows, g * Q4_0_BYTES);
        q4_0_blocks<true>::add(n_rows, rows, g * Q4_0_BYTES, a, y + g * Q4_0_COLUMNS);
    }
    if (n % Q4_0_COLUMNS) {
        q4_0_blocks<false>::add(n_rows, rows, whole * Q4_0_BYTES, a, y + whole * Q4_0_COLUMNS);
    }
}

void q4_0_finish(int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += Q4_0_COLUMNS) {
        vec sums[8];
        for (int j = 0; j < 8; j++) {
            sums[j] = load(y + i + WIDTH * j);
        }
        store_words<4>(sums, 0, y + i, y + i + BLOCK);
        store_words<4>(sums, 1, y + i + BLOCK / 2, y + i + BLOCK + BLOCK / 2);
    }
}

}  // namespace
