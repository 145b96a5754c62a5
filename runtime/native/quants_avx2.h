// Q8_0 and Q4_0 with AVX2, or AVX-VNNI: a block of 32 columns at a time, or two.
//
// Integer products follow ggml: 4-bit weights are unsigned with an offset of 8, so w . x = q . x - 8 sum(x), and the
// offsets of eight blocks are taken off at once.
#pragma once

#include "integers_avx2.h"
#include "packed_avx2.h"

namespace {

// --- products with blocks of 32 weights of one scale ------------------------------------------------------------------

constexpr int GROUP_BLOCKS = 8;  // whose scales are converted at once

// x of eight blocks, its values in the order in which Rows has the weights. offset: for weights that are unsigned with an
// offset, what that takes off a product per unit of the row's scale.
struct alignas(32) x_group {
    int8_t q[GROUP_BLOCKS][BLOCK];
    float d[GROUP_BLOCKS];
    float offset[GROUP_BLOCKS];
};

size_t arranged_size_of_blocks(int64_t n) {
    const int64_t groups = (n / BLOCK + GROUP_BLOCKS - 1) / GROUP_BLOCKS;
    return (groups * sizeof(x_group) + 63) / 64 * 64;
}

// Blocks that the last group lacks are zeros.
template <typename Rows> void arrange_blocks(int64_t n, const void * x, void * out) {
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    x_group * to = static_cast<x_group *>(out);
    std::memset(out, 0, arranged_size_of_blocks(n));
    for (int64_t b = 0; b < n / BLOCK; b++) {
        x_group & group = to[b / GROUP_BLOCKS];
        const int at = static_cast<int>(b % GROUP_BLOCKS);
        int total = 0;
        for (int i = 0; i < BLOCK; i++) {
            total += xs[b].qs[i];
        }
        for (int half = 0; half < 2; half++) {
            std::memcpy(group.q[at / 2 * 2 + half] + 16 * (at % 2), xs[b].qs + 16 * half, 16);
        }
        group.d[at] = f16(xs[b].d);
        group.offset[at] = -Rows::OFFSET * group.d[at] * static_cast<float>(total);
    }
}

// The scales of a group's first n blocks, and zeros. Half a group is what the rows of many predictors end with.
template <typename Block> __attribute__((always_inline)) inline vec scales_of(const Block * b, int n) {
    const auto d = [=](int i) { return static_cast<short>(b[i].d); };
    if (n == GROUP_BLOCKS) {
        return _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)));
    }
    if (n == GROUP_BLOCKS / 2) {
        return _mm256_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, d(3), d(2), d(1), d(0)));
    }
    alignas(16) uint16_t some[GROUP_BLOCKS] = {};
    for (int i = 0; i < n; i++) {
        some[i] = b[i].d;
    }
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(some)));
}

// The sums of four vectors, each with the additions of `sum`.
void four_sums(const vec * v, float * out) {
    __m128 s[4];
    for (int i = 0; i < 4; i++) {
        s[i] = _mm_add_ps(_mm256_castps256_ps128(v[i]), _mm256_extractf128_ps(v[i], 1));
    }
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(s[0], s[1]), _mm_unpackhi_ps(s[0], s[1]));
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(s[2], s[3]), _mm_unpackhi_ps(s[2], s[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

// Pair i of eight scales, one in each half.
vec two_scales(vec scales, int i) {
    const __m256i first = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
    return _mm256_permutevar8x32_ps(scales, _mm256_add_epi32(first, _mm256_set1_epi32(2 * i)));
}

// Each kind of rows unpacks two blocks at once, for several tokens: their first halves side by side, and their second
// ones. What it adds for one token is four-by-four sums, the first block's in the lower half, the second one's in the
// upper.
struct halves {
    __m256i first, second;
};
__m128i sixteen(const void * p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

struct q8_0_rows {
    using block = block_q8_0;
    static constexpr float OFFSET = signed_products::OFFSET;

    static halves whole(const block * b) { return {both(b[0].qs, b[1].qs), both(b[0].qs + 16, b[1].qs + 16)}; }
    static halves single(const block * b) { return {lower(b->qs), lower(b->qs + 16)}; }
    static __m256i dot(const halves & w, const int8_t (*x)[BLOCK]) { return signed_products::of(w.first, x[0], w.second, x[1]); }

  private:
    static __m256i both(const int8_t * p, const int8_t * q) { return signed_products::weights(_mm256_set_m128i(sixteen(q), sixteen(p))); }
    static __m256i lower(const int8_t * p) { return signed_products::weights(_mm256_zextsi128_si256(sixteen(p))); }
};

struct q4_0_rows {
    using block = block_q4_0;
    static constexpr float OFFSET = 8.0f;

    static halves whole(const block * b) { return nibbles(_mm256_set_m128i(sixteen(b[1].qs), sixteen(b[0].qs))); }
    static halves single(const block * b) { return nibbles(_mm256_zextsi128_si256(sixteen(b->qs))); }
    static __m256i dot(const halves & w, const int8_t (*x)[BLOCK]) { return small_products(w.first, x[0], w.second, x[1]); }

  private:
    static halves nibbles(__m256i q) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(q, mask), _mm256_and_si256(_mm256_srli_epi16(q, 4), mask)};
    }
};

// Two sums per product, of even and of odd pairs: one would wait for its own additions.
template <typename Rows> struct of_blocks {
    using block = typename Rows::block;

    template <int R, int T> struct sums {
        vec of[R][T][2];

        // n: blocks of the group. The loop's bound and the sums' indices are constants, so that sums stay in registers.
        __attribute__((always_inline)) void add(const block * const * w, const x_group * const * x, int n) {
            vec scale[R][T];
            for (int k = 0; k < R; k++) {
                const vec d = scales_of(w[k], n);
                for (int t = 0; t < T; t++) {
                    scale[k][t] = _mm256_mul_ps(d, load(x[t]->d));
                    if (Rows::OFFSET != 0.0f) {
                        of[k][t][0] = fma(d, load(x[t]->offset), of[k][t][0]);
                    }
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < GROUP_BLOCKS / 2; i++) {
                for (int k = 0; k < R && 2 * i < n; k++) {
                    const halves pair = 2 * i + 1 < n ? Rows::whole(w[k] + 2 * i) : Rows::single(w[k] + 2 * i);
                    for (int t = 0; t < T; t++) {
                        const __m256i p = Rows::dot(pair, x[t]->q + 2 * i);
                        of[k][t][i % 2] = fma(_mm256_cvtepi32_ps(p), two_scales(scale[k][t], i), of[k][t][i % 2]);
                    }
                }
            }
        }
    };

    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        constexpr int64_t BYTES = GROUP_BLOCKS * sizeof(block);
        const int rest = static_cast<int>(n / BLOCK % GROUP_BLOCKS);
        sums<R, T> acc;
        for (auto & row : acc.of) {
            for (auto & pair : row) {
                pair[0] = pair[1] = zero();
            }
        }
        const block * w[R];
        const x_group * x[T];
        int64_t g = 0;
        const auto go_to = [&](int64_t group) {
            for (int k = 0; k < R; k++) {
                w[k] = reinterpret_cast<const block *>(rows[k] + group * BYTES);
            }
            for (int t = 0; t < T; t++) {
                x[t] = static_cast<const x_group *>(xs[t]) + group;
            }
        };
        for (; g < n / BLOCK / GROUP_BLOCKS; g++) {
            fetch<BYTES>(next, R, g * BYTES);
            go_to(g);
            acc.add(w, x, GROUP_BLOCKS);
        }
        if (rest == GROUP_BLOCKS / 2) {
            go_to(g);
            acc.add(w, x, GROUP_BLOCKS / 2);
        } else if (rest) {
            go_to(g);
            acc.add(w, x, rest);
        }
        vec both[R * T];
        for (int i = 0; i < R * T; i++) {
            both[i] = ::add(acc.of[i / T][i % T][0], acc.of[i / T][i % T][1]);
        }
        if (R * T == 4) {
            return four_sums(both, out);
        }
        for (int i = 0; i < R * T; i++) {
            out[i] = sum(both[i]);
        }
    }
};

using q8_0_products = of_blocks<q8_0_rows>;
using q4_0_products = of_blocks<q4_0_rows>;

// --- accumulation of Q4_0 ---------------------------------------------------------------------------------------------

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
