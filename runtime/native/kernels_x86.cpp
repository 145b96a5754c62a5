// The row kernels for x86-64, compiled once for AVX2 (with FMA and F16C) and once for AVX-512 (F, BW, DQ, VL, VBMI, VNNI, BF16): LZN_VARIANT names the table.
//
// Integer products follow ggml: 4-bit weights are unsigned with an offset of 8, so w . x = q . x - 8 sum(x), and the offset is folded into the accumulator's start.
#include "kernels.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "ggml.h"

namespace {

using lzn::AXPY_ROWS;
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

#if defined(__AVX512F__)
using vec = __m512;
constexpr int WIDTH = 16;
vec zero() { return _mm512_setzero_ps(); }
vec all(float a) { return _mm512_set1_ps(a); }
vec load(const float * p) { return _mm512_loadu_ps(p); }
void store(float * p, vec v) { _mm512_storeu_ps(p, v); }
vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
float sum(vec v) { return _mm512_reduce_add_ps(v); }
vec load_f16(const uint16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
vec load_bf16(const uint16_t * p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
}
vec from_i8(const int8_t * p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)))); }
// 16 of the 32 weights of a Q4_0 block: the low nibbles (half 0) or the high ones.
vec from_q4(__m128i nibbles) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(nibbles), _mm512_set1_epi32(8))); }
#else
using vec = __m256;
constexpr int WIDTH = 8;
vec zero() { return _mm256_setzero_ps(); }
vec all(float a) { return _mm256_set1_ps(a); }
vec load(const float * p) { return _mm256_loadu_ps(p); }
void store(float * p, vec v) { _mm256_storeu_ps(p, v); }
vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
vec load_f16(const uint16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
vec load_bf16(const uint16_t * p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))), 16));
}
vec from_i8(const int8_t * p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(p)))); }
vec from_q4(__m128i nibbles) { return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(nibbles), _mm256_set1_epi32(8))); }
#endif

float f16(uint16_t h) { return _cvtsh_ss(h); }

float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// start + four-by-four sums of unsigned times signed bytes
__m256i dot_bytes(__m256i start, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__)
    return _mm256_dpbusd_epi32(start, u, s);
#else
    return _mm256_add_epi32(start, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// Fetch the cache lines that begin within the next `size` bytes after `at`.
template <size_t size> void fetch(const char * const * next, int n_rows, size_t at) {
    if (next && (size >= 64 || at % 64 < size)) {
        for (int k = 0; k < n_rows; k++) {
            for (size_t line = 0; line < size; line += 64) {
                _mm_prefetch(next[k] + at + line, _MM_HINT_T0);
            }
        }
    }
}

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

#if defined(__AVX512BF16__)
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
        vec y0 = load(y + i), y1 = load(y + i + WIDTH);
        fetch<STEP * sizeof(element)>(next, n_rows, i * sizeof(element));
        for (int k = 0; k < n_rows; k++) {
            const element * w = reinterpret_cast<const element *>(rows[k]) + i;
            const vec c = all(a[k]);
            y0 = fma(Rows::get(w), c, y0);
            y1 = fma(Rows::get(w + WIDTH), c, y1);
        }
        store(y + i, y0);
        store(y + i + WIDTH, y1);
    }
}

// --- Q8_0 and Q4_0 ---------------------------------------------------------------------------------------------------

struct q8_0_rows {
    using block = block_q8_0;
    static constexpr int OFFSET = 128;  // added to make the weights unsigned
    static __m256i unsigned_weights(const block & b) {
        return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs)), _mm256_set1_epi8(static_cast<char>(0x80)));
    }
};
struct q4_0_rows {
    using block = block_q4_0;
    static constexpr int OFFSET = 8;
    static __m256i unsigned_weights(const block & b) {
        const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.qs));
        return _mm256_and_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(q), _mm_srli_epi16(q, 4), 1), _mm256_set1_epi8(15));
    }
};

#if defined(__AVX512VNNI__)
template <typename Rows> __m256i products(const typename Rows::block & b, __m256i x, __m256i start) { return dot_bytes(start, Rows::unsigned_weights(b), x); }
#else
// Sums of two products of full bytes would overflow 16 bits: signed weights take the sign of x instead.
template <typename Rows> __m256i products(const typename Rows::block & b, __m256i x, __m256i start);
template <> inline __m256i products<q4_0_rows>(const block_q4_0 & b, __m256i x, __m256i start) { return dot_bytes(start, q4_0_rows::unsigned_weights(b), x); }
template <> inline __m256i products<q8_0_rows>(const block_q8_0 & b, __m256i x, __m256i) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b.qs));
    return dot_bytes(_mm256_setzero_si256(), _mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
}
#endif

template <typename Rows, int R> void dots_block(int64_t n, const char * const * rows, const char * const * next, const void * x, float * out) {
    using block = typename Rows::block;
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(Rows::OFFSET));
    __m256 acc[R];
    for (int k = 0; k < R; k++) {
        acc[k] = _mm256_setzero_ps();
    }
    for (int64_t i = 0; i < n / BLOCK; i++) {
        const __m256i xv = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(xs[i].qs));
        const __m256i start = _mm256_sub_epi32(_mm256_setzero_si256(), dot_bytes(_mm256_setzero_si256(), offset, xv));
        const float xd = f16(xs[i].d);
        fetch<sizeof(block)>(next, R, i * sizeof(block));
        for (int k = 0; k < R; k++) {
            const block & b = reinterpret_cast<const block *>(rows[k])[i];
            acc[k] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products<Rows>(b, xv, start)), _mm256_set1_ps(f16(b.d) * xd), acc[k]);
        }
    }
    for (int k = 0; k < R; k++) {
        out[k] = sum8(acc[k]);
    }
}

void axpys_q8_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    for (int64_t i = 0; i < n / BLOCK; i++) {
        vec sums[BLOCK / WIDTH];
        fetch<sizeof(block_q8_0)>(next, n_rows, i * sizeof(block_q8_0));
        for (int j = 0; j < BLOCK / WIDTH; j++) {
            sums[j] = load(y + i * BLOCK + j * WIDTH);
        }
        for (int k = 0; k < n_rows; k++) {
            const block_q8_0 & b = reinterpret_cast<const block_q8_0 *>(rows[k])[i];
            const vec c = all(a[k] * f16(b.d));
            for (int j = 0; j < BLOCK / WIDTH; j++) {
                sums[j] = fma(from_i8(b.qs + j * WIDTH), c, sums[j]);
            }
        }
        for (int j = 0; j < BLOCK / WIDTH; j++) {
            store(y + i * BLOCK + j * WIDTH, sums[j]);
        }
    }
}

void axpys_q4_0_float(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    constexpr int PARTS = 16 / WIDTH;  // vectors per half block
    for (int64_t i = 0; i < n / BLOCK; i++) {
        vec sums[2 * PARTS];
        fetch<sizeof(block_q4_0)>(next, n_rows, i * sizeof(block_q4_0));
        for (int j = 0; j < 2 * PARTS; j++) {
            sums[j] = load(y + i * BLOCK + j * WIDTH);
        }
        for (int k = 0; k < n_rows; k++) {
            const block_q4_0 & b = reinterpret_cast<const block_q4_0 *>(rows[k])[i];
            const vec c = all(a[k] * f16(b.d));
            const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b.qs)), mask = _mm_set1_epi8(15);
            const __m128i halves[2] = {_mm_and_si128(q, mask), _mm_and_si128(_mm_srli_epi16(q, 4), mask)};
            for (int h = 0; h < 2; h++) {
                sums[h * PARTS] = fma(from_q4(halves[h]), c, sums[h * PARTS]);
                if (PARTS == 2) {
                    sums[h * PARTS + PARTS - 1] = fma(from_q4(_mm_srli_si128(halves[h], 8)), c, sums[h * PARTS + PARTS - 1]);
                }
            }
        }
        for (int j = 0; j < 2 * PARTS; j++) {
            store(y + i * BLOCK + j * WIDTH, sums[j]);
        }
    }
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// 16 bytes of each of four rows, side by side.
__m512i four_rows(const void * a, const void * b, const void * c, const void * d) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i *>(a)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128(static_cast<const __m128i *>(b)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128(static_cast<const __m128i *>(c)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128(static_cast<const __m128i *>(d)), 3);
}

// Four rows per pass: a lane of 16 bytes is one row's nibbles, against the same 16 values of x in every lane.
void dots_q4_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    const block_q4_0 * w[4];
    for (int k = 0; k < 4; k++) {
        w[k] = reinterpret_cast<const block_q4_0 *>(rows[k < n_rows ? k : 0]);
    }
    const block_q8_0 * xs = static_cast<const block_q8_0 *>(x);
    const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8), none = _mm512_setzero_si512();
    // The first word of a block is its scale: each row's four times, for the four sums of its lane.
    const __m512i scale_words = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 24, 24, 24, 24, 16, 16, 16, 16, 8, 8, 8, 8, 0, 0, 0, 0);
    vec acc = zero();
    for (int64_t i = 0; i < n / BLOCK; i++) {
        fetch<sizeof(block_q4_0)>(next, n_rows, i * sizeof(block_q4_0));
        const __m512i low_x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(xs[i].qs)));
        const __m512i high_x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(xs[i].qs + 16)));
        const __m512i minus = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, offset, low_x), offset, high_x);
        const __m512i q = four_rows(w[0][i].qs, w[1][i].qs, w[2][i].qs, w[3][i].qs);
        __m512i p = _mm512_dpbusd_epi32(_mm512_sub_epi32(none, minus), _mm512_and_si512(q, mask), low_x);
        p = _mm512_dpbusd_epi32(p, _mm512_and_si512(_mm512_srli_epi16(q, 4), mask), high_x);
        const __m512i scales = _mm512_permutexvar_epi16(scale_words, four_rows(w[0] + i, w[1] + i, w[2] + i, w[3] + i));
        const vec d = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(scales)), all(f16(xs[i].d)));
        acc = fma(_mm512_cvtepi32_ps(p), d, acc);
    }
    alignas(64) float sums[16];
    store(sums, acc);
    for (int k = 0; k < n_rows; k++) {
        out[k] = (sums[4 * k] + sums[4 * k + 1]) + (sums[4 * k + 2] + sums[4 * k + 3]);
    }
}

// Sixteen rows per pass in integers: the coefficients a[k] * d[k] of one block are rounded to 8 bits of the largest among them (ggml rounds the activations of a dense product as much),
// the four rows of a group are interleaved byte by byte, and one instruction multiplies four weights with four coefficients.
void axpys_q4_0(int64_t n, int n_rows, const char * const * rows, const char * const * next, const float * a, float * y) {
    if (n_rows < AXPY_ROWS / 2) {
        return axpys_q4_0_float(n, n_rows, rows, next, a, y);
    }
    alignas(64) float padded[AXPY_ROWS] = {};
    const block_q4_0 * w[AXPY_ROWS];
    for (int k = 0; k < AXPY_ROWS; k++) {
        w[k] = reinterpret_cast<const block_q4_0 *>(rows[k < n_rows ? k : 0]);
        padded[k] = k < n_rows ? a[k] : 0.0f;
    }
    alignas(64) uint8_t order[64];
    for (int i = 0; i < 64; i++) {
        order[i] = static_cast<uint8_t>(i % 4 * 16 + i / 4);
    }
    const __m512i interleave = _mm512_load_si512(order), mask = _mm512_set1_epi8(15);
    const __m512 strengths = _mm512_load_ps(padded);
    // The first words of eight blocks, side by side.
    const __m512i scale_words = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 56, 48, 40, 32, 24, 16, 8, 0);
    for (int64_t i = 0; i < n / BLOCK; i++) {
        fetch<sizeof(block_q4_0)>(next, n_rows, i * sizeof(block_q4_0));
        const __m512i first = _mm512_permutex2var_epi16(four_rows(w[0] + i, w[1] + i, w[2] + i, w[3] + i), scale_words, four_rows(w[4] + i, w[5] + i, w[6] + i, w[7] + i));
        const __m512i second = _mm512_permutex2var_epi16(four_rows(w[8] + i, w[9] + i, w[10] + i, w[11] + i), scale_words, four_rows(w[12] + i, w[13] + i, w[14] + i, w[15] + i));
        const __m256i scales = _mm256_inserti128_si256(_mm512_castsi512_si256(first), _mm512_castsi512_si128(second), 1);
        const __m512 c = _mm512_mul_ps(strengths, _mm512_cvtph_ps(scales));
        const float largest = _mm512_reduce_max_ps(_mm512_abs_ps(c));
        if (largest == 0.0f) {
            continue;
        }
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(c, _mm512_set1_ps(127.0f / largest)));
        alignas(16) int32_t groups[AXPY_ROWS / 4];
        _mm_store_si128(reinterpret_cast<__m128i *>(groups), _mm512_cvtepi32_epi8(rounded));
        __m512i low = _mm512_set1_epi32(-8 * _mm512_reduce_add_epi32(rounded)), high = low;
        for (int g = 0; g < AXPY_ROWS / 4; g++) {
            __m512i q = four_rows(w[4 * g][i].qs, w[4 * g + 1][i].qs, w[4 * g + 2][i].qs, w[4 * g + 3][i].qs);
            q = _mm512_permutexvar_epi8(interleave, q);
            const __m512i four = _mm512_set1_epi32(groups[g]);
            low = _mm512_dpbusd_epi32(low, _mm512_and_si512(q, mask), four);
            high = _mm512_dpbusd_epi32(high, _mm512_and_si512(_mm512_srli_epi16(q, 4), mask), four);
        }
        const vec unit = all(largest / 127.0f);
        float * out = y + i * BLOCK;
        store(out, fma(_mm512_cvtepi32_ps(low), unit, load(out)));
        store(out + 16, fma(_mm512_cvtepi32_ps(high), unit, load(out + 16)));
    }
}
#endif

// --- tables ----------------------------------------------------------------------------------------------------------

using dots_fixed = void (*)(int64_t, const char * const *, const char * const *, const void *, float *);

template <dots_fixed One, dots_fixed Two, dots_fixed Three, dots_fixed Four>
void dots(int64_t n, int n_rows, const char * const * rows, const char * const * next, const void * x, float * out) {
    constexpr dots_fixed by_rows[] = {One, Two, Three, Four};
    by_rows[n_rows - 1](n, rows, next, x, out);
}

const row_kernels F32 = {dots<dots_float<f32_rows, 1>, dots_float<f32_rows, 2>, dots_float<f32_rows, 3>, dots_float<f32_rows, 4>>, axpys_float<f32_rows>};
const row_kernels F16 = {dots<dots_float<f16_rows, 1>, dots_float<f16_rows, 2>, dots_float<f16_rows, 3>, dots_float<f16_rows, 4>>, axpys_float<f16_rows>};
const row_kernels BF16 = {dots<dots_bf16<1>, dots_bf16<2>, dots_bf16<3>, dots_bf16<4>>, axpys_float<bf16_rows>};
const row_kernels Q8_0 = {dots<dots_block<q8_0_rows, 1>, dots_block<q8_0_rows, 2>, dots_block<q8_0_rows, 3>, dots_block<q8_0_rows, 4>>, axpys_q8_0};
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
const row_kernels Q4_0 = {dots_q4_0, axpys_q4_0};
#else
const row_kernels Q4_0 = {dots<dots_block<q4_0_rows, 1>, dots_block<q4_0_rows, 2>, dots_block<q4_0_rows, 3>, dots_block<q4_0_rows, 4>>, axpys_q4_0_float};
#endif

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
