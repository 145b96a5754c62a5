// Products of whole numbers, 256 bits at a time: all that AVX2 and AVX-VNNI do differently. AVX-VNNI multiplies bytes,
// unsigned by signed, and adds four products in 32 bits; AVX2 adds two in 16 bits, which must not overflow. With AVX-512
// the same instructions have another encoding.
#pragma once

#include "x86.h"

namespace {

__m256i load_x(const int8_t * x) { return _mm256_load_si256(reinterpret_cast<const __m256i *>(x)); }

// Whose scales to put side by side: of two vectors of weights both, or those of one alone.
enum whose { BOTH, FIRST, SECOND };

#if defined(__AVXVNNI__) || defined(__AVX512VNNI__)
#if defined(__AVXVNNI__)
__m256i add_bytes(__m256i sums, __m256i w, const int8_t * x) { return _mm256_dpbusd_avx_epi32(sums, w, load_x(x)); }
__m256i add_words(__m256i sums, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(sums, a, b); }
#else
__m256i add_bytes(__m256i sums, __m256i w, const int8_t * x) { return _mm256_dpbusd_epi32(sums, w, load_x(x)); }
__m256i add_words(__m256i sums, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sums, a, b); }
#endif

// Four-by-four sums of two vectors of weights times x; small: weights of 0 to 31.
__m256i small_products(__m256i w, const int8_t * x, __m256i v, const int8_t * y) {
    return add_bytes(add_bytes(_mm256_setzero_si256(), w, x), v, y);
}

// The same of signed weights, plus OFFSET * x.
struct signed_products {
    static constexpr float OFFSET = 128.0f;
    static __m256i weights(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(static_cast<char>(0x80))); }
    static __m256i of(__m256i w, const int8_t * x, __m256i v, const int8_t * y) { return small_products(w, x, v, y); }
};

// Two vectors of weights of 0 to 63, to be multiplied with 64 bytes of x and with their scales. scales(whose): words; BOTH:
// in each lane of 16 bytes four of w and four of v.
struct scaled_products {
    __m256i w, v, scales;

    template <typename Scales> static scaled_products of(__m256i w, __m256i v, Scales scales) { return {w, v, scales(BOTH)}; }

    // Four products fit into 16 bits: at most 4 * 63 * 128.
    __m256i add_to(__m256i sums, const int8_t * x) const {
        const __m256i none = _mm256_setzero_si256();
        const __m256i products = _mm256_packs_epi32(add_bytes(none, w, x), add_bytes(none, v, x + 32));
        return add_words(sums, products, scales);
    }
};
#else
__m256i add_words(__m256i sums, __m256i a, __m256i b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

// Four products are added in 16 bits: at most 4 * 31 * 127.
__m256i small_products(__m256i w, const int8_t * x, __m256i v, const int8_t * y) {
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w, load_x(x)), _mm256_maddubs_epi16(v, load_x(y)));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

struct signed_products {
    static constexpr float OFFSET = 0.0f;
    static __m256i weights(__m256i w) { return w; }
    static __m256i of(__m256i w, const int8_t * x, __m256i v, const int8_t * y) {
        const __m256i ones = _mm256_set1_epi16(1);
        return _mm256_add_epi32(_mm256_madd_epi16(pairs(w, x), ones), _mm256_madd_epi16(pairs(v, y), ones));
    }

  private:
    // The signs of the weights go to x, which is at least -127: so -128 has a size, and two products stay below 2 * 128 *
    // 127.
    static __m256i pairs(__m256i w, const int8_t * x) { return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(load_x(x), w)); }
};

struct scaled_products {
    __m256i w, v, scales_w, scales_v;

    template <typename Scales> static scaled_products of(__m256i w, __m256i v, Scales scales) { return {w, v, scales(FIRST), scales(SECOND)}; }

    // Two products stay below 2 * 63 * 128 in 16 bits.
    __m256i add_to(__m256i sums, const int8_t * x) const {
        sums = add_words(sums, _mm256_maddubs_epi16(w, load_x(x)), scales_w);
        return add_words(sums, _mm256_maddubs_epi16(v, load_x(x + 32)), scales_v);
    }
};
#endif

}  // namespace
