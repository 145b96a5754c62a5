// iq4_xs with AVX2, or AVX-VNNI: blocks of 256 as k-quants, weights of iq4_nl's codebook.
#pragma once

#include "k_quants_avx2.h"
#include "quants_avx2.h"

namespace {

struct block_iq4_xs {
    uint16_t d;
    uint16_t scales_h;    // the upper two bits of eight scales
    uint8_t scales_l[4];  // the lower four
    uint8_t qs[128];      // of 32 columns the first 16 in the low nibbles, the others in the high ones
};
static_assert(sizeof(block_iq4_xs) == 136, "as in ggml");

struct iq4_xs_rows : sums_of_bytes {
    using block = block_iq4_xs;
    static constexpr int RUN = 32;

    // Of 64 columns the first halves of both runs, then the second ones, as nibbles give them.
    static int place(int column) { return column / 64 * 64 + column % 32 / 16 * 32 + column % 64 / 32 * 16; }

    // Eight scales, from -32 to 31.
    static __m256i scales(const block & b) {
        int lower;
        std::memcpy(&lower, b.scales_l, sizeof(lower));
        const __m256i fours = _mm256_srlv_epi32(_mm256_set1_epi32(lower), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
        const __m256i twos = _mm256_srlv_epi32(_mm256_set1_epi32(b.scales_h << 4), _mm256_set_epi32(14, 12, 10, 8, 6, 4, 2, 0));
        const __m256i both = _mm256_or_si256(_mm256_and_si256(fours, _mm256_set1_epi32(15)), _mm256_and_si256(twos, _mm256_set1_epi32(48)));
        return _mm256_sub_epi32(both, _mm256_set1_epi32(32));
    }

    // The weights' places in the codebook, of 64 columns: a run in each lane.
    static halves nibbles(const block & b, int i) { return nibble_rows<block>::nibbles(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs + 32 * i))); }

    // The signs of the weights go to x: two products stay below 2 * 127 * 127.
    template <int T> static void dot(const block & b, const k_x * const * x, vec * acc) {
        const __m256i numbers = codebook::numbers(), sizes = _mm256_abs_epi8(numbers), whole = scales(b);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), _MM_SHUFFLE(2, 0, 2, 0));
        __m256i p[T];
        for (int t = 0; t < T; t++) {
            p[t] = _mm256_setzero_si256();
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const halves at = nibbles(b, i), w = codebook::of(numbers, at), size = codebook::of(sizes, at);
            const __m256i scale = _mm256_shuffle_epi8(words, _mm256_load_si256(reinterpret_cast<const __m256i *>(PAIRS[i].at)));
            for (int t = 0; t < T; t++) {
                p[t] = add_words(p[t], products(size.first, w.first, x[t]->q + 64 * i), scale);
                p[t] = add_words(p[t], products(size.second, w.second, x[t]->q + 64 * i + 32), scale);
            }
        }
        for (int t = 0; t < T; t++) {
            acc[t] = fma(_mm256_cvtepi32_ps(p[t]), all(f16(b.d) * x[t]->d), acc[t]);
        }
    }

    // Weights are accumulated with 128 more than they stand for.
    static void coefficients(const block & b, float a, float * c, vec * off) {
        const vec scale = _mm256_mul_ps(_mm256_cvtepi32_ps(scales(b)), all(a * f16(b.d)));
        store(c, scale);
        off[0] = _mm256_fnmadd_ps(scale, all(128.0f), off[0]);
    }
    static void add(const block & b, int g, const float * c, vec * sums) {
        const halves w = codebook::of(codebook::plus_128(), nibbles(b, g));
        const vec factor = two_runs(c + 2 * g);
        add_bytes_times(w.first, factor, sums);
        add_bytes_times(w.second, factor, sums + 4);
    }
    static vec offset(const float * off, int g, int) { return two_runs(off + 2 * g); }
    static void finish(const vec * sums, float * y) {
        store_words<8>(sums, 0, y, y + 32);
        store_words<8>(sums + 4, 0, y + 16, y + 48);
    }

  private:
    static constexpr scale_places PAIRS[4] = {{16, 0, 0}, {16, 1, 1}, {16, 2, 2}, {16, 3, 3}};

    static __m256i products(__m256i size, __m256i w, const int8_t * x) { return _mm256_maddubs_epi16(size, _mm256_sign_epi8(load_x(x), w)); }
};

}  // namespace
