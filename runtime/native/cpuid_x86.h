// What an x86-64 CPU can do and its system allows, by CPUID: not every compiler's runtime answers `__builtin_cpu_supports` (Zig's always says no).
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace lzn {

// The bits of a leaf's register that have these numbers.
constexpr uint32_t bits() { return 0; }
template <typename... Others>
constexpr uint32_t bits(int first, Others... others) {
    return uint32_t(1) << first | bits(others...);
}

struct cpuid_leaf {
    uint32_t a = 0, b = 0, c = 0, d = 0;

    explicit cpuid_leaf(uint32_t leaf, uint32_t part = 0) {
        if (!__get_cpuid_count(leaf, part, &a, &b, &c, &d)) {
            a = b = c = d = 0;
        }
    }
};

inline bool has_all(uint32_t found, uint32_t wanted) { return (found & wanted) == wanted; }

// The registers that the system saves. To be asked only where the CPU has OSXSAVE.
inline uint32_t saved_registers() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// AVX2, FMA and F16C.
inline bool has_avx2() {
    const uint32_t fma = bits(12), osxsave = bits(27), avx = bits(28), f16c = bits(29), avx2 = bits(5), xmm_and_ymm = bits(1, 2);
    return has_all(cpuid_leaf(1).c, fma | osxsave | avx | f16c) && has_all(cpuid_leaf(7).b, avx2) && has_all(saved_registers(), xmm_and_ymm);
}

// AVX-512 F, DQ, BW, VL, VBMI, VNNI, VPOPCNTDQ and BF16.
inline bool has_avx512() {
    const uint32_t f_dq_bw_vl = bits(16, 17, 30, 31), vbmi_vnni_vpopcntdq = bits(1, 11, 14), bf16 = bits(5), masks_and_zmm = bits(5, 6, 7);
    const cpuid_leaf features(7);
    return has_avx2() && has_all(features.b, f_dq_bw_vl) && has_all(features.c, vbmi_vnni_vpopcntdq) && features.a >= 1 && has_all(cpuid_leaf(7, 1).a, bf16) &&
           has_all(saved_registers(), masks_and_zmm);
}

}  // namespace lzn
