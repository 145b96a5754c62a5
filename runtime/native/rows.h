// How the operators read rows, and how work is dealt to threads.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "lazyneuron.h"

namespace lzn {

constexpr size_t CACHE_LINE = 64;
constexpr int64_t ROWS_AHEAD = 4;  // of those that are scanned one after the other; so many are fetched before their turn
constexpr int64_t ROW_BLOCK = 64;  // rows that stay in L2, and are dealt to threads together: hot ones lie side by side

inline size_t aligned(size_t size) { return (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// ggml aligns its tensors to less than our loops like: operators' results are longer by a cache line.
inline char * aligned(void * p) { return reinterpret_cast<char *>(aligned(reinterpret_cast<uintptr_t>(p))); }

inline int64_t split(int64_t n, int ith, int nth) { return n * ith / nth; }

// An operator's sources, one after the other.
class sources {
  public:
    explicit sources(const ggml_tensor * dst) : at_(dst->src) {}
    const ggml_tensor * next() { return *at_++; }
    const ggml_tensor * next_if(bool present) { return present ? next() : nullptr; }

  private:
    ggml_tensor * const * at_;
};

inline const row_kernels * kernels_of(const lzn_rows & rows) { return static_cast<const row_kernels *>(rows.kernels); }

inline const char * row_of(const ggml_tensor * weights, const lzn_rows & rows, int64_t r) {
    return static_cast<const char *>(weights->data) + r * rows.stride;
}

inline float bias_of(const ggml_tensor * bias, int64_t r) {
    return bias ? static_cast<const float *>(bias->data)[r] : 0.0f;
}

// One token's activations as `rows` want them.
inline void prepare(const lzn_rows & rows, int64_t n, const float * x, char * out) {
    rows.from_float(x, out + rows.arranged_size, n);
    if (rows.arranged_size) {
        kernels_of(rows)->arrange(n, out + rows.arranged_size, out);
    }
}

// Several products with one x, the rows' own kernels or ggml's; `next` is fetched meanwhile if it is not null.
inline void dots(const lzn_rows & rows, int64_t n, int n_rows, const char * const * row, const char * const * next,
                 const char * x_token, float * out) {
    const void * x = x_token + rows.x_offset;
    if (rows.kernels) {
        return kernels_of(rows)->dots(n, n_rows, row, next, x, out);
    }
    for (int k = 0; k < n_rows; k++) {
        rows.vec_dot(static_cast<int>(n), out + k, 0, row[k], 0, x, 0, 1);
    }
}

// Up to DOT_ROWS rows with several tokens' x, at most DOT_TOKENS, out[k * n_tokens + t]: the same bits as one by one.
// next: null or as many rows to fetch.
inline void dots_tokens(const lzn_rows & rows, int64_t n, int n_rows, const char * const * row,
                        const char * const * next, int n_tokens, const char * const * x_tokens, float * out) {
    if (n_tokens == 1) {
        return dots(rows, n, n_rows, row, next, x_tokens[0], out);
    }
    if (!rows.kernels || !kernels_of(rows)->dots_tokens) {
        for (int t = 0; t < n_tokens; t++) {
            float one[DOT_ROWS];
            dots(rows, n, n_rows, row, t ? nullptr : next, x_tokens[t], one);
            for (int k = 0; k < n_rows; k++) {
                out[k * n_tokens + t] = one[k];
            }
        }
        return;
    }
    const void * x[DOT_TOKENS];
    for (int t = 0; t < n_tokens; t++) {
        x[t] = x_tokens[t] + rows.x_offset;
    }
    kernels_of(rows)->dots_tokens(n, n_rows, row, next, n_tokens, x, out);
}

// How many rows that follow each other a pass takes: one stream of them is what the hardware follows, and several only
// save where x is read for each again.
inline int rows_together(int n_tokens) { return n_tokens > 1 ? DOT_ROWS : 1; }

// The rows first .. first + n_rows - 1.
inline void consecutive(const ggml_tensor * weights, const lzn_rows & rows, int64_t first, int n_rows, const char ** out) {
    for (int k = 0; k < n_rows; k++) {
        out[k] = row_of(weights, rows, first + k);
    }
}

}  // namespace lzn
