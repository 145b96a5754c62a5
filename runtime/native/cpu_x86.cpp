#include "cpu_x86.h"

#include <cpuid.h>

// By CPUID: `__builtin_cpu_supports` knows the name with some compilers only.
bool lzn::has_avx_vnni() {
    unsigned a, b, c, d;
    const bool has_leaf = __get_cpuid_count(7, 0, &a, &b, &c, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    return has_leaf && (a >> 4 & 1);
}
