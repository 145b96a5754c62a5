// The row kernels for aarch64, compiled once with the dot product instructions (ARMv8.2 dotprod; every Apple M, Graviton 2,
// Cortex-A55 and later) and once with those for matrices of 8-bit numbers too (i8mm; Apple M2, Graviton 3, Cortex-A510 and
// later): LZN_VARIANT names the table.
#include "k_quants_neon.h"
#include "quants_neon.h"

namespace {

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

// Two sums per product: one would wait for its own additions.
template <typename Rows> struct of_floats {
    using element = typename Rows::element;

    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        float32x4_t acc[R][T][2];
        clear(acc[0][0], 2 * R * T);
        for (int64_t i = 0; i < n; i += 2 * WIDTH) {
            fetch<2 * WIDTH * sizeof(element)>(next, R, i * sizeof(element));
            for (int half = 0; half < 2; half++) {
                float32x4_t x[T];
                for (int t = 0; t < T; t++) {
                    x[t] = Rows::get(static_cast<const element *>(xs[t]) + i + half * WIDTH);
                }
                for (int k = 0; k < R; k++) {
                    const float32x4_t w = Rows::get(reinterpret_cast<const element *>(rows[k]) + i + half * WIDTH);
                    for (int t = 0; t < T; t++) {
                        acc[k][t][half] = vfmaq_f32(acc[k][t][half], w, x[t]);
                    }
                }
            }
        }
        for (int k = 0; k < R; k++) {
            for (int t = 0; t < T; t++) {
                out[k * T + t] = sum(vaddq_f32(acc[k][t][0], acc[k][t][1]));
            }
        }
    }
};

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

template <typename Rows> constexpr row_kernels float_table() { return {dots<of_floats<Rows>>, dots_tokens<of_floats<Rows>>, axpys_float<Rows>, nullptr, nullptr, nullptr}; }
template <typename Rows> constexpr row_kernels block_table() {
    return {dots<of_blocks<Rows>>, dots_tokens<of_blocks<Rows>>, axpys_block<Rows>, arranged_size_of_blocks, arrange_blocks<Rows>, nullptr};
}
template <typename Rows> constexpr row_kernels k_table() { return {dots<of_k<Rows>>, dots_tokens<of_k<Rows>>, axpys_k<Rows>, nullptr, nullptr, nullptr}; }

const row_kernels F32 = float_table<f32_rows>(), F16 = float_table<f16_rows>(), BF16 = float_table<bf16_rows>();
const row_kernels Q8_0 = block_table<q8_0_rows>(), Q4_0 = block_table<q4_0_rows>();
const row_kernels Q4_K = k_table<q4_K_rows>(), Q6_K = k_table<q6_K_rows>();
const row_kernels SIGNS = {dots_signs, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

const row_kernels * lzn::LZN_VARIANT(int type) {
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
