// Rows in blocks of 32 weights, 256 bits at a time: two blocks side by side. Rows, in quants_avx2.h, says what a format is:
//   block, x_block      of the row, and of x as ggml rounds it
//   MINIMA              whether a block has a number `m` that is added to all of its weights
//   OFFSET              otherwise: how much larger the weights in a product are than what they stand for
//   whole, single       two blocks' weights for products, or one block's and anything
//   dot                 their product with one token's x
// and for accumulation
//   AXPY_OFFSET, BITS   the same as OFFSET, of the weights that are added up; how many bits each takes
//   packed_pair_of, weight   those of two blocks, or of one; weight j of each 32-bit word, as `packed` gives it
#pragma once

#include "integers_avx2.h"
#include "packed_avx2.h"

namespace {

// The first halves of two blocks side by side, and the second ones.
struct halves {
    __m256i first, second;
};

// --- products with blocks of 32 weights of one scale ------------------------------------------------------------------

constexpr int GROUP_BLOCKS = 8;  // whose scales are converted at once

// x of eight blocks, two blocks' values in halves. offset: what a product gets for each unit of the row's minimum, or for
// weights with an offset, of its scale.
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
    const auto * xs = static_cast<const typename Rows::x_block *>(x);
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
        group.offset[at] = (Rows::MINIMA ? 1.0f : -Rows::OFFSET) * group.d[at] * static_cast<float>(total);
    }
}

// half(i) of a group's first n blocks as floats, and zeros. Half a group is what the rows of many predictors end with.
template <typename Half> __attribute__((always_inline)) inline vec of_each(int n, Half half) {
    const auto d = [=](int i) { return static_cast<short>(half(i)); };
    if (n == GROUP_BLOCKS) {
        return _mm256_cvtph_ps(_mm_set_epi16(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0)));
    }
    if (n == GROUP_BLOCKS / 2) {
        return _mm256_cvtph_ps(_mm_set_epi16(0, 0, 0, 0, d(3), d(2), d(1), d(0)));
    }
    alignas(16) uint16_t some[GROUP_BLOCKS] = {};
    for (int i = 0; i < n; i++) {
        some[i] = half(i);
    }
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i *>(some)));
}

template <typename Block> __attribute__((always_inline)) inline vec scales_of(const Block * b, int n) {
    return of_each(n, [=](int i) { return b[i].d; });
}
template <typename Block> __attribute__((always_inline)) inline vec minima_of(const Block * b, int n) {
    return of_each(n, [=](int i) { return b[i].m; });
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
                vec least = d;
                if constexpr (Rows::MINIMA) {
                    least = minima_of(w[k], n);
                }
                for (int t = 0; t < T; t++) {
                    scale[k][t] = _mm256_mul_ps(d, load(x[t]->d));
                    if (Rows::MINIMA || Rows::OFFSET != 0.0f) {
                        of[k][t][0] = fma(least, load(x[t]->offset), of[k][t][0]);
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
            // One after the other, rows that do not begin with a line came at two thirds of the speed (Q8_0, 2,688
            // weights) where each was fetched in steps from its own beginning.
            if constexpr (R == 1) {
                fetch_lines(next, g * BYTES, BYTES);
            } else {
                fetch<BYTES>(next, R, g * BYTES);
            }
            go_to(g);
            acc.add(w, x, GROUP_BLOCKS);
        }
        if (R == 1 && rest) {
            fetch_lines(next, g * BYTES, rest * sizeof(block));
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

// --- accumulation -----------------------------------------------------------------------------------------------------

// One half of two blocks, or of one and zeros, in each lane.
template <bool two, typename Get> vec in_lanes(Get half) {
    const __m128i first = _mm_set1_epi16(static_cast<short>(half(0)));
    return _mm256_cvtph_ps(two ? _mm_unpacklo_epi64(first, _mm_set1_epi16(static_cast<short>(half(two)))) : _mm_move_epi64(first));
}

// Two blocks of rows side by side; or one, in the lower lane, and what gets a coefficient of zero.
template <typename Rows, bool two> void add_blocks(int n_rows, const char * const * rows, int64_t at, const float * a, float * y) {
    vec sums[8], total = zero();
    for (vec & s : sums) {
        s = zero();
    }
    for (int k = 0; k < n_rows; k++) {
        const auto * b = reinterpret_cast<const typename Rows::block *>(rows[k] + at);
        const vec c = _mm256_mul_ps(in_lanes<two>([=](int i) { return b[i].d; }), all(a[k]));
        if constexpr (Rows::MINIMA) {
            total = fma(in_lanes<two>([=](int i) { return b[i].m; }), all(a[k]), total);
        } else {
            total = _mm256_add_ps(total, c);
        }
        const typename Rows::packed_pair w = Rows::template packed_pair_of<two>(b);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            sums[j] = fma(Rows::weight(w, j), c, sums[j]);
        }
    }
    const vec offset = Rows::MINIMA ? total : _mm256_mul_ps(total, all(-Rows::AXPY_OFFSET));
    for (int j = 0; j < 8; j++) {
        sums[j] = add_offset<Rows::BITS>(sums[j], offset, j % (32 / Rows::BITS));
    }
    add_pass(sums, 8, y);
}

template <typename Rows> void axpys_blocks(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    constexpr int64_t COLUMNS = 2 * BLOCK, BYTES = 2 * sizeof(typename Rows::block);
    const int64_t whole = n / COLUMNS;
    for (int64_t g = 0; g < whole; g++) {
        fetch<BYTES>(next, n_rows, g * BYTES);
        add_blocks<Rows, true>(n_rows, rows, g * BYTES, a, y + g * COLUMNS);
    }
    if (n % COLUMNS) {
        add_blocks<Rows, false>(n_rows, rows, whole * BYTES, a, y + whole * COLUMNS);
    }
}

template <typename Rows> void finish_blocks(int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += 2 * BLOCK) {
        vec sums[8];
        for (int j = 0; j < 8; j++) {
            sums[j] = load(y + i + WIDTH * j);
        }
        // With 4 bits a word has weights of both halves in turn, with 8 of one.
        const int second = Rows::BITS == 4 ? 1 : 0;
        store_words<Rows::BITS>(sums, 0, y + i, y + i + BLOCK);
        store_words<Rows::BITS>(sums + (second ? 0 : 4), second, y + i + BLOCK / 2, y + i + BLOCK + BLOCK / 2);
    }
}

}  // namespace
