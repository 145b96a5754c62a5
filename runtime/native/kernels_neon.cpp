// The row kernels for aarch64 with the dot product instructions (ARMv8.2 dotprod; every Apple M, Graviton 2, Cortex-A55
// and later).
#include <arm_neon.h>

#include <cstring>

#include "ggml.h"
#include "kernels.h"

namespace {

using lzn::row_kernels;

struct block_q4_0 {
    uint16_t d;
    uint8_t qs[16];
};
struct block_q8_0 {
    uint16_t d;
    int8_t qs[32];
};
static_assert(sizeof(block_q4_0) == 18 && sizeof(block_q8_0) == 34, "as in ggml");

constexpr int BLOCK = 32;
constexpr int WIDTH = 4;

float f16(uint16_t bits) {
    __fp16 h;
    std::memcpy(&h, &bits, sizeof(h));
    return h;
}

// Fetch the cache lines that begin within the next `size` bytes after `at`.
template <size_t size> void fetch(const char * const * next, int n_rows, size_t at) {
    if (next && (size >= 64 || at % 64 < size)) {
        for (int k = 0; k < n_rows; k++) {
            for (size_t line = 0; line < size; line += 64) {
                __builtin_prefetch(next[k] + at + line);
            }
        }
    }
}

void clear(float32x4_t * sums, int n) {
    for (int j = 0; j < n; j++) {
        sums[j] = vdupq_n_f32(0.0f);
    }
}

// Adds the sums of one pass to y. They began at 0 and not at y: numbers lose less when they are added to small ones
// first.
void add_pass(const float32x4_t * sums, int n, float * y) {
    for (int j = 0; j < n; j++) {
        vst1q_f32(y + j * WIDTH, vaddq_f32(vld1q_f32(y + j * WIDTH), sums[j]));
    }
}

// --- plain numbers ---------------------------------------------------------------------------------------------------

struct f32_rows {
    using element = float;
    static float32x4_t get(const element * p) { return vld1q_f32(p); }
};
struct f16_rows {
    using element = uint16_t;
    static float32x4_t get(const element * p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
};
struct bf16_rows {
    using element = uint16_t;
    static float32x4_t get(const element * p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
};

// Two sums per row: one row alone would wait for its own additions.
template <typename Rows, int R> void dots_float(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    using element = typename Rows::element;
    const element * xs = static_cast<const element *>(x);
    float32x4_t acc[R][2];
    for (int k = 0; k < R; k++) {
        acc[k][0] = acc[k][1] = vdupq_n_f32(0.0f);
    }
    for (int64_t i = 0; i < n; i += 2 * WIDTH) {
        const float32x4_t x0 = Rows::get(xs + i), x1 = Rows::get(xs + i + WIDTH);
        fetch<2 * WIDTH * sizeof(element)>(next, R, i * sizeof(element));
        for (int k = 0; k < R; k++) {
            const element * w = reinterpret_cast<const element *>(rows[k]) + i;
            acc[k][0] = vfmaq_f32(acc[k][0], Rows::get(w), x0);
            acc[k][1] = vfmaq_f32(acc[k][1], Rows::get(w + WIDTH), x1);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = vaddvq_f32(vaddq_f32(acc[k][0], acc[k][1]));
    }
}

template <typename Rows> void axpys_float(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using element = typename Rows::element;
    constexpr int VECTORS = 4;
    for (int64_t i = 0; i < n; i += VECTORS * WIDTH) {
        float32x4_t sums[VECTORS];
        fetch<VECTORS * WIDTH * sizeof(element)>(next, n_rows, i * sizeof(element));
        clear(sums, VECTORS);
        for (int k = 0; k < n_rows; k++) {
            const element * w = reinterpret_cast<const element *>(rows[k]) + i;
            for (int j = 0; j < VECTORS; j++) {
                sums[j] = vfmaq_n_f32(sums[j], Rows::get(w + j * WIDTH), a[k]);
            }
        }
        add_pass(sums, VECTORS, y + i);
    }
}

// --- Q8_0 and Q4_0 ---------------------------------------------------------------------------------------------------

struct q8_0_rows {
    using block = block_q8_0;
    static int8x16x2_t weights(const block & b) { return {vld1q_s8(b.qs), vld1q_s8(b.qs + 16)}; }
};
struct q4_0_rows {
    using block = block_q4_0;
    static int8x16x2_t weights(const block & b) {
        const uint8x16_t q = vld1q_u8(b.qs);
        const int8x16_t offset = vdupq_n_s8(8);
        return {vsubq_s8(vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))), offset), vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(q, 4)), offset)};
    }
};

template <typename Rows, int R> void dots_block(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    using block = typename Rows::block;
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    float32x4_t acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = vdupq_n_f32(0.0f);
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const int8x16x2_t xv = q8_0_rows::weights(xs[i]);
        const float xd = f16(xs[i].d);
        fetch<sizeof(block)>(next, R, i * sizeof(block));
        for (int k = 0; k < R; k++) {
            const block & b = reinterpret_cast<const block *>(rows[k])[i];
            const int8x16x2_t w = Rows::weights(b);
            const int32x4_t p = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.val[0], xv.val[0]), w.val[1], xv.val[1]);
            acc[k] = vfmaq_n_f32(acc[k], vcvtq_f32_s32(p), f16(b.d) * xd);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = vaddvq_f32(acc[k]);
    }
}

// sums[0..3] += c * 16 weights
void add_bytes(float32x4_t * sums, int8x16_t w, float c) {
    const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(w)), vmovl_s8(vget_high_s8(w))};
    for (int h = 0; h < 2; h++) {
        sums[2 * h] = vfmaq_n_f32(sums[2 * h], vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[h]))), c);
        sums[2 * h + 1] = vfmaq_n_f32(sums[2 * h + 1], vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[h]))), c);
    }
}

template <typename Rows> void axpys_block(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using block = typename Rows::block;
    for (int64_t i = 0; i < n / BLOCK; i++) {
        float32x4_t sums[BLOCK / WIDTH];
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        clear(sums, BLOCK / WIDTH);
        for (int k = 0; k < n_rows; k++) {
            const block & b = reinterpret_cast<const block *>(rows[k])[i];
            const int8x16x2_t w = Rows::weights(b);
            const float c = a[k] * f16(b.d);
            add_bytes(sums, w.val[0], c);
            add_bytes(sums + 4, w.val[1], c);
        }
        add_pass(sums, BLOCK / WIDTH, y + i * BLOCK);
    }
}

// --- q4_K and q6_K ---------------------------------------------------------------------------------------------------

struct block_q4_K {
    uint16_t d, dmin;
    uint8_t scales[12];  // eight scales and eight minima of 6 bits
    uint8_t qs[128];     // of 64 columns the first 32 in the low nibbles, the others in the high ones
};
struct block_q6_K {
    uint8_t ql[128];     // of 128 columns the first 64 in the low nibbles, the others in the high ones
    uint8_t qh[64];      // of 128 columns four times 32, two bits each
    int8_t scales[16];
    uint16_t d;
};
struct block_q8_K {
    float d;
    int8_t qs[256];
    int16_t bsums[16];   // of 16 values each
};
static_assert(sizeof(block_q4_K) == 144 && sizeof(block_q6_K) == 210 && sizeof(block_q8_K) == 292, "as in ggml");

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
    static float dot(const block & b, const block_q8_K & x) {
        uint8_t scales[16];
        vst1q_u8(scales, packed(b));
        int32x4_t p = vdupq_n_s32(0);
        for (int r = 0; r < 16; r += 2) {
            const int32x4_t run = vdotq_s32(vdotq_s32(vdupq_n_s32(0), values(b, r), vld1q_s8(x.qs + 16 * r)), values(b, r + 1), vld1q_s8(x.qs + 16 * r + 16));
            p = vmlaq_n_s32(p, run, scales[r / 2]);
        }
        const int16x8_t sums = vpaddq_s16(vld1q_s16(x.bsums), vld1q_s16(x.bsums + 8)), least = vreinterpretq_s16_u16(vmovl_u8(vld1_u8(scales + 8)));
        const int32x4_t minus = vmlal_s16(vmull_s16(vget_low_s16(sums), vget_low_s16(least)), vget_high_s16(sums), vget_high_s16(least));
        return x.d * (f16(b.d) * vaddvq_s32(p) - f16(b.dmin) * vaddvq_s32(minus));
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
    static float dot(const block & b, const block_q8_K & x) {
        int32x4_t p = vdupq_n_s32(0);
        for (int r = 0; r < 16; r++) {
            p = vmlaq_n_s32(p, vdotq_s32(vdupq_n_s32(0), values(b, r), vld1q_s8(x.qs + 16 * r)), b.scales[r]);
        }
        return x.d * f16(b.d) * vaddvq_s32(p);
    }
    static void coefficients(const block & b, float a, float * scale, float *) {
        const float d = a * f16(b.d);
        for (int r = 0; r < 16; r++) {
            scale[r] = d * b.scales[r];
        }
    }
};

template <typename Rows> void dots_k(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    using block = typename Rows::block;
    float sums[lzn::DOT_ROWS] = {};
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        fetch<sizeof(block)>(next, n_rows, i * sizeof(block));
        for (int k = 0; k < n_rows; k++) {
            sums[k] += Rows::dot(reinterpret_cast<const block *>(rows[k])[i], static_cast<const block_q8_K *>(x)[i]);
        }
    }
    std::memcpy(out, sums, n_rows * sizeof(float));
}

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

// --- sign bits -------------------------------------------------------------------------------------------------------

void dots_signs(int64_t n, int n_rows, const char * const * rows, const char * const *, const void * x, float * out) {
    const uint8_t * signs = static_cast<const uint8_t *>(x);
    const int64_t n_bytes = n / 8;
    for (int k = 0; k < n_rows; k++) {
        const uint8_t * w = reinterpret_cast<const uint8_t *>(rows[k]);
        uint32x4_t count = vdupq_n_u32(0);
        int64_t i = 0;
        for (; i + 16 <= n_bytes; i += 16) {
            count = vpadalq_u16(count, vpaddlq_u8(vcntq_u8(veorq_u8(vld1q_u8(w + i), vld1q_u8(signs + i)))));
        }
        uint32_t differing = vaddvq_u32(count);
        for (; i < n_bytes; i++) {
            differing += __builtin_popcount(w[i] ^ signs[i]);
        }
        out[k] = -static_cast<float>(differing);
    }
}

// --- tables ----------------------------------------------------------------------------------------------------------

using dots_fixed = void (*)(int64_t, const char * const *, const char * const *, const void *, float *);

template <dots_fixed One, dots_fixed Two, dots_fixed Three, dots_fixed Four>
void dots(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    constexpr dots_fixed by_rows[] = {One, Two, Three, Four};
    by_rows[n_rows - 1](n, rows, next, x, out);
}

template <typename Rows> constexpr row_kernels float_table() {
    return {dots<dots_float<Rows, 1>, dots_float<Rows, 2>, dots_float<Rows, 3>, dots_float<Rows, 4>>, nullptr, axpys_float<Rows>, nullptr, nullptr, nullptr};
}
template <typename Rows> constexpr row_kernels block_table() {
    return {dots<dots_block<Rows, 1>, dots_block<Rows, 2>, dots_block<Rows, 3>, dots_block<Rows, 4>>, nullptr, axpys_block<Rows>, nullptr, nullptr, nullptr};
}

const row_kernels F32 = float_table<f32_rows>(), F16 = float_table<f16_rows>(), BF16 = float_table<bf16_rows>();
const row_kernels Q8_0 = block_table<q8_0_rows>(), Q4_0 = block_table<q4_0_rows>();
const row_kernels Q4_K = {dots_k<q4_K_rows>, nullptr, axpys_k<q4_K_rows>, nullptr, nullptr, nullptr}, Q6_K = {dots_k<q6_K_rows>, nullptr, axpys_k<q6_K_rows>, nullptr, nullptr, nullptr};
const row_kernels SIGNS = {dots_signs, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const row_kernels * lzn::kernels_neon(int type) {
    switch (type) {
        case GGML_TYPE_F32: return &F32;
        case GGML_TYPE_F16: return &F16;
        case GGML_TYPE_BF16: return &BF16;
        case GGML_TYPE_Q8_0: return &Q8_0;
        case GGML_TYPE_Q4_0: return &Q4_0;
        case GGML_TYPE_Q4_K: return &Q4_K;
        case GGML_TYPE_Q6_K: return &Q6_K;
        case GGML_TYPE_I8: return &SIGNS;
        default: return nullptr;
    }
}
