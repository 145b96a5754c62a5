// Chooses among the variants of the row kernels by what the CPU can do.
#include "attention.h"
#include "cpu_x86.h"
#include "kernels.h"
#include "lazyneuron.h"
#include "tiles.h"

#if defined(LZN_X86)
#include "cpuid_x86.h"
#elif defined(LZN_ARM64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(LZN_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(LZN_HAS_I8MM) && defined(__linux__)
// HWCAP2_I8MM, which headers of old systems lack.
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(LZN_HAS_I8MM) && defined(__APPLE__)
bool has_i8mm() {
    int32_t found = 0;
    size_t size = sizeof(found);
    return sysctlbyname("hw.optional.arm.FEAT_I8MM", &found, &size, nullptr, 0) == 0 && found;
}
#endif

bool found_variant(int32_t variant) {
    switch (variant) {
        case LZN_PORTABLE: return true;
#if defined(LZN_X86)
        case LZN_AVX2: return lzn::has_avx2();
#if defined(LZN_HAS_AVXVNNI)
        case LZN_AVXVNNI: return lzn::has_avx2() && lzn::has_avx_vnni();
#endif
        case LZN_AVX512: return lzn::has_avx512();
#elif defined(LZN_ARM64) && defined(__APPLE__)
        case LZN_NEON: return true;  // since the first M
#elif defined(LZN_ARM64) && defined(__linux__)
        case LZN_NEON: return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
#if defined(LZN_HAS_I8MM) && (defined(__linux__) || defined(__APPLE__))
        case LZN_I8MM: return found_variant(LZN_NEON) && has_i8mm();
#endif
        default: return false;
    }
}

// As bits. The CPU is asked once: under a hypervisor an answer takes 20 microseconds or more, and a graph asks often.
uint32_t all_variants() {
    uint32_t found = 0;
    for (int32_t variant = LZN_PORTABLE; variant <= LZN_I8MM; variant++) {
        found |= static_cast<uint32_t>(found_variant(variant)) << variant;
    }
    return found;
}

}  // namespace

bool lzn_has_variant(int32_t variant) {
    static const uint32_t all = all_variants();
    return LZN_PORTABLE <= variant && variant <= LZN_I8MM && (all >> variant & 1);
}

int32_t lzn_best_variant(void) {
    int32_t best = LZN_PORTABLE;
    for (int32_t variant = LZN_PORTABLE; variant <= LZN_I8MM; variant++) {
        best = lzn_has_variant(variant) ? variant : best;
    }
    return best;
}

#if defined(LZN_X86)
namespace {

// The tables of one variant.
struct x86_tables {
    const lzn::row_kernels * (*tables[3])(int type);
    const lzn::row_kernels & signs;

    const lzn::row_kernels * of(int type) const {
        const lzn::row_kernels * found = type == GGML_TYPE_I8 ? &signs : nullptr;
        for (const auto table : tables) {
            found = found ? found : table(type);
        }
        return found;
    }
};

}  // namespace
#endif

const void * lzn_kernels(int32_t type, int32_t variant) {
    (void) type;
    switch (variant) {
#if defined(LZN_X86)
        case LZN_AVX2: return x86_tables{{lzn::kernels_avx2, lzn::k_kernels_avx2, lzn::blocks_kernels_avx2}, lzn::signs_avx2}.of(type);
#if defined(LZN_HAS_AVXVNNI)
        case LZN_AVXVNNI: return x86_tables{{lzn::kernels_avxvnni, lzn::k_kernels_avxvnni, lzn::blocks_kernels_avxvnni}, lzn::signs_avxvnni}.of(type);
#endif
        case LZN_AVX512: return x86_tables{{lzn::kernels_avx512, lzn::k_kernels_avx512, lzn::blocks_kernels_avx512}, lzn::signs_avx512}.of(type);
#elif defined(LZN_ARM64)
        case LZN_NEON: return lzn::kernels_neon(type);
#if defined(LZN_HAS_I8MM)
        case LZN_I8MM: return lzn::kernels_i8mm(type);
#endif
#endif
        default: return nullptr;
    }
}

const void * lzn_tile_kernels(int32_t type, int32_t variant) {
    (void) type;
    switch (variant) {
#if defined(LZN_X86)
        case LZN_AVX2: return lzn::tiles_avx2(type);
#if defined(LZN_HAS_AVXVNNI)
        case LZN_AVXVNNI: return lzn::tiles_avxvnni(type);
#endif
        case LZN_AVX512: return lzn::tiles_avx512(type);
#elif defined(LZN_ARM64)
        case LZN_NEON: return lzn::tiles_neon(type);
#if defined(LZN_HAS_I8MM)
        case LZN_I8MM: return lzn::tiles_i8mm(type);
#endif
#endif
        default: return nullptr;
    }
}

const void * lzn_attention_kernels(int32_t variant) {
    switch (variant) {
#if defined(LZN_X86)
        case LZN_AVX2: return &lzn::attention_avx2;
#if defined(LZN_HAS_AVXVNNI)
        case LZN_AVXVNNI: return &lzn::attention_avxvnni;
#endif
        case LZN_AVX512: return &lzn::attention_avx512;
#endif
        default: return nullptr;
    }
}
