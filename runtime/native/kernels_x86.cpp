// The row kernels for x86-64, compiled once for AVX2 (with FMA and F16C) and once for AVX-512 (F, BW, DQ, VL, VBMI,
// VNNI, BF16): LZN_VARIANT names the table.
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

template <typename Rows, int R> void dots_float(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    using element = typename Rows::element;
    const element * xs = static_cast<const element *>(x);
    const element * w[R];
    vec acc[R];
    for (int k = 0; k < R; k++) {
        w[k] = reinterpret_cast<const element *>(rows[k]);
        acc[k] = zero();
    }
    for (int64_t i = 0; i < n; i += WIDTH) {
        const vec xv = Rows::get(xs + i);
        fetch<WIDTH * sizeof(element)>(next, R, i * sizeof(element));
        for (int k = 0; k < R; k++) {
            acc[k] = fma(Rows::get(w[k] + i), xv, acc[k]);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = sum(acc[k]);
    }
}

#if defined(__AVX512F__)
template <int R> void dots_bf16(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    vec acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = zero();
    }
    for (int64_t i = 0; i < n; i += BLOCK) {
        const __m512bh xv = (__m512bh)_mm512_loadu_si512(static_cast<const uint16_t *>(x) + i);
        fetch<64>(next, R, i * sizeof(uint16_t));
        for (int k = 0; k < R; k++) {
            acc[k] = _mm512_dpbf16_ps(acc[k], (__m512bh)_mm512_loadu_si512(reinterpret_cast<const uint16_t *>(rows[k]) + i), xv);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = sum(acc[k]);
    }
}
#else
template <int R> void dots_bf16(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) { dots_float<bf16_rows, R>(n, rows, next, x, out); }
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

// --- Q8_0, its accumulation -----------------------------------------------------------------------------------------

void axpys_q8_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    for (int64_t i = 0; i < n / BLOCK; i++) {
        vec sums[BLOCK / WIDTH];
        fetch<sizeof(block_q8_0)>(next, n_rows, i * sizeof(block_q8_0));
        for (vec & s : sums) {
            s = zero();
        }
        for (int k = 0; k < n_rows; k++) {
            const block_q8_0 & b = reinterpret_cast<const block_q8_0 *>(rows[k])[i];
            const vec c = all(a[k] * f16(b.d));
            for (int j = 0; j < BLOCK / WIDTH; j++) {
                sums[j] = fma(from_i8(b.qs + j * WIDTH), c, sums[j]);
            }
        }
        add_pass(sums, BLOCK / WIDTH, y + i * BLOCK);
    }
}

// --- tables ----------------------------------------------------------------------------------------------------------

using dots_fixed = void (*)(int64_t, const char * const *, const char * const *, const void *, float *);

template <dots_fixed One, dots_fixed Two, dots_fixed Three, dots_fixed Four>
void dots(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    static constexpr dots_fixed by_rows[] = {One, Two, Three, Four};
    by_rows[n_rows - 1](n, rows, next, x, out);
}

const row_kernels F32 = {dots<dots_float<f32_rows, 1>, dots_float<f32_rows, 2>, dots_float<f32_rows, 3>, dots_float<f32_rows, 4>>, axpys_float<f32_rows>, nullptr, nullptr, nullptr};
const row_kernels F16 = {dots<dots_float<f16_rows, 1>, dots_float<f16_rows, 2>, dots_float<f16_rows, 3>, dots_float<f16_rows, 4>>, axpys_float<f16_rows>, nullptr, nullptr, nullptr};
const row_kernels BF16 = {dots<dots_bf16<1>, dots_bf16<2>, dots_bf16<3>, dots_bf16<4>>, axpys_float<bf16_rows>, nullptr, nullptr, nullptr};
#if defined(__AVX512F__)
const row_kernels Q8_0 = {dots<dots_q8_0<1>, dots_q8_0<2>, dots_q8_0<3>, dots_q8_0<4>>, axpys_q8_0, q8_0_arranged_size, q8_0_arrange, nullptr};
#else
const row_kernels Q8_0 = {dots<dots_q8_0<1>, dots_q8_0<2>, dots_q8_0<3>, dots_q8_0<4>>, axpys_q8_0, nullptr, nullptr, nullptr};
#endif
const row_kernels Q4_0 = {dots<dots_q4_0<1>, dots_q4_0<2>, dots_q4_0<3>, dots_q4_0<4>>, axpys_q4_0, q4_0_arranged_size, q4_0_arrange, q4_0_finish};

}  // namespace

const row_kernels * lzn::LZN_VARIANT(int type) {
    switch (type) {
        case GGML_TYPE_F32: return &F32;
        case GGML_TYPE_F16: return &F16;
        case GGML_TYPE_BF16: return &BF16;
        case GGML_TYPE_Q8_0: return &Q8_0;
        case GGML_TYPE_Q4_0: return &Q4_0;
        default: return nullptr;
    }
}
