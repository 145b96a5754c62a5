// Products with several rows of weights at once: the inner loops of the operators. One table per weight type and variant of the CPU.
#pragma once

#include <cstdint>

namespace lzn {

constexpr int DOT_ROWS = 4;    // rows per pass over x
constexpr int AXPY_ROWS = 16;  // rows per pass over y

// Both fetch `next` into the cache on their way: as many rows as they read themselves, null for none.
struct row_kernels {
    // out[k] = rows[k] . x, for k < n_rows <= DOT_ROWS; x as ggml's from_float of the matching type left it
    void (*dots)(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out);
    // y += sum over k < n_rows <= AXPY_ROWS of a[k] * rows[k]
    void (*axpys)(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y);
};

// The tables of each variant; null where the variant has none of its own for a type, or was not built.
const row_kernels * kernels_avx2(int type);
const row_kernels * kernels_avx512(int type);

}  // namespace lzn
