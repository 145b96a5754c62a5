// Q8_0 and Q4_0 with AVX2: one block of 32 columns at a time.
//
// Integer products follow ggml: 4-bit weights are unsigned with an offset of 8, so w . x = q . x - 8 sum(x), and the offset is folded into the sums' start.
#pragma once

#include "x86.h"

namespace {

__m256i load_bytes(const void * p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

// four-by-four sums of unsigned times signed bytes
__m256i dot_bytes(__m256i u, __m256i s) { return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)); }

// --- Q8_0 ------------------------------------------------------------------------------------------------------------

// The sign of x goes to the weights: sums of two products of full bytes would overflow 16 bits.
template <int R> void dots_q8_0(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    vec acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = zero();
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const __m256i xv = load_bytes(xs[i].qs), size = _mm256_abs_epi8(xv);
        const float xd = f16(xs[i].d);
        fetch<sizeof(block_q8_0)>(next, R, i * sizeof(block_q8_0));
        for (int k = 0; k < R; k++) {
            const block_q8_0 & b = reinterpret_cast<const block_q8_0 *>(rows[k])[i];
            const __m256i p = dot_bytes(size, _mm256_sign_epi8(load_bytes(b.qs), xv));
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

// The coefficients a[k] * scale of one block, rounded to 16 bits of the largest among them.
struct q4_0_coefficients {
    alignas(32) int16_t of[AXPY_ROWS];
    float unit;
    int32_t start;  // folds in the offset of 8

    q4_0_coefficients(const block_q4_0 * const * w, int64_t i, const float * a) {
        const vec c[2] = {_mm256_mul_ps(scales(w, i), load(a)), _mm256_mul_ps(scales(w + 8, i), load(a + 8))};
        const vec sign = all(-0.0f);
        vec most = _mm256_max_ps(_mm256_andnot_ps(sign, c[0]), _mm256_andnot_ps(sign, c[1]));
        most = _mm256_max_ps(most, _mm256_permute2f128_ps(most, most, 1));
        most = _mm256_max_ps(most, _mm256_permute_ps(most, 0x4e));
        most = _mm256_max_ps(most, _mm256_permute_ps(most, 0xb1));
        const float largest = _mm256_cvtss_f32(most);
        unit = largest / 32767.0f;
        const vec per_unit = all(largest > 0.0f ? 32767.0f / largest : 0.0f);
        const __m256i rounded = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(c[0], per_unit)), _mm256_cvtps_epi32(_mm256_mul_ps(c[1], per_unit)));
        // packs works within halves of 128 bits: put the quarters in order.
        _mm256_store_si256(reinterpret_cast<__m256i *>(of), _mm256_permute4x64_epi64(rounded, 0xd8));
        __m256i total = _mm256_madd_epi16(rounded, _mm256_set1_epi16(-8));
        total = _mm256_hadd_epi32(total, total);
        total = _mm256_hadd_epi32(total, total);
        start = _mm256_extract_epi32(total, 0) + _mm256_extract_epi32(total, 4);
    }

    __m256i pair(int k) const {
        int32_t two;
        std::memcpy(&two, of + k, sizeof(two));
        return _mm256_set1_epi32(two);
    }

  private:
    static vec scales(const block_q4_0 * const * w, int64_t i) {
        return _mm256_cvtph_ps(_mm_set_epi16(w[7][i].d, w[6][i].d, w[5][i].d, w[4][i].d, w[3][i].d, w[2][i].d, w[1][i].d, w[0][i].d));
    }
};

// Two rows at a time: their words alternate, and one instruction multiplies a nibble of each with the two coefficients.
// y is kept by nibbles: 8 s + w holds nibble s of word w of a block, that is column 2 w + s / 2, + 16 where s is odd.
void axpys_q4_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    alignas(32) float padded[AXPY_ROWS] = {};
    const block_q4_0 * w[AXPY_ROWS];
    for (int k = 0; k < AXPY_ROWS; k++) {
        w[k] = reinterpret_cast<const block_q4_0 *>(rows[k < n_rows ? k : 0]);
        padded[k] = k < n_rows ? a[k] : 0.0f;
    }
    const __m256i nibble = _mm256_set1_epi16(15);
    for (int64_t i = 0; i < n / BLOCK; i++) {
        fetch<sizeof(block_q4_0)>(next, n_rows, i * sizeof(block_q4_0));
        const q4_0_coefficients c(w, i, padded);
        __m256i sums[4];
        for (int s = 0; s < 4; s++) {
            sums[s] = _mm256_set1_epi32(c.start);
        }
        for (int k = 0; k < n_rows; k += 2) {
            const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i *>(w[k][i].qs)), v = _mm_loadu_si128(reinterpret_cast<const __m128i *>(w[k + 1][i].qs));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(u, v)), _mm_unpackhi_epi16(u, v), 1), two = c.pair(k);
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_and_si256(both, nibble), two));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 4), nibble), two));
            sums[2] = _mm256_add_epi32(sums[2], _mm256_madd_epi16(_mm256_and_si256(_mm256_srli_epi16(both, 8), nibble), two));
            sums[3] = _mm256_add_epi32(sums[3], _mm256_madd_epi16(_mm256_srli_epi16(both, 12), two));
        }
        for (int s = 0; s < 4; s++) {
            float * out = y + i * BLOCK + 8 * s;
            store(out, fma(_mm256_cvtepi32_ps(sums[s]), all(c.unit), load(out)));
        }
    }
}

void q4_0_finish(int64_t n, float * y) {
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float sums[BLOCK], * out = y + i * BLOCK;
        std::memcpy(sums, out, sizeof(sums));
        for (int s = 0; s < 4; s++) {
            for (int w = 0; w < 8; w++) {
                out[s % 2 * 16 + s / 2 + 2 * w] = sums[8 * s + w];
            }
        }
    }
}

}  // namespace
