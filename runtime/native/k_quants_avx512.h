// q4_K and q6_K with AVX-512 (VBMI, VNNI, BF16): 64 weights at a time, quarter g of a block.
#pragma once

#include "k_quants.h"

namespace {

// Products with x, times their scales. Four weights' products fit into 16 bits: two quarters of a half, g and g + 1, share each lane of 16 bytes of one vector.
// of: which of the scales' words belong to the first half; those of the second follow 4 or 8 later.
template <typename Rows> __m512i k_products(const typename Rows::block & b, const k_x & x, __m512i scales, __m512i of) {
    const __m512i none = _mm512_setzero_si512();
    const auto half = [&](int g) {
        const __m512i first = _mm512_dpbusd_epi32(none, Rows::bytes(b, g), _mm512_load_si512(x.q + 64 * g));
        return _mm512_packs_epi32(first, _mm512_dpbusd_epi32(none, Rows::bytes(b, g + 1), _mm512_load_si512(x.q + 64 * g + 64)));
    };
    const __m512i after = _mm512_add_epi16(of, _mm512_set1_epi16(128 / Rows::RUN));
    const __m512i p = _mm512_madd_epi16(half(0), _mm512_permutexvar_epi16(of, scales));
    return _mm512_dpwssd_epi32(p, half(2), _mm512_permutexvar_epi16(after, scales));
}

struct q4_K_rows {
    using block = block_q4_K;
    static constexpr int RUN = 32;  // weights of one scale

    static int place(int column) { return column / 128 * 128 + column % 64 / 32 * 64 + column % 128 / 64 * 32 + column % 32; }
    static int stored(int column) {
        const int at = place(column);
        return at / 64 * 64 + at % 16 / 4 * 16 + at % 64 / 16 * 4 + at % 4;
    }

    static __m512i bytes(const block & b, int g) {
        const __m512i q = _mm512_loadu_si512(b.qs + g / 2 * 64);
        return _mm512_and_si512(g % 2 ? _mm512_srli_epi16(q, 4) : q, _mm512_set1_epi8(15));
    }

    // The block's first 16 bytes -> eight scales, eight minima. The first four of either are the low 6 bits of a byte; of the others 4 bits lie together and 2 above one of the first.
    static __m128i scales(__m128i head) {
        const __m128i low = _mm_set_epi8(60, 52, 44, 36, 24, 16, 8, 0, 56, 48, 40, 32, 24, 16, 8, 0);
        const __m128i high = _mm_set_epi8(26, 18, 10, 2, 0, 0, 0, 0, 26, 18, 10, 2, 0, 0, 0, 0);
        const __m128i bits = _mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1));
        const __m128i upper = _mm_and_si128(_mm_multishift_epi64_epi8(high, bits), _mm_set1_epi64x(0x3030303000000000));
        return _mm_or_si128(_mm_and_si128(_mm_multishift_epi64_epi8(low, bits), _mm_set1_epi64x(0x0f0f0f0f3f3f3f3f)), upper);
    }
    static __m128i head(const block & b) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(&b)); }

    static vec dot(const block & b, const k_x & x, vec acc) {
        const __m256i words = _mm256_cvtepu8_epi16(scales(head(b)));
        const __m512i of = _mm512_set_epi64(0x0003000300030003, 0x0002000200020002, 0x0003000300030003, 0x0002000200020002, 0x0001000100010001, 0, 0x0001000100010001, 0);
        const __m512i p = k_products<q4_K_rows>(b, x, _mm512_castsi256_si512(words), of);
        const __m128i least = _mm_madd_epi16(_mm256_extracti128_si256(words, 1), _mm_load_si128(reinterpret_cast<const __m128i *>(x.sums)));
        const __m128 d = _mm_mul_ps(_mm_cvtph_ps(head(b)), _mm_set1_ps(x.d));
        acc = fma(_mm512_cvtepi32_ps(p), _mm512_broadcastss_ps(d), acc);
        return _mm512_fnmadd_ps(_mm512_zextps128_ps512(_mm_cvtepi32_ps(least)), _mm512_broadcastss_ps(_mm_movehdup_ps(d)), acc);
    }

    // What is added to every weight of a run: with coefficients c in float and r as rounded, c w - m = r (w - 8) + 8 c - m, and the products are r (w + 128).
    struct offsets {
        vec rounded[4] = {zero(), zero(), zero(), zero()};
        vec exact = zero();  // of the first rows of each pair in the lower half

        vec of(int g) const {
            const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(exact), _mm512_extractf32x8_ps(exact, 1));
            const __m512i first = _mm512_set1_epi32(g / 2 * 4 + g % 2);
            const __m512i run = _mm512_mask_add_epi32(first, 0xff00, first, _mm512_set1_epi32(2));
            return _mm512_add_ps(rounded[g], _mm512_permutexvar_ps(run, _mm512_castps256_ps512(both)));
        }
    };

    // Coefficients of two rows for each quarter, in turn.
    static void coefficients(const block & u, const block & v, const float * a, __m512bh * out, offsets & off) {
        const __m128i first = head(u), second = head(v), su = scales(first), sv = scales(second);
        const __m128 d = _mm_mul_ps(_mm_cvtph_ps(_mm_unpacklo_epi32(first, second)), _mm_set_ps(a[1], a[1], a[0], a[0]));
        const __m512i lower = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
        const vec scale = _mm512_permutexvar_ps(lower, _mm512_castps128_ps512(d));
        const vec least = _mm512_permutexvar_ps(_mm512_add_epi32(lower, _mm512_set1_epi32(1)), _mm512_castps128_ps512(d));
        const vec c = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi64(su, sv))));
        off.exact = fma(c, all(8.0f), off.exact);
        off.exact = _mm512_fnmadd_ps(least, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi64(su, sv))), off.exact);
        const __m512i words = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(c));
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
            const __m512i run = _mm512_set1_epi32((g / 2 * 4 + g % 2) | (g / 2 * 4 + g % 2 + 8) << 16);
            const __m512i pair = _mm512_mask_add_epi32(run, 0xff00, run, _mm512_set1_epi32(2 | 2 << 16));
            out[g] = (__m512bh)_mm512_permutexvar_epi16(pair, words);
            off.rounded[g] = _mm512_dpbf16_ps(off.rounded[g], out[g], (__m512bh)_mm512_set1_epi16(static_cast<short>(0xc308)));  // -136
        }
    }
};

struct q6_K_rows {
    using block = block_q6_K;
    static constexpr int RUN = 16;

    static int place(int column) { return column; }
    static int stored(int column) { return column / 64 * 64 + column % 16 / 4 * 16 + column % 64 / 16 * 4 + column % 4; }

    static __m512i bytes(const block & b, int g) {
        const __m512i low = _mm512_loadu_si512(b.ql + g / 2 * 64);
        const __m512i pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh + g / 2 * 32)));
        // Bits 4 and 5 of a byte from its bits 0 and 1 (2 and 3 in the upper half), or from 4 and 5 (6 and 7).
        const __m512i bytewise = _mm512_set1_epi64(0x3830282018100800);
        const __m512i from = _mm512_mask_add_epi8(bytewise, 0xffffffff00000000, bytewise, _mm512_set1_epi8(2));
        const __m512i shifts = g % 2 ? from : _mm512_sub_epi8(from, _mm512_set1_epi8(4));
        const __m512i high = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, pairs), _mm512_set1_epi8(0x30));
        return _mm512_ternarylogic_epi64(g % 2 ? _mm512_srli_epi16(low, 4) : low, _mm512_set1_epi8(15), high, 0xea);  // a & b | c
    }
    static __m128i scales(const block & b) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.scales)); }

    static vec dot(const block & b, const k_x & x, vec acc) {
        const __m256i words = _mm256_cvtepi8_epi16(scales(b));
        const __m512i of = _mm512_set_epi64(0x0007000700070007, 0x0003000300030003, 0x0006000600060006, 0x0002000200020002, 0x0005000500050005, 0x0001000100010001, 0x0004000400040004, 0);
        __m512i p = k_products<q6_K_rows>(b, x, _mm512_castsi256_si512(words), of);
        const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(words, _mm256_load_si256(reinterpret_cast<const __m256i *>(x.sums))), 5);
        p = _mm512_sub_epi32(p, _mm512_zextsi256_si512(offset));
        return fma(_mm512_cvtepi32_ps(p), all(f16(b.d) * x.d), acc);
    }

    struct offsets {
        vec rounded[4] = {zero(), zero(), zero(), zero()};

        vec of(int g) const { return rounded[g]; }
    };

    static void coefficients(const block & u, const block & v, const float * a, __m512bh * out, offsets & off) {
        const vec cu = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales(u))), all(a[0] * f16(u.d)));
        const vec cv = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales(v))), all(a[1] * f16(v.d)));
        const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(cv, cu);
        const __m512i first = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(0x00010001)));
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
            out[g] = (__m512bh)_mm512_permutexvar_epi16(_mm512_add_epi32(first, _mm512_set1_epi32(4 * g * 0x00010001)), words);
            off.rounded[g] = _mm512_dpbf16_ps(off.rounded[g], out[g], (__m512bh)_mm512_set1_epi16(static_cast<short>(0xc320)));  // -160
        }
    }
};

// Half a block of columns, two rows at a time: bfloat16 of a weight w below 128 is the byte w under the byte 0x43, plus 128.
template <typename Rows, int first> void add_half(int n_pairs, const typename Rows::block * const * w, const __m512bh (*c)[4], float * y, const vec * offsets) {
    const __m512i above = _mm512_set1_epi8(0x43);
    vec sums[8];
    for (int j = 0; j < 8; j++) {
        sums[j] = _mm512_add_ps(load(y + j * WIDTH), offsets[j / 4]);
    }
    for (int k = 0; k < n_pairs; k++) {
        for (int g = 0; g < 2; g++) {
            const __m512i u = Rows::bytes(*w[2 * k], first + g), v = Rows::bytes(*w[2 * k + 1], first + g);
            const __m512i low = _mm512_unpacklo_epi8(u, v), high = _mm512_unpackhi_epi8(u, v);
            vec * s = sums + 4 * g;
            s[0] = _mm512_dpbf16_ps(s[0], (__m512bh)_mm512_unpacklo_epi8(low, above), c[k][first + g]);
            s[1] = _mm512_dpbf16_ps(s[1], (__m512bh)_mm512_unpackhi_epi8(low, above), c[k][first + g]);
            s[2] = _mm512_dpbf16_ps(s[2], (__m512bh)_mm512_unpacklo_epi8(high, above), c[k][first + g]);
            s[3] = _mm512_dpbf16_ps(s[3], (__m512bh)_mm512_unpackhi_epi8(high, above), c[k][first + g]);
        }
    }
    for (int j = 0; j < 8; j++) {
        store(y + j * WIDTH, sums[j]);
    }
}

template <typename Rows> void axpys_k(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    const int n_pairs = (n_rows + 1) / 2;
    float even[AXPY_ROWS] = {};
    std::memcpy(even, a, n_rows * sizeof(float));
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        const block * w[AXPY_ROWS];
        __m512bh c[AXPY_ROWS / 2][4];
        typename Rows::offsets off;
        for (int k = 0; k < 2 * n_pairs; k++) {
            w[k] = reinterpret_cast<const block *>(rows[k < n_rows ? k : n_rows - 1]) + i;  // an odd one is its own partner, times 0
        }
        for (int k = 0; k < n_pairs; k++) {
            Rows::coefficients(*w[2 * k], *w[2 * k + 1], even + 2 * k, c[k], off);
        }
        const vec offsets[4] = {off.of(0), off.of(1), off.of(2), off.of(3)};
        add_half<Rows, 0>(n_pairs, w, c, y + i * K_COLUMNS, offsets);
        add_half<Rows, 2>(n_pairs, w, c, y + i * K_COLUMNS + K_COLUMNS / 2, offsets + 2);
    }
}

}  // namespace
