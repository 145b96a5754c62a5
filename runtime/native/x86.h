// What all x86-64 kernels share: vectors as wide as the variant has them, prefetching.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "ggml.h"
#include "ggml_blocks.h"
#include "kernels.h"

namespace {

using lzn::AXPY_ROWS;
using lzn::row_kernels;

static_assert(lzn::DOT_ROWS == 4 && lzn::DOT_TOKENS == 4, "as `dots` and `dots_tokens` have cases");

constexpr int BLOCK = 32;

#if defined(__AVX512F__) && !defined(LZN_256_BITS)
using vec = __m512;
constexpr int WIDTH = 16;
inline vec zero() { return _mm512_setzero_ps(); }
inline vec all(float a) { return _mm512_set1_ps(a); }
inline vec load(const float * p) { return _mm512_loadu_ps(p); }
inline void store(float * p, vec v) { _mm512_storeu_ps(p, v); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(vec v) { return _mm512_reduce_add_ps(v); }
inline vec load_f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
inline vec load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
}
inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
inline vec from_i8(const int8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))); }
#else
using vec = __m256;
constexpr int WIDTH = 8;
inline vec zero() { return _mm256_setzero_ps(); }
inline vec all(float a) { return _mm256_set1_ps(a); }
inline vec load(const float * p) { return _mm256_loadu_ps(p); }
inline void store(float * p, vec v) { _mm256_storeu_ps(p, v); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline vec load_f16(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline vec load_bf16(const uint16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
}
inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
inline vec from_i8(const int8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))); }
#endif

inline float f16(uint16_t h) { return _cvtsh_ss(h); }

// Adds the sums of one pass to y. They began at 0 and not at y: numbers lose less when they are added to small ones
// first.
inline void add_pass(const vec * sums, int n, float * y) {
    for (int j = 0; j < n; j++) {
        store(y + j * WIDTH, add(load(y + j * WIDTH), sums[j]));
    }
}

// Fetch what follows the first `at` bytes of some rows, `size` bytes, a line at a time: no line twice.
template <size_t size> void fetch(const char * const * next, int n_rows, size_t at) {
    if (!next) {
        return;
    }
    for (size_t line = (at + 63) / 64 * 64; line < at + size; line += 64) {
        for (int k = 0; k < n_rows; k++) {
            _mm_prefetch(next[k] + line, _MM_HINT_T1);
        }
    }
}

// The same of one row, by the lines as memory has them, wherever the row begins.
inline void fetch_lines(const char * const * next, size_t at, size_t size) {
    if (!next) {
        return;
    }
    const uintptr_t from = reinterpret_cast<uintptr_t>(*next) + at;
    for (uintptr_t line = (at ? from + 63 : from) / 64 * 64; line < from + size; line += 64) {
        _mm_prefetch(reinterpret_cast<const char *>(line), _MM_HINT_T1);
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

// How many rows P takes at once for several tokens: several, where their x would not stay in L1 otherwise.
template <typename P> constexpr int TOKEN_ROWS = 1;

template <typename P, int R>
void rows_tokens(int64_t n, const char * const * rows, const char * const * next, int n_tokens, const void * const * x, float * out) {
    switch (n_tokens) {
        case 1: return P::template products<R, 1>(n, rows, next, x, out);
        case 2: return P::template products<R, 2>(n, rows, next, x, out);
        case 3: return P::template products<R, 3>(n, rows, next, x, out);
        default: return P::template products<R, 4>(n, rows, next, x, out);
    }
}

template <typename P>
void dots_tokens(int64_t n, int n_rows, const char * const * rows, const char * const * next, int n_tokens, const void * const * x, float * out) {
    constexpr int R = TOKEN_ROWS<P>;
    int k = 0;
    for (; k + R <= n_rows; k += R) {
        rows_tokens<P, R>(n, rows + k, next ? next + k : nullptr, n_tokens, x, out + k * n_tokens);
    }
    for (; k < n_rows; k++) {
        rows_tokens<P, 1>(n, rows + k, next ? next + k : nullptr, n_tokens, x, out + k * n_tokens);
    }
}

}  // namespace
