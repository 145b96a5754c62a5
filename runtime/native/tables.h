// The tables that other sources than kernels_x86.cpp bring. Rows of type I8 are rows of sign bits: n of them, eight to a byte, against n sign bits; their dots gives -(how many differ), and they have no axpys.
#pragma once

#include "kernels.h"

namespace lzn {

// Follows the numbers of lzn_variant.
constexpr int32_t LZN_NEON = 3;
constexpr int32_t LAST_VARIANT = LZN_NEON;

const row_kernels * kernels_neon(int type);

const row_kernels * k_kernels_avx2(int type);
const row_kernels * k_kernels_avx512(int type);

extern const row_kernels signs_avx2;
extern const row_kernels signs_avx512;

}  // namespace lzn
