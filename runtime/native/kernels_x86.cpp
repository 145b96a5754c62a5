// The row kernels for x86-64, compiled once for AVX2 (with FMA and F16C), once for the same with AVX-VNNI and once for
// AVX-512 (F, BW, DQ, VL, VBMI, VNNI, BF16): LZN_VARIANT names the table.
#include "x86.h"

#if defined(__AVX512F__)
#include "quants_avx512.h"
#else
#include "quants_avx2.h"
#endif

namespace {

// --- plain numbers ---------------------------------------------------------------------------------------------------

struct f32_rows {
    using element = float;
    static vec get(const element * p) { return load(p); }
};
struct f16_rows {
    using element = uint16_t;
    static vec get(const element * p) { return load_f16(p); }
};
struct bf16_rows {
    using element = uint16_t;
    static vec get(const element * p) { return load_bf16(p); }
};

// Two sums per product: one would wait for its own additions.
template <typename Rows> struct of_floats {
    using element = typename Rows::element;

    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        vec acc[R][T][2];
        for (auto & row : acc) {
            for (auto & pair : row) {
                pair[0] = pair[1] = zero();
            }
        }
        for (int64_t i = 0; i < n; i += 2 * WIDTH) {
            fetch<2 * WIDTH * sizeof(element)>(next, R, i * sizeof(element));
            for (int half = 0; half < 2; half++) {
                vec x[T];
                for (int t = 0; t < T; t++) {
                    x[t] = Rows::get(static_cast<const element *>(xs[t]) + i + half * WIDTH);
                }
                for (int k = 0; k < R; k++) {
                    const vec w = Rows::get(reinterpret_cast<const element *>(rows[k]) + i + half * WIDTH);
                    for (int t = 0; t < T; t++) {
                        acc[k][t][half] = fma(w, x[t], acc[k][t][half]);
                    }
                }
            }
        }
        for (int k = 0; k < R; k++) {
            for (int t = 0; t < T; t++) {
                out[k * T + t] = sum(add(acc[k][t][0], acc[k][t][1]));
            }
        }
    }
};

#if defined(__AVX512F__)
struct bf16_products {
    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        vec acc[R][T];
        for (auto & row : acc) {
            for (vec & a : row) {
                a = zero();
            }
        }
        for (int64_t i = 0; i < n; i += BLOCK) {
            fetch<64>(next, R, i * sizeof(uint16_t));
            for (int k = 0; k < R; k++) {
                const __m512bh w = (__m512bh)_mm512_loadu_si512(reinterpret_cast<const uint16_t *>(rows[k]) + i);
                for (int t = 0; t < T; t++) {
                    acc[k][t] = _mm512_dpbf16_ps(acc[k][t], w, (__m512bh)_mm512_loadu_si512(static_cast<const uint16_t *>(xs[t]) + i));
                }
            }
        }
        for (int k = 0; k < R; k++) {
            for (int t = 0; t < T; t++) {
                out[k * T + t] = sum(acc[k][t]);
            }
        }
    }
};
#else
using bf16_products = of_floats<bf16_rows>;
#endif

template <typename Rows> void axpys_float(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    using element = typename Rows::element;
    constexpr int STEP = 2 * WIDTH;
    for (int64_t i = 0; i < n; i += STEP) {
        vec sums[2] = {zero(), zero()};
        fetch<STEP * sizeof(element)>(next, n_rows, i * sizeof(element));
        for (int k = 0; k < n_rows; k++) {
            const element * w = reinterpret_cast<const element *>(rows[k]) + i;
            const vec c = all(a[k]);
            sums[0] = fma(Rows::get(w), c, sums[0]);
            sums[1] = fma(Rows::get(w + WIDTH), c, sums[1]);
        }
        add_pass(sums, 2, y + i);
    }
}

// --- tables ----------------------------------------------------------------------------------------------------------

template <typename P> constexpr row_kernels table(decltype(row_kernels::axpys) axpys, decltype(row_kernels::arranged_size) arranged_size = nullptr,
                                                  decltype(row_kernels::arrange) arrange = nullptr, decltype(row_kernels::finish) finish = nullptr) {
    return {dots<P>, dots_tokens<P>, axpys, arranged_size, arrange, finish};
}

const row_kernels F32 = table<of_floats<f32_rows>>(axpys_float<f32_rows>), F16 = table<of_floats<f16_rows>>(axpys_float<f16_rows>);
const row_kernels BF16 = table<bf16_products>(axpys_float<bf16_rows>);
#if defined(__AVX512F__)
const row_kernels Q4_0 = table<q4_0_products>(axpys_q4_0, q4_0_arranged_size, q4_0_arrange, q4_0_finish);
#else
const row_kernels Q4_0 = table<of_blocks<q4_0_rows>>(axpys_blocks<q4_0_rows>, arranged_size_of_blocks, arrange_blocks<q4_0_rows>, finish_blocks<q4_0_rows>);
#endif

}  // namespace

const row_kernels * lzn::LZN_VARIANT(int type) {
    switch (type) {
        case GGML_TYPE_F32: return &F32;
        case GGML_TYPE_F16: return &F16;
        case GGML_TYPE_BF16: return &BF16;
        case GGML_TYPE_Q4_0: return &Q4_0;
        default: return nullptr;
    }
}
