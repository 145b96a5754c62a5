// The row kernels for q4_K, q5_K and q6_K, compiled as kernels_x86.cpp is: LZN_K_VARIANT names the table.
#pragma GCC diagnostic ignored "-Wunused-function"  // x86.h has more than these types need
#if defined(__AVX512F__)
#include "k_quants_avx512.h"
#else
#include "k_quants_avx2.h"
#endif
#include "kernels.h"

namespace {

template <typename Rows> constexpr row_kernels table() {
    return {dots<of_k_blocks<Rows>>, dots_tokens<of_k_blocks<Rows>>, axpys_k<Rows>, k_arranged_size, k_arrange<Rows>, k_finish<Rows>};
}

const row_kernels Q4_K = table<q4_K_rows>(), Q5_K = table<q5_K_rows>(), Q6_K = table<q6_K_rows>();

}  // namespace

const row_kernels * lzn::LZN_K_VARIANT(int type) {
    switch (type) {
        case GGML_TYPE_Q4_K: return &Q4_K;
        case GGML_TYPE_Q5_K: return &Q5_K;
        case GGML_TYPE_Q6_K: return &Q6_K;
        default: return nullptr;
    }
}
