// Rows of q4_K and q6_K for aarch64.
#pragma once

#include "neon.h"

namespace {

constexpr int K_COLUMNS = 256;

// Each of the two says, of run r of 16 weights: their values, w = scale[r] * value - minus[r], in units of d.
struct q4_K_rows {
    using block = block_q4_K;

    // Eight scales, eight minima.
    static uint8x16_t packed(const block & b) {
        uint32_t s[3];
        std::memcpy(s, b.scales, sizeof(s));
        const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
        const uint32_t out[4] = {s[0] & six, (s[2] & four) | (s[0] >> 2 & two), s[1] & six, (s[2] >> 4 & four) | (s[1] >> 2 & two)};
        return vreinterpretq_u8_u32(vld1q_u32(out));
    }
    static int8x16_t values(const block & b, int r) {
        const uint8x16_t q = vld1q_u8(b.qs + r / 4 * 32 + r % 2 * 16);
        return vreinterpretq_s8_u8(r / 2 % 2 ? vshrq_n_u8(q, 4) : vandq_u8(q, vdupq_n_u8(15)));
    }
    // sums[t] += b . x[t]
    template <int T> static void add(const block & b, const block_q8_K * const * x, float * sums) {
        uint8_t scales[16];
        vst1q_u8(scales, packed(b));
        int32x4_t p[T];
        for (int t = 0; t < T; t++) {
            p[t] = vdupq_n_s32(0);
        }
#pragma GCC unroll 8
        for (int r = 0; r < 16; r += 2) {
            const int8x16_t first = values(b, r), second = values(b, r + 1);
            for (int t = 0; t < T; t++) {
                const int8_t * q = x[t]->qs + 16 * r;
                p[t] = vmlaq_n_s32(p[t], vdotq_s32(vdotq_s32(vdupq_n_s32(0), first, vld1q_s8(q)), second, vld1q_s8(q + 16)), scales[r / 2]);
            }
        }
        const int16x8_t least = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(scales + 8)));
        for (int t = 0; t < T; t++) {
            const int16x8_t runs = vpaddq_s16(vld1q_s16(x[t]->bsums), vld1q_s16(x[t]->bsums + 8));
            const int32x4_t minus = vmlal_s16(vmull_s16(vget_low_s16(runs), vget_low_s16(least)), vget_high_s16(runs), vget_high_s16(least));
            // Which products are rounded is said here: compilers choose one way for one token and another for four.
            const float below = f16(b.dmin) * static_cast<float>(vaddvq_s32(minus));
            sums[t] = __builtin_fmaf(x[t]->d, __builtin_fmaf(f16(b.d), static_cast<float>(vaddvq_s32(p[t])), -below), sums[t]);
        }
    }
    static void coefficients(const block & b, float a, float * scale, float * minus) {
        uint8_t scales[16];
        vst1q_u8(scales, packed(b));
        const float d = a * f16(b.d), dmin = a * f16(b.dmin);
        for (int r = 0; r < 16; r++) {
            scale[r] = d * scales[r / 2];
            minus[r] += dmin * scales[8 + r / 2];
        }
    }
};

struct q6_K_rows {
    using block = block_q6_K;

    static int8x16_t values(const block & b, int r) {
        const int half = r / 8, quarter = r / 2 % 4;
        const uint8x16_t low = vld1q_u8(b.ql + half * 64 + r % 4 * 16), pairs = vld1q_u8(b.qh + half * 32 + r % 2 * 16);
        const uint8x16_t nibbles = quarter < 2 ? vandq_u8(low, vdupq_n_u8(15)) : vshrq_n_u8(low, 4);
        const uint8x16_t high = vandq_u8(vshlq_u8(pairs, vdupq_n_s8(static_cast<int8_t>(4 - 2 * quarter))), vdupq_n_u8(0x30));
        return vsubq_s8(vreinterpretq_s8_u8(vorrq_u8(nibbles, high)), vdupq_n_s8(32));
    }
    template <int T> static void add(const block & b, const block_q8_K * const * x, float * sums) {
        int32x4_t p[T];
        for (int t = 0; t < T; t++) {
            p[t] = vdupq_n_s32(0);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            const int8x16_t w = values(b, r);
            for (int t = 0; t < T; t++) {
                p[t] = vmlaq_n_s32(p[t], vdotq_s32(vdupq_n_s32(0), w, vld1q_s8(x[t]->qs + 16 * r)), b.scales[r]);
            }
        }
        for (int t = 0; t < T; t++) {
            sums[t] = __builtin_fmaf(x[t]->d * f16(b.d), static_cast<float>(vaddvq_s32(p[t])), sums[t]);
        }
    }
    static void coefficients(const block & b, float a, float * scale, float *) {
        const float d = a * f16(b.d);
        for (int r = 0; r < 16; r++) {
            scale[r] = d * b.scales[r];
        }
    }
};

template <typename Rows> struct of_k {
    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        using block = typename Rows::block;
        float sums[R * T] = {};
        for (int64_t i = 0; i < n / K_COLUMNS; i++) {
            fetch<sizeof(block)>(next, R, i * sizeof(block));
            const block_q8_K * x[T];
            for (int t = 0; t < T; t++) {
                x[t] = static_cast<const block_q8_K *>(xs[t]) + i;
            }
            for (int k = 0; k < R; k++) {
                Rows::template add<T>(reinterpret_cast<const block *>(rows[k])[i], x, sums + k * T);
            }
        }
        std::memcpy(out, sums, sizeof(sums));
    }
};

template <typename Rows> void axpys_k(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        const block * w[lzn::AXPY_ROWS];
        float scale[lzn::AXPY_ROWS][16], minus[16] = {};
        for (int k = 0; k < n_rows; k++) {
            w[k] = reinterpret_cast<const block *>(rows[k]) + i;
            Rows::coefficients(*w[k], a[k], scale[k], minus);
        }
        for (int r = 0; r < 16; r++) {
            float32x4_t sums[4];
            clear(sums, 4);
            for (int k = 0; k < n_rows; k++) {
                add_bytes(sums, Rows::values(*w[k], r), scale[k][r]);
            }
            for (float32x4_t & s : sums) {
                s = vsubq_f32(s, vdupq_n_f32(minus[r]));
            }
            add_pass(sums, 4, y + i * K_COLUMNS + 16 * r);
        }
    }
}

}  // namespace
