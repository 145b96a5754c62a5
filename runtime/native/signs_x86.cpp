// Rows of sign bits against sign bits, for AVX2 and for AVX-512 (with VPOPCNTDQ): LZN_SIGNS names the table.
// Whole numbers, so every variant gives the same bits.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

#if defined(__AVX512VPOPCNTDQ__)
int64_t differing(int64_t n_bytes, const char * a, const char * b) {
    __m512i count = _mm512_setzero_si512();
    for (int64_t i = 0; i < n_bytes; i += 64) {
        const __mmask64 rest = n_bytes - i < 64 ? (1ull << (n_bytes - i)) - 1 : ~0ull;
        const __m512i differ = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, a + i), _mm512_maskz_loadu_epi8(rest, b + i));
        count = _mm512_add_epi64(count, _mm512_popcnt_epi64(differ));
    }
    return _mm512_reduce_add_epi64(count);
}
#else
int64_t differing(int64_t n_bytes, const char * a, const char * b) {
    // How many bits each number of four bits has.
    const __m256i counts = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i count = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= n_bytes; i += 32) {
        const __m256i differ = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(a + i)), _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b + i)));
        const __m256i low = _mm256_shuffle_epi8(counts, _mm256_and_si256(differ, mask));
        const __m256i high = _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi16(differ, 4), mask));
        count = _mm256_add_epi64(count, _mm256_sad_epu8(_mm256_add_epi8(low, high), _mm256_setzero_si256()));
    }
    alignas(32) int64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i *>(parts), count);
    int64_t n = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    for (; i < n_bytes; i++) {
        n += __builtin_popcount(static_cast<unsigned char>(a[i] ^ b[i]));
    }
    return n;
}
#endif

void dots(int64_t n, int n_rows, const char * const * rows, const char * const *, const void * x, float * out) {
    for (int k = 0; k < n_rows; k++) {
        out[k] = -static_cast<float>(differing(n / 8, rows[k], static_cast<const char *>(x)));
    }
}

}  // namespace

const lzn::row_kernels lzn::LZN_SIGNS = {dots, nullptr, nullptr, nullptr, nullptr, nullptr};
