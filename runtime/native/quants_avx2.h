// Formats in blocks of 32 weights with AVX2, or AVX-VNNI.
//
// Integer products follow ggml: weights of 4 and 5 bits are unsigned with an offset, so w . x = q . x - 8 sum(x), and the
// offsets of eight blocks are taken off at once.
#pragma once

#include "blocks_avx2.h"

namespace {

__m128i sixteen(const void * p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
__m256i both(__m128i lower, __m128i upper) { return _mm256_set_m128i(upper, lower); }
__m256i alone(__m128i lower) { return _mm256_zextsi128_si256(lower); }

struct q8_0_rows {
    using block = block_q8_0;
    using x_block = block_q8_0;
    static constexpr bool MINIMA = false;
    static constexpr float OFFSET = signed_products::OFFSET;

    static halves whole(const block * b) {
        return {weights(both(sixteen(b[0].qs), sixteen(b[1].qs))), weights(both(sixteen(b[0].qs + 16), sixteen(b[1].qs + 16)))};
    }
    static halves single(const block * b) { return {weights(alone(sixteen(b->qs))), weights(alone(sixteen(b->qs + 16)))}; }
    static __m256i dot(const halves & w, const int8_t (*x)[BLOCK]) { return signed_products::of(w.first, x[0], w.second, x[1]); }

  private:
    static __m256i weights(__m256i w) { return signed_products::weights(w); }
};

inline void axpys_q8_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    for (int64_t i = 0; i < n / BLOCK; i++) {
        vec sums[BLOCK / WIDTH];
        fetch<sizeof(block_q8_0)>(next, n_rows, i * sizeof(block_q8_0));
        for (vec & s : sums) {
            s = zero();
        }
        for (int k = 0; k < n_rows; k++) {
            const block_q8_0 & b = reinterpret_cast<const block_q8_0 *>(rows[k])[i];
            const vec c = all(a[k] * f16(b.d));
            for (int j = 0; j < BLOCK / WIDTH; j++) {
                sums[j] = fma(from_i8(b.qs + j * WIDTH), c, sums[j]);
            }
        }
        add_pass(sums, BLOCK / WIDTH, y + i * BLOCK);
    }
}

// Formats with a nibble of each weight, those of the first half of a block in the low ones.
template <typename Block> struct nibble_rows {
    using block = Block;
    static constexpr bool MINIMA = false;

    static __m256i quants(const block * b) { return both(sixteen(b[0].qs), sixteen(b[1].qs)); }
    static __m256i quants_alone(const block * b) { return alone(sixteen(b->qs)); }
    static halves nibbles(__m256i q) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16(q, 4), mask)};
    }
    static __m256i dot(const halves & w, const int8_t (*x)[BLOCK]) { return small_products(w.first, x[0], w.second, x[1]); }
};

// The nibbles are the weights.
template <typename Block> struct rows_of_4_bits : nibble_rows<Block> {
    using typename nibble_rows<Block>::block;
    using nibble_rows<Block>::quants;
    using nibble_rows<Block>::quants_alone;

    static halves whole(const block * b) { return nibble_rows<Block>::nibbles(quants(b)); }
    static halves single(const block * b) { return nibble_rows<Block>::nibbles(quants_alone(b)); }

    static constexpr int BITS = 4;
    using packed_pair = __m256i;
    template <bool two> static packed_pair packed_pair_of(const block * b) { return two ? quants(b) : quants_alone(b); }
    static vec weight(packed_pair w, int j) { return packed<4>::weights(w, j); }
};

struct q4_0_rows : rows_of_4_bits<block_q4_0> {
    using x_block = block_q8_0;
    static constexpr float OFFSET = 8.0f, AXPY_OFFSET = OFFSET;
};

struct q4_1_rows : rows_of_4_bits<block_q4_1> {
    using x_block = block_q8_1;
    static constexpr bool MINIMA = true;
    static constexpr float OFFSET = 0.0f, AXPY_OFFSET = 0.0f;
};

// Weights in bytes, for products and for accumulation.
struct packed_bytes {
    static constexpr int BITS = 8;
    using packed_pair = halves;
    static vec weight(const halves & w, int j) { return packed<8>::weights(j < 4 ? w.first : w.second, j % 4); }
};

// The fifth bits of 32 weights lie together.
template <typename Block> struct rows_of_5_bits : nibble_rows<Block>, packed_bytes {
    using typename nibble_rows<Block>::block;

    static halves whole(const block * b) { return with_fifth(nibble_rows<Block>::quants(b), both(fifth(b[0]), fifth(b[1]))); }
    static halves single(const block * b) { return with_fifth(nibble_rows<Block>::quants_alone(b), alone(fifth(*b))); }
    template <bool two> static halves packed_pair_of(const block * b) { return two ? whole(b) : single(b); }

  private:
    static __m128i fifth(const block & b) {
        int bits;
        std::memcpy(&bits, b.qh, sizeof(bits));
        return _mm_set1_epi32(bits);
    }
    static halves with_fifth(__m256i q, __m256i bits) {
        const __m256i first = _mm256_set_epi64x(0x0101010101010101, 0, 0x0101010101010101, 0);  // bytes 0 and 1 of the bits
        const halves w = nibble_rows<Block>::nibbles(q);
        return {_mm256_or_si256(w.first, sixteens(bits, first)), _mm256_or_si256(w.second, sixteens(bits, _mm256_add_epi8(first, _mm256_set1_epi8(2))))};
    }
    // 16 where bit i % 8 of byte at[i] is set.
    static __m256i sixteens(__m256i bits, __m256i at) {
        const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(bits, at), each), each);
        return _mm256_and_si256(set, _mm256_set1_epi8(16));
    }
};

struct q5_0_rows : rows_of_5_bits<block_q5_0> {
    using x_block = block_q8_0;
    static constexpr float OFFSET = 16.0f, AXPY_OFFSET = OFFSET;
};

struct q5_1_rows : rows_of_5_bits<block_q5_1> {
    using x_block = block_q8_1;
    static constexpr bool MINIMA = true;
    static constexpr float OFFSET = 0.0f, AXPY_OFFSET = 0.0f;
};

// A nibble names one of 16 numbers, which are denser around 0.
struct codebook {
    static __m256i numbers() { return _mm256_broadcastsi128_si256(_mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)); }
    static __m256i plus_128() { return _mm256_xor_si256(numbers(), _mm256_set1_epi8(static_cast<char>(0x80))); }
    static halves of(__m256i table, const halves & nibbles) { return {_mm256_shuffle_epi8(table, nibbles.first), _mm256_shuffle_epi8(table, nibbles.second)}; }
};

struct iq4_nl_rows : nibble_rows<block_iq4_nl>, packed_bytes {
    using x_block = block_q8_0;
    static constexpr float OFFSET = signed_products::OFFSET, AXPY_OFFSET = 128.0f;

    static halves whole(const block * b) { return codebook::of(signed_products::weights(codebook::numbers()), nibbles(quants(b))); }
    static halves single(const block * b) { return codebook::of(signed_products::weights(codebook::numbers()), nibbles(quants_alone(b))); }
    static __m256i dot(const halves & w, const int8_t (*x)[BLOCK]) { return signed_products::of(w.first, x[0], w.second, x[1]); }

    template <bool two> static halves packed_pair_of(const block * b) { return codebook::of(codebook::plus_128(), nibbles(two ? quants(b) : quants_alone(b))); }
};

}  // namespace
