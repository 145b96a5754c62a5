// Products with several rows of weights at once: the inner loops of the operators. One table per weight type and
// variant of the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lzn {

constexpr int DOT_ROWS = 4;     // rows per pass over x, at most
constexpr int DOT_TOKENS = 4;   // tokens per pass over a row, at most
constexpr int AXPY_ROWS = 16;   // rows per pass over y, at most
constexpr int64_t GROUP = 128;  // y has room for a multiple of this many elements: a kernel may take columns by as many

// All products fetch `next` into the cache on their way: as many rows as they read themselves, null for none.
struct row_kernels {
    // out[k] = rows[k] . x, for k < n_rows <= DOT_ROWS; x as `arrange` left it, or as ggml's from_float of the matching
    // type did where that is null
    void (*dots)(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out);
    // out[k * n_tokens + t] = rows[k] . x[t], for k < n_rows <= DOT_ROWS and t < n_tokens <= DOT_TOKENS, with each row
    // unpacked once. The same bits as `dots` gives with any number of rows. Null where there is nothing to gain.
    void (*dots_tokens)(int64_t n, int n_rows, const char * const * rows, const char * const * next, int n_tokens, const void * const * x, float * out);
    // y += sum over k < n_rows <= AXPY_ROWS of a[k] * rows[k]; y is in the kernel's own order until `finish`
    void (*axpys)(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y);
    // Bytes of an arranged x, a multiple of 64; and arranges x, once per token, for many rows. Null for neither.
    size_t (*arranged_size)(int64_t n);
    void (*arrange)(int64_t n, const void * x, void * out);
    // Puts y in order; null where it is.
    void (*finish)(int64_t n, float * y);
};

// The tables of each variant, those of k-quants and of more formats in blocks; null where a table has no such type.
const row_kernels * kernels_avx2(int type);
const row_kernels * kernels_avxvnni(int type);
const row_kernels * kernels_avx512(int type);
const row_kernels * k_kernels_avx2(int type);
const row_kernels * k_kernels_avxvnni(int type);
const row_kernels * k_kernels_avx512(int type);
const row_kernels * blocks_kernels_avx2(int type);
const row_kernels * blocks_kernels_avxvnni(int type);
const row_kernels * blocks_kernels_avx512(int type);
const row_kernels * kernels_neon(int type);
const row_kernels * kernels_i8mm(int type);

// Rows of sign bits, ggml type I8: n of them, eight to a byte, against n sign bits; dots gives -(how many differ), and
// there are no axpys.
extern const row_kernels signs_avx2;
extern const row_kernels signs_avxvnni;
extern const row_kernels signs_avx512;

}  // namespace lzn
