// Rows of Q8_0 and Q4_0 for aarch64: four blocks of 32 weights side by side. Rows says what a format is:
//   block, UNIT     of the row; what a weight of 1 stands for, beside the block's scale
//   weights         of one block
//   two             with i8mm: of the same block of two rows, both rows' columns 0 to 7, then 8 to 15 and so on
#pragma once

#include "neon.h"

namespace {

constexpr int GROUP_BLOCKS = 4;  // whose scales are converted at once

struct q8_0_rows {
    using block = block_q8_0;
    static constexpr float UNIT = 1.0f;

    static int8x16x2_t weights(const block & b) { return {{vld1q_s8(b.qs), vld1q_s8(b.qs + 16)}}; }
    static int8x16x4_t two(const block & a, const block & b) {
        const int8x16x2_t v = weights(a), w = weights(b);
        return {{first_halves(v.val[0], w.val[0]), last_halves(v.val[0], w.val[0]), first_halves(v.val[1], w.val[1]), last_halves(v.val[1], w.val[1])}};
    }
};

// A nibble in the upper half of a byte is a signed number, 16 times as large: no offset has to be taken from it.
struct q4_0_rows {
    using block = block_q4_0;
    static constexpr float UNIT = 1.0f / 16;

    static int8x16_t bytes(const block & b) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(b.qs), vdupq_n_u8(0x88))); }
    static int8x16_t low(int8x16_t both) { return vshlq_n_s8(both, 4); }
    static int8x16_t high(int8x16_t both) { return vandq_s8(both, vdupq_n_s8(-16)); }
    static int8x16x2_t weights(const block & b) { return {{low(bytes(b)), high(bytes(b))}}; }
    static int8x16x4_t two(const block & a, const block & b) {
        const int8x16_t first = first_halves(bytes(a), bytes(b)), last = last_halves(bytes(a), bytes(b));
        return {{low(first), low(last), high(first), high(last)}};
    }
};

// x of four blocks; d in units of the weights'.
struct alignas(16) x_group {
    int8_t q[GROUP_BLOCKS][BLOCK];
    float d[GROUP_BLOCKS];
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
        std::memcpy(group.q[b % GROUP_BLOCKS], xs[b].qs, BLOCK);
        group.d[b % GROUP_BLOCKS] = f16(xs[b].d) * Rows::UNIT;
    }
}

// Four halves, put together where vectors need not wait for it.
inline float32x4_t halves(uint64_t a, uint64_t b, uint64_t c, uint64_t d) { return vcvt_f32_f16(vcreate_f16(a | b << 16 | c << 32 | d << 48)); }

// Lane i of a sum is that of every fourth block, from block i on, of whole numbers: whoever multiplies has the same bits.
template <typename Rows> struct of_blocks {
    using block = typename Rows::block;
    static constexpr int64_t COLUMNS = GROUP_BLOCKS * BLOCK, BYTES = GROUP_BLOCKS * sizeof(block);

    static const x_group & group_of(const void * x, int64_t g) { return static_cast<const x_group *>(x)[g]; }

    // The blocks of a row's last group, and zeros.
    static void last_group(const char * row, int64_t n, block * out) {
        std::memset(static_cast<void *>(out), 0, BYTES);
        std::memcpy(static_cast<void *>(out), row + n / COLUMNS * BYTES, n / BLOCK % GROUP_BLOCKS * sizeof(block));
    }

    template <int T> static void add(const block * w, const void * const * xs, int64_t g, float32x4_t * sums) {
        int8x16x2_t q[GROUP_BLOCKS];
        for (int i = 0; i < GROUP_BLOCKS; i++) {
            q[i] = Rows::weights(w[i]);
        }
        const float32x4_t d = halves(w[0].d, w[1].d, w[2].d, w[3].d);
        for (int t = 0; t < T; t++) {
            const x_group & x = group_of(xs[t], g);
            int32x4_t p[GROUP_BLOCKS];
            for (int i = 0; i < GROUP_BLOCKS; i++) {
                p[i] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), q[i].val[0], vld1q_s8(x.q[i])), q[i].val[1], vld1q_s8(x.q[i] + 16));
            }
            const int32x4_t whole = vpaddq_s32(vpaddq_s32(p[0], p[1]), vpaddq_s32(p[2], p[3]));
            sums[t] = vfmaq_f32(sums[t], vcvtq_f32_s32(whole), vmulq_f32(d, vld1q_f32(x.d)));
        }
    }

    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        float32x4_t sums[R][T];
        clear(sums[0], R * T);
        int64_t g = 0;
        for (; g < n / COLUMNS; g++) {
            fetch<BYTES>(next, R, g * BYTES);
            for (int k = 0; k < R; k++) {
                add<T>(reinterpret_cast<const block *>(rows[k] + g * BYTES), xs, g, sums[k]);
            }
        }
        for (int k = 0; n % COLUMNS && k < R; k++) {
            block last[GROUP_BLOCKS];
            last_group(rows[k], n, last);
            add<T>(last, xs, g, sums[k]);
        }
        for (int k = 0; k < R; k++) {
            for (int t = 0; t < T; t++) {
                out[k * T + t] = sum(sums[k][t]);
            }
        }
    }

#if defined(__ARM_FEATURE_MATMUL_INT8)
    // Products of two rows with two tokens: [row 0, token 0], [0, 1], [1, 0], [1, 1]. Of four rows, by block of a group.
    template <int T> struct pairs {
        float32x4_t of[GROUP_BLOCKS][2][T / 2];

        __attribute__((always_inline)) void add(const block * const * w, const void * const * xs, int64_t g) {
#pragma GCC unroll 4
            for (int i = 0; i < GROUP_BLOCKS; i++) {
                int8x16_t x[T / 2][4];
                float32x4_t xd[T / 2];
                for (int p = 0; p < T / 2; p++) {
                    const x_group &a = group_of(xs[2 * p], g), &b = group_of(xs[2 * p + 1], g);
                    for (int half = 0; half < 2; half++) {
                        const int8x16_t u = vld1q_s8(a.q[i] + 16 * half), v = vld1q_s8(b.q[i] + 16 * half);
                        x[p][2 * half] = first_halves(u, v);
                        x[p][2 * half + 1] = last_halves(u, v);
                    }
                    const float32x2_t d = vld1_lane_f32(b.d + i, vld1_dup_f32(a.d + i), 1);
                    xd[p] = vcombine_f32(d, d);
                }
                for (int k = 0; k < 2; k++) {
                    const block &a = w[2 * k][i], &b = w[2 * k + 1][i];
                    const int8x16x4_t q = Rows::two(a, b);
                    const float32x4_t d = halves(a.d, a.d, b.d, b.d);
                    for (int p = 0; p < T / 2; p++) {
                        int32x4_t whole = vdupq_n_s32(0);
                        for (int j = 0; j < 4; j++) {
                            whole = vmmlaq_s32(whole, q.val[j], x[p][j]);
                        }
                        of[i][k][p] = vfmaq_f32(of[i][k][p], vcvtq_f32_s32(whole), vmulq_f32(d, xd[p]));
                    }
                }
            }
        }
    };

    template <int T> static void four_rows(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        pairs<T> sums;
        clear(sums.of[0][0], GROUP_BLOCKS * T);
        const block * w[4];
        int64_t g = 0;
        for (; g < n / COLUMNS; g++) {
            fetch<BYTES>(next, 4, g * BYTES);
            for (int k = 0; k < 4; k++) {
                w[k] = reinterpret_cast<const block *>(rows[k] + g * BYTES);
            }
            sums.add(w, xs, g);
        }
        if (n % COLUMNS) {
            block last[4][GROUP_BLOCKS];
            for (int k = 0; k < 4; k++) {
                last_group(rows[k], n, last[k]);
                w[k] = last[k];
            }
            sums.add(w, xs, g);
        }
        for (int k = 0; k < 2; k++) {
            for (int p = 0; p < T / 2; p++) {
                const auto of = [&](int i) { return sums.of[i][k][p]; };
                const float32x4_t both = vaddq_f32(vaddq_f32(of(0), of(1)), vaddq_f32(of(2), of(3)));  // as `sum` does
                vst1_f32(out + 2 * k * T + 2 * p, vget_low_f32(both));
                vst1_f32(out + (2 * k + 1) * T + 2 * p, vget_high_f32(both));
            }
        }
    }
#endif
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
template <typename Rows> constexpr bool FOUR_ROWS<of_blocks<Rows>, 2> = true;
template <typename Rows> constexpr bool FOUR_ROWS<of_blocks<Rows>, 4> = true;
#endif

template <typename Rows> void axpys_block(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float32x4_t sums[BLOCK / WIDTH];
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        clear(sums, BLOCK / WIDTH);
        for (int k = 0; k < n_rows; k++) {
            const block & b = reinterpret_cast<const block *>(rows[k])[i];
            const int8x16x2_t w = Rows::weights(b);
            const float c = a[k] * (f16(b.d) * Rows::UNIT);
            add_bytes(sums, w.val[0], c);
            add_bytes(sums + 4, w.val[1], c);
        }
        add_pass(sums, BLOCK / WIDTH, y + i * BLOCK);
    }
}

}  // namespace
