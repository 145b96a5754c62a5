// What all kernels for aarch64 share: prefetching, and the two forms of products.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "ggml.h"
#include "ggml_blocks.h"
#include "kernels.h"

namespace {

using lzn::row_kernels;

static_assert(lzn::DOT_ROWS == 4 && lzn::DOT_TOKENS == 4, "as `dots` and `dots_tokens` have cases");

constexpr int BLOCK = 32;
constexpr int WIDTH = 4;

inline float f16(uint16_t bits) {
    __fp16 h;
    std::memcpy(&h, &bits, sizeof(h));
    return h;
}

// In an order that is said, and not the compiler's: (v0 + v1) + (v2 + v3).
inline float sum(float32x4_t v) { return vpadds_f32(vpadd_f32(vget_low_f32(v), vget_high_f32(v))); }

// The first 8 bytes of a and of b, and the last ones.
inline int8x16_t first_halves(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }
inline int8x16_t last_halves(int8x16_t a, int8x16_t b) { return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b))); }

// Fetch what follows the first `at` bytes of some rows, `size` bytes, a line at a time: no line twice.
template <size_t size> void fetch(const char * const * next, int n_rows, size_t at) {
    if (!next) {
        return;
    }
    for (size_t line = (at + 63) / 64 * 64; line < at + size; line += 64) {
        for (int k = 0; k < n_rows; k++) {
            __builtin_prefetch(next[k] + line);
        }
    }
}

inline void clear(float32x4_t * sums, int n) {
    for (int j = 0; j < n; j++) {
        sums[j] = vdupq_n_f32(0.0f);
    }
}

// Adds the sums of one pass to y. They began at 0 and not at y: numbers lose less when they are added to small ones
// first.
inline void add_pass(const float32x4_t * sums, int n, float * y) {
    for (int j = 0; j < n; j++) {
        vst1q_f32(y + j * WIDTH, vaddq_f32(vld1q_f32(y + j * WIDTH), sums[j]));
    }
}

// sums[0..3] += c * 16 weights
inline void add_bytes(float32x4_t * sums, int8x16_t w, float c) {
    const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(w)), vmovl_s8(vget_high_s8(w))};
    for (int h = 0; h < 2; h++) {
        sums[2 * h] = vfmaq_n_f32(sums[2 * h], vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[h]))), c);
        sums[2 * h + 1] = vfmaq_n_f32(sums[2 * h + 1], vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[h]))), c);
    }
}

// The two forms of products that a table has, from P::products<R, T>(n, rows, next, xs, out): out[k * T + t] = rows[k] .
// xs[t], with the same operations in the same order for every R and T.
template <typename P> void dots(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    switch (n_rows) {
        case 1: return P::template products<1, 1>(n, rows, next, &x, out);
        case 2: return P::template products<2, 1>(n, rows, next, &x, out);
        case 3: return P::template products<3, 1>(n, rows, next, &x, out);
        default: return P::template products<4, 1>(n, rows, next, &x, out);
    }
}

// Whether P has `four_rows` for T tokens: the same results, by instructions that want several rows.
template <typename P, int T> constexpr bool FOUR_ROWS = false;

template <typename P, int T> void rows_tokens(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * const * x, float * out) {
    if constexpr (FOUR_ROWS<P, T>) {
        if (n_rows == 4) {
            return P::template four_rows<T>(n, rows, next, x, out);
        }
    }
    for (int k = 0; k < n_rows; k++) {
        P::template products<1, T>(n, rows + k, next ? next + k : nullptr, x, out + k * T);
    }
}

template <typename P>
void dots_tokens(int64_t n, int n_rows, const char * const * rows, const char * const * next, int n_tokens, const void * const * x, float * out) {
    switch (n_tokens) {
        case 1: return rows_tokens<P, 1>(n, n_rows, rows, next, x, out);
        case 2: return rows_tokens<P, 2>(n, n_rows, rows, next, x, out);
        case 3: return rows_tokens<P, 3>(n, n_rows, rows, next, x, out);
        default: return rows_tokens<P, 4>(n, n_rows, rows, next, x, out);
    }
}

}  // namespace
