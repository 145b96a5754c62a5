// q4_K, q5_K and q6_K with AVX-512 (VBMI, VNNI, BF16): 64 weights at a time, quarter g of a block.
#pragma once

#include "k_quants.h"

namespace {

// 64 weights of quarter g: the nibbles of their bytes, low or high, below bits 4 and above of `upper`; a ? b : c.
__m512i with_upper_bits(__m512i bytes, int g, __m512i upper) {
    return _mm512_ternarylogic_epi64(_mm512_set1_epi8(15), g % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, upper, 0xca);
}

// Products with x, times their scales. Four weights' products fit into 16 bits, 4 * 63 * 128 < 2^15, and those of a
// block times their scales, at most 128, into 32: two quarters of a half, g and g + 1, share each lane of 16 bytes of
// one vector.
// of: which of the scales' words belong to the first half; those of the second follow 4 or 8 later.
template <typename Rows, int T> void k_products(const typename Rows::block & b, const k_x * const * x, __m512i scales, __m512i of, __m512i * p) {
    const __m512i after = _mm512_add_epi16(of, _mm512_set1_epi16(128 / Rows::RUN));
    const __m512i factors[2] = {_mm512_permutexvar_epi16(of, scales), _mm512_permutexvar_epi16(after, scales)};
    for (int h = 0; h < 2; h++) {
        const __m512i none = _mm512_setzero_si512(), w[2] = {Rows::bytes(b, 2 * h), Rows::bytes(b, 2 * h + 1)};
        for (int t = 0; t < T; t++) {
            const __m512i first = _mm512_dpbusd_epi32(none, w[0], _mm512_load_si512(x[t]->q + 128 * h));
            const __m512i half = _mm512_packs_epi32(first, _mm512_dpbusd_epi32(none, w[1], _mm512_load_si512(x[t]->q + 128 * h + 64)));
            p[t] = h ? _mm512_dpwssd_epi32(p[t], half, factors[1]) : _mm512_madd_epi16(half, factors[0]);
        }
    }
}

// bfloat16 of (the low four bits of each word) - 8. The fifth bit of an index belongs to the next nibble: the table
// says everything twice.
__m512bh bf16_nibbles(__m512i words) {
    const __m512i weights = _mm512_set_epi16(0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00, 0x40e0,
                                             0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0, -0x4080, -0x4000, -0x3fc0, -0x3f80, -0x3f60, -0x3f40, -0x3f20, -0x3f00);
    return (__m512bh)_mm512_permutexvar_epi16(words, weights);
}

// A whole number of at most 8 bits, exactly.
constexpr uint16_t bf16_of(int number) {
    const int size = number < 0 ? -number : number;
    int exponent = 0;
    while (size >> (exponent + 1)) {
        exponent++;
    }
    return static_cast<uint16_t>(size ? (number < 0) << 15 | (127 + exponent) << 7 | (size << 7 >> exponent & 127) : 0);
}

// bfloat16 of (the low six bits of each word) - 32.
struct alignas(64) less_32 {
    uint16_t of[64];

    constexpr less_32() : of{} {
        for (int w = 0; w < 64; w++) {
            of[w] = bf16_of(w - 32);
        }
    }
};
constexpr less_32 LESS_32;

__m512bh bf16_bytes(__m512i words) { return (__m512bh)_mm512_permutex2var_epi16(_mm512_load_si512(LESS_32.of), words, _mm512_load_si512(LESS_32.of + 32)); }

// What q4_K and q5_K share: the order of the columns, and eight scales and eight minima of 6 bits. Rows: the one or the
// other.
template <typename Rows, typename Block> struct rows_with_minima {
    using block = Block;
    static constexpr int RUN = 32;  // weights of one scale

    static int place(int column) { return column / 128 * 128 + column % 64 / 32 * 64 + column % 128 / 64 * 32 + column % 32; }

    // The block's first 16 bytes -> eight scales, eight minima. The first four of either are the low 6 bits of a byte;
    // of the others 4 bits lie together and 2 above one of the first.
    static __m128i scales(__m128i head) {
        const __m128i low = _mm_set_epi8(60, 52, 44, 36, 24, 16, 8, 0, 56, 48, 40, 32, 24, 16, 8, 0);
        const __m128i high = _mm_set_epi8(26, 18, 10, 2, 0, 0, 0, 0, 26, 18, 10, 2, 0, 0, 0, 0);
        const __m128i bits = _mm_shuffle_epi32(head, _MM_SHUFFLE(3, 2, 3, 1));
        const __m128i upper = _mm_and_si128(_mm_multishift_epi64_epi8(high, bits), _mm_set1_epi64x(0x3030303000000000));
        return _mm_or_si128(_mm_and_si128(_mm_multishift_epi64_epi8(low, bits), _mm_set1_epi64x(0x0f0f0f0f3f3f3f3f)), upper);
    }
    static __m128i head(const block & b) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(&b)); }

    template <int T> static void dot(const block & b, const k_x * const * x, vec * acc) {
        const __m256i words = _mm256_cvtepu8_epi16(scales(head(b)));
        const __m512i of = _mm512_set_epi64(0x0003000300030003, 0x0002000200020002, 0x0003000300030003, 0x0002000200020002, 0x0001000100010001, 0, 0x0001000100010001, 0);
        __m512i p[T];
        k_products<Rows, T>(b, x, _mm512_castsi256_si512(words), of, p);
        const __m128i minima = _mm256_extracti128_si256(words, 1);
        const __m128 scale = _mm_cvtph_ps(head(b));
        for (int t = 0; t < T; t++) {
            const __m128i least = _mm_madd_epi16(minima, _mm_load_si128(reinterpret_cast<const __m128i *>(x[t]->sums)));
            const __m128 d = _mm_mul_ps(scale, _mm_set1_ps(x[t]->d));
            acc[t] = fma(_mm512_cvtepi32_ps(p[t]), _mm512_broadcastss_ps(d), acc[t]);
            acc[t] = _mm512_fnmadd_ps(_mm512_zextps128_ps512(_mm_cvtepi32_ps(least)), _mm512_broadcastss_ps(_mm_movehdup_ps(d)), acc[t]);
        }
    }

    // What is added to every weight of a run: with coefficients c in float, r as rounded and h = Rows::MIDDLE, c w - m =
    // r (w - h) + h c - m, and the products are r (w - h).
    struct offsets {
        vec exact = zero();  // of the first rows of each pair in the lower half

        vec of(int g) const {
            const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(exact), _mm512_extractf32x8_ps(exact, 1));
            const __m512i first = _mm512_set1_epi32(g / 2 * 4 + g % 2);
            const __m512i run = _mm512_mask_add_epi32(first, 0xff00, first, _mm512_set1_epi32(2));
            return _mm512_permutexvar_ps(run, _mm512_castps256_ps512(both));
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
        off.exact = fma(c, all(Rows::MIDDLE), off.exact);
        off.exact = _mm512_fnmadd_ps(least, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi64(su, sv))), off.exact);
        const __m512i words = _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(c));
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
            const __m512i run = _mm512_set1_epi32((g / 2 * 4 + g % 2) | (g / 2 * 4 + g % 2 + 8) << 16);
            const __m512i pair = _mm512_mask_add_epi32(run, 0xff00, run, _mm512_set1_epi32(2 | 2 << 16));
            out[g] = (__m512bh)_mm512_permutexvar_epi16(pair, words);
        }
    }
};

struct q4_K_rows : rows_with_minima<q4_K_rows, block_q4_K> {
    static constexpr float MIDDLE = 8.0f;

    static __m512i bytes(const block & b, int g) {
        const __m512i q = _mm512_loadu_si512(b.qs + g / 2 * 64);
        return _mm512_and_si512(g % 2 ? _mm512_srli_epi16(q, 4) : q, _mm512_set1_epi8(15));
    }

    // Half h of two rows: a word's nibbles are of two runs in turn. 2 s + i of the sums holds nibble s of words 4 i to
    // 4 i + 3 of each lane.
    static void add(const block & u, const block & v, int h, const __m512bh * c, vec * sums) {
        const __m512i qu = _mm512_loadu_si512(u.qs + 64 * h), qv = _mm512_loadu_si512(v.qs + 64 * h);
        const __m512i low = _mm512_unpacklo_epi16(qu, qv), high = _mm512_unpackhi_epi16(qu, qv);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            sums[2 * s] = _mm512_dpbf16_ps(sums[2 * s], bf16_nibbles(_mm512_srli_epi16(low, 4 * s)), c[2 * h + s % 2]);
            sums[2 * s + 1] = _mm512_dpbf16_ps(sums[2 * s + 1], bf16_nibbles(_mm512_srli_epi16(high, 4 * s)), c[2 * h + s % 2]);
        }
    }
    static void add_offsets(const offsets & off, int h, vec * sums) {
        const vec of[2] = {off.of(2 * h), off.of(2 * h + 1)};
        for (int j = 0; j < 8; j++) {
            sums[j] = _mm512_add_ps(sums[j], of[j / 2 % 2]);
        }
    }

    // Bytes in turn from the nibbles s and s + 2.
    static void finish(const vec * sums, float * y) {
        for (int s = 0; s < 2; s++) {
            for (int i = 0; i < 2; i++) {
                alignas(64) float by_four[2][16];
                store(by_four[0], _mm512_unpacklo_ps(sums[2 * s + i], sums[2 * s + 4 + i]));
                store(by_four[1], _mm512_unpackhi_ps(sums[2 * s + i], sums[2 * s + 4 + i]));
                for (int lane = 0; lane < 4; lane++) {
                    float * to = y + lane / 2 * 64 + s * 32 + lane % 2 * 16 + 8 * i;
                    std::memcpy(to, by_four[0] + 4 * lane, 16);
                    std::memcpy(to + 4, by_four[1] + 4 * lane, 16);
                }
            }
        }
    }
};

// Sums of two quarters of 64 bytes, a weight in each byte of two rows' words that alternate: 4 g + 2 o + i of the sums
// holds byte o of words 4 i to 4 i + 3 of each lane of quarter g.
struct sums_of_bytes {
    template <typename Weights> static void add_words(__m512i u, __m512i v, __m512bh c, Weights weights, vec * sums) {
        const __m512i words[2] = {_mm512_unpacklo_epi16(u, v), _mm512_unpackhi_epi16(u, v)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            sums[j] = _mm512_dpbf16_ps(sums[j], weights(j / 2 ? _mm512_srli_epi16(words[j % 2], 8) : words[j % 2]), c);
        }
    }

    // column(g, lane): the first of 16 in y.
    template <typename Column> static void in_order(const vec * sums, float * y, Column column) {
        for (int g = 0; g < 2; g++) {
            for (int i = 0; i < 2; i++) {
                alignas(64) float by_four[2][16];
                store(by_four[0], _mm512_unpacklo_ps(sums[4 * g + i], sums[4 * g + 2 + i]));
                store(by_four[1], _mm512_unpackhi_ps(sums[4 * g + i], sums[4 * g + 2 + i]));
                for (int lane = 0; lane < 4; lane++) {
                    std::memcpy(y + column(g, lane) + 8 * i, by_four[0] + 4 * lane, 16);
                    std::memcpy(y + column(g, lane) + 8 * i + 4, by_four[1] + 4 * lane, 16);
                }
            }
        }
    }
};

// bfloat16 of (the low five bits of each word) - 16.
struct alignas(64) less_16 {
    uint16_t of[32];

    constexpr less_16() : of{} {
        for (int w = 0; w < 32; w++) {
            of[w] = bf16_of(w - 16);
        }
    }
};
constexpr less_16 LESS_16;

struct q5_K_rows : rows_with_minima<q5_K_rows, block_q5_K>, sums_of_bytes {
    static constexpr float MIDDLE = 16.0f;

    // A weight in the low five bits of each byte, and others' bits above. Its fifth bit is bit g / 2 * 4 + g % 2 of a byte,
    // or two bits higher in the upper half.
    static __m512i five_bits(const block & b, int g) {
        const __m512i bits = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh)));
        const __m512i bytewise = _mm512_set1_epi64(0x3830282018100800);
        const __m512i from = _mm512_mask_add_epi8(bytewise, 0xffffffff00000000, bytewise, _mm512_set1_epi8(2));
        const int up = g / 2 * 4 + g % 2 - 4;
        return with_upper_bits(_mm512_loadu_si512(b.qs + g / 2 * 64), g, _mm512_multishift_epi64_epi8(_mm512_add_epi8(from, _mm512_set1_epi8(static_cast<char>(up))), bits));
    }
    static __m512i bytes(const block & b, int g) { return _mm512_and_si512(five_bits(b, g), _mm512_set1_epi8(31)); }

    static void add(const block & u, const block & v, int h, const __m512bh * c, vec * sums) {
        const auto weights = [](__m512i words) { return (__m512bh)_mm512_permutexvar_epi16(words, _mm512_load_si512(LESS_16.of)); };
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            add_words(five_bits(u, 2 * h + g), five_bits(v, 2 * h + g), c[2 * h + g], weights, sums + 4 * g);
        }
    }
    static void add_offsets(const offsets & off, int h, vec * sums) {
        const vec of[2] = {off.of(2 * h), off.of(2 * h + 1)};
        for (int j = 0; j < 8; j++) {
            sums[j] = _mm512_add_ps(sums[j], of[j / 4]);
        }
    }
    static void finish(const vec * sums, float * y) {
        in_order(sums, y, [](int g, int lane) { return lane / 2 * 64 + g * 32 + lane % 2 * 16; });
    }
};

struct q6_K_rows : sums_of_bytes {
    using block = block_q6_K;
    static constexpr int RUN = 16;

    static int place(int column) { return column; }

    // A weight in the low six bits of each byte, and others' bits above.
    static __m512i six_bits(const block & b, int g) {
        const __m512i low = _mm512_loadu_si512(b.ql + g / 2 * 64);
        const __m512i pairs = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qh + g / 2 * 32)));
        // Bits 4 and 5 of a byte from its bits 0 and 1 (2 and 3 in the upper half), or from 4 and 5 (6 and 7).
        const __m512i bytewise = _mm512_set1_epi64(0x3830282018100800);
        const __m512i from = _mm512_mask_add_epi8(bytewise, 0xffffffff00000000, bytewise, _mm512_set1_epi8(2));
        const __m512i high = _mm512_multishift_epi64_epi8(g % 2 ? from : _mm512_sub_epi8(from, _mm512_set1_epi8(4)), pairs);
        return with_upper_bits(low, g, high);
    }
    static __m512i bytes(const block & b, int g) { return _mm512_and_si512(six_bits(b, g), _mm512_set1_epi8(63)); }
    static __m128i scales(const block & b) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.scales)); }

    template <int T> static void dot(const block & b, const k_x * const * x, vec * acc) {
        const __m256i words = _mm256_cvtepi8_epi16(scales(b));
        const __m512i of = _mm512_set_epi64(0x0007000700070007, 0x0003000300030003, 0x0006000600060006, 0x0002000200020002, 0x0005000500050005, 0x0001000100010001, 0x0004000400040004, 0);
        __m512i p[T];
        k_products<q6_K_rows, T>(b, x, _mm512_castsi256_si512(words), of, p);
        for (int t = 0; t < T; t++) {
            const __m256i offset = _mm256_slli_epi32(_mm256_madd_epi16(words, _mm256_load_si256(reinterpret_cast<const __m256i *>(x[t]->sums))), 5);
            acc[t] = fma(_mm512_cvtepi32_ps(_mm512_sub_epi32(p[t], _mm512_zextsi256_si512(offset))), all(f16(b.d) * x[t]->d), acc[t]);
        }
    }

    struct offsets {};  // bfloat16 holds the weights less 32

    static void coefficients(const block & u, const block & v, const float * a, __m512bh * out, offsets &) {
        const vec cu = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales(u))), all(a[0] * f16(u.d)));
        const vec cv = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(scales(v))), all(a[1] * f16(v.d)));
        const __m512i words = (__m512i)_mm512_cvtne2ps_pbh(cv, cu);
        const __m512i first = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(_mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0), _mm512_set1_epi32(0x00010001)));
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) {
            out[g] = (__m512bh)_mm512_permutexvar_epi16(_mm512_add_epi32(first, _mm512_set1_epi32(4 * g * 0x00010001)), words);
        }
    }

    // Half h of two rows, 64 columns at a time.
    static void add(const block & u, const block & v, int h, const __m512bh * c, vec * sums) {
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            add_words(six_bits(u, 2 * h + g), six_bits(v, 2 * h + g), c[2 * h + g], bf16_bytes, sums + 4 * g);
        }
    }
    static void add_offsets(const offsets &, int, vec *) {}

    static void finish(const vec * sums, float * y) {
        in_order(sums, y, [](int g, int lane) { return 64 * g + 16 * lane; });
    }
};

template <typename Rows, int h> void add_half(int n_pairs, const typename Rows::block * const * w, const __m512bh (*c)[4], const typename Rows::offsets & off, float * y) {
    vec sums[8];
    for (vec & s : sums) {
        s = zero();
    }
    for (int k = 0; k < n_pairs; k++) {
        Rows::add(*w[2 * k], *w[2 * k + 1], h, c[k], sums);
    }
    Rows::add_offsets(off, h, sums);
    add_pass(sums, 8, y);
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
        add_half<Rows, 0>(n_pairs, w, c, off, y + i * K_COLUMNS);
        add_half<Rows, 1>(n_pairs, w, c, off, y + i * K_COLUMNS + K_COLUMNS / 2);
    }
}

}  // namespace
