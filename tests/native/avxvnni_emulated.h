// Two instructions of AVX-VNNI in plain C++, for a build of its kernels that every CPU with AVX2 can run: included before
// everything else, it makes the compiler's intrinsics these functions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Each 32-bit number of sums + four products of unsigned bytes with signed ones.
inline __m256i emulated_dpbusd(__m256i sums, __m256i u, __m256i s) {
    uint32_t out[8];
    uint8_t first[32];
    int8_t second[32];
    std::memcpy(out, &sums, sizeof(out));
    std::memcpy(first, &u, sizeof(first));
    std::memcpy(second, &s, sizeof(second));
    for (int i = 0; i < 32; i++) {
        out[i / 4] += static_cast<uint32_t>(first[i] * second[i]);
    }
    std::memcpy(&sums, out, sizeof(out));
    return sums;
}

// Each 32-bit number of sums + two products of signed 16-bit numbers.
inline __m256i emulated_dpwssd(__m256i sums, __m256i a, __m256i b) {
    uint32_t out[8];
    int16_t first[16], second[16];
    std::memcpy(out, &sums, sizeof(out));
    std::memcpy(first, &a, sizeof(first));
    std::memcpy(second, &b, sizeof(second));
    for (int i = 0; i < 16; i++) {
        out[i / 2] += static_cast<uint32_t>(first[i] * second[i]);
    }
    std::memcpy(&sums, out, sizeof(out));
    return sums;
}

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define _mm256_dpwssd_avx_epi32 emulated_dpwssd
