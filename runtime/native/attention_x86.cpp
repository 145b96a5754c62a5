// Attention for x86-64, compiled once for AVX2 and once for AVX-512: LZN_ATTENTION names the table.
#include "attention.h"

#include <cmath>
#include <limits>

#include "x86.h"

namespace {

using lzn::ATTENTION_CELLS;
using lzn::attention_state;

static_assert(ATTENTION_CELLS % WIDTH == 0, "whole vectors of scores");
constexpr int VECTORS = ATTENTION_CELLS / WIDTH;
constexpr float NONE = -std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)
vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
vec less(vec a, vec b) { return _mm512_sub_ps(a, b); }
vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
float largest_of(vec v) { return _mm512_reduce_max_ps(v); }
// v times two to the power that the low bits of `n` hold, 0 where x is too small for it.
vec scaled(vec v, vec n, vec x) {
    const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(n), 23));
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(-87.0f), _CMP_GE_OQ), _mm512_castsi512_ps(bits));
}
#else
vec times(vec a, vec b) { return _mm256_mul_ps(a, b); }
vec less(vec a, vec b) { return _mm256_sub_ps(a, b); }
vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
float largest_of(vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
vec scaled(vec v, vec n, vec x) {
    const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(n), 23));
    return _mm256_and_ps(_mm256_castsi256_ps(bits), _mm256_cmp_ps(x, all(-87.0f), _CMP_GE_OQ));
}
#endif

// e to the power of x <= 0, at most 2e-7 beside it; 0 below -87. x = n log(2) + r, |r| <= log(2) / 2, and a Taylor series.
vec exponential(vec x) {
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded, and stands in its lowest bits
    const vec with_n = fma(x, all(1.44269504f), magic), n = less(with_n, magic);
    const vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
    vec y = all(1.0f / 720);
    constexpr float SERIES[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (const float c : SERIES) {
        y = fma(y, r, all(c));
    }
    return scaled(y, with_n, x);
}

const uint16_t * halves(const char * p) { return reinterpret_cast<const uint16_t *>(p); }

// scores[h][c] = heads[h].query . keys[c]
template <int H> void scores_of(int64_t d, const attention_state * heads, int n, const char * const * keys, float (*scores)[ATTENTION_CELLS]) {
    for (int c = 0; c < n; c++) {
        vec sums[H];
        for (int h = 0; h < H; h++) {
            sums[h] = zero();
        }
        for (int64_t j = 0; j < d; j += WIDTH) {
            const vec key = load_f16(halves(keys[c]) + j);
            for (int h = 0; h < H; h++) {
                sums[h] = fma(key, load(heads[h].query + j), sums[h]);
            }
        }
        for (int h = 0; h < H; h++) {
            scores[h][c] = sum(sums[h]);
        }
    }
}

// Turns a head's scores into exp(score - largest); returns what earlier sums are to be multiplied by.
float weights_of(const attention_state & head, int n, float * scores) {
    for (int c = n; c < ATTENTION_CELLS; c++) {
        scores[c] = NONE;
    }
    vec most = load(scores);
    for (int i = 1; i < VECTORS; i++) {
        most = larger(most, load(scores + i * WIDTH));
    }
    const float before = *head.largest, largest = std::fmax(before, largest_of(most));
    vec total = zero();
    for (int i = 0; i < VECTORS; i++) {
        const vec weight = exponential(less(load(scores + i * WIDTH), all(largest)));
        store(scores + i * WIDTH, weight);
        total = add(total, weight);
    }
    const float kept = before == NONE ? 0.0f : std::exp(before - largest);
    *head.largest = largest;
    *head.sum = *head.sum * kept + sum(total);
    return kept;
}

template <int H> void add_values(int64_t d, const attention_state * heads, int n, const char * const * values, const float (*weights)[ATTENTION_CELLS], const float * kept) {
    for (int64_t j = 0; j < d; j += WIDTH) {
        vec sums[H];
        for (int h = 0; h < H; h++) {
            sums[h] = times(load(heads[h].values + j), all(kept[h]));
        }
        for (int c = 0; c < n; c++) {
            const vec value = load_f16(halves(values[c]) + j);
            for (int h = 0; h < H; h++) {
                sums[h] = fma(value, all(weights[h][c]), sums[h]);
            }
        }
        for (int h = 0; h < H; h++) {
            store(heads[h].values + j, sums[h]);
        }
    }
}

template <int H> void attend_heads(int64_t d, const attention_state * heads, int n, const char * const * keys, const char * const * values) {
    alignas(64) float scores[H][ATTENTION_CELLS];
    float kept[H];
    scores_of<H>(d, heads, n, keys, scores);
    for (int h = 0; h < H; h++) {
        kept[h] = weights_of(heads[h], n, scores[h]);
    }
    add_values<H>(d, heads, n, values, scores, kept);
}

void attend(int64_t d, int n_heads, const attention_state * heads, int n, const char * const * keys, const char * const * values) {
    switch (n_heads) {
        case 1: return attend_heads<1>(d, heads, n, keys, values);
        case 2: return attend_heads<2>(d, heads, n, keys, values);
        case 3: return attend_heads<3>(d, heads, n, keys, values);
        default: return attend_heads<4>(d, heads, n, keys, values);
    }
}

}  // namespace

const lzn::attention_kernels lzn::LZN_ATTENTION = {attend};
