// What the sources of a variant bring beside its plain tables (kernels.h): rows of sign bits, and rows of k-quants.
#pragma once

#include "kernels.h"

namespace lzn {

// Rows of sign bits: n of them, eight to a byte, against n sign bits; dots gives -(how many differ), and there is no axpys.
extern const row_kernels signs_avx2;
extern const row_kernels signs_avx512;

}  // namespace lzn
