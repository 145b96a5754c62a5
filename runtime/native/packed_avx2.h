// Accumulation of packed weights with AVX2, in float and without rounding: how weights leave the words they are packed
// in, and how the sums are put in order.
#pragma once

#include "x86.h"

namespace {

// A word of 32 bits holds weights of `bits` bits. All but the last are taken out by a mask alone: weight j is then
// unit(j) times too large, a power of two, and so are the sums.
template <int bits> struct packed {
    static constexpr int PER_WORD = 32 / bits;
    static constexpr float unit(int j) { return j < PER_WORD - 1 ? static_cast<float>(1u << bits * j) : 1.0f; }

    // Weight j of eight words.
    static vec weights(__m256i words, int j) {
        const __m256i mask = _mm256_set1_epi32(((1 << bits) - 1) << bits * (j % (PER_WORD - 1)));
        return _mm256_cvtepi32_ps(j < PER_WORD - 1 ? _mm256_and_si256(words, mask) : _mm256_srli_epi32(words, 32 - bits));
    }
};

// What is added to every weight, in the unit of weight j.
template <int bits> vec add_offset(vec sums, vec offset, int j) { return fma(offset, all(packed<bits>::unit(j)), sums); }

// Takes the units off the sums of eight words' weights first, first + step, ... (one of each byte), and writes them
// word by word: words 0 to 3 from `lower` on, 4 to 7 from `upper` on.
template <int bits> void store_words(const vec * sums, int first, float * lower, float * upper) {
    vec b[4];
    for (int m = 0; m < 4; m++) {
        const int j = first + m * (8 / bits);
        b[m] = _mm256_mul_ps(sums[j], all(1.0f / packed<bits>::unit(j)));
    }
    const vec low[2] = {_mm256_unpacklo_ps(b[0], b[1]), _mm256_unpacklo_ps(b[2], b[3])}, high[2] = {_mm256_unpackhi_ps(b[0], b[1]), _mm256_unpackhi_ps(b[2], b[3])};
    const vec words[4] = {_mm256_shuffle_ps(low[0], low[1], 0x44), _mm256_shuffle_ps(low[0], low[1], 0xee), _mm256_shuffle_ps(high[0], high[1], 0x44),
                          _mm256_shuffle_ps(high[0], high[1], 0xee)};
    for (int w = 0; w < 4; w++) {
        _mm_storeu_ps(lower + 4 * w, _mm256_castps256_ps128(words[w]));
        _mm_storeu_ps(upper + 4 * w, _mm256_extractf128_ps(words[w], 1));
    }
}

}  // namespace
