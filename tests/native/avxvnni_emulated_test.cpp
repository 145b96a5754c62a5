// The emulation of AVX-VNNI against the instructions themselves, where this CPU has them: they came with AVX-512 first, in
// another encoding. Prints how many vectors were compared, 0 where it has none.
#include "avxvnni_emulated.h"

#include <cstdio>
#include <random>

namespace {

#define WITH_VNNI __attribute__((target("avx512vnni,avx512vl")))

WITH_VNNI void dpbusd(const char * sums, const char * a, const char * b, char * out) {
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums));
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a)), v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_dpbusd_epi32(s, u, v));
}

WITH_VNNI void dpwssd(const char * sums, const char * a, const char * b, char * out) {
    const __m256i s = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(sums));
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a)), v = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(b));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_dpwssd_epi32(s, u, v));
}

__m256i vector(const char * p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }

}  // namespace

int main() {
    int compared = 0, wrong = 0;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl")) {
        std::mt19937 rng(1);
        const char extremes[] = {0, 1, 127, -128, -127, -1};
        for (; compared < 100000; compared++) {
            char in[3][32], real[2][32];
            for (auto & bytes : in) {
                for (char & b : bytes) {
                    b = rng() % 2 ? extremes[rng() % sizeof(extremes)] : static_cast<char>(rng());
                }
            }
            dpbusd(in[0], in[1], in[2], real[0]);
            dpwssd(in[0], in[1], in[2], real[1]);
            const __m256i bytes = emulated_dpbusd(vector(in[0]), vector(in[1]), vector(in[2]));
            const __m256i words = emulated_dpwssd(vector(in[0]), vector(in[1]), vector(in[2]));
            wrong += std::memcmp(&bytes, real[0], 32) || std::memcmp(&words, real[1], 32);
        }
    }
    std::printf("%d compared, %d wrong\n", compared, wrong);
    return wrong != 0;
}
