// The row kernels for Q8_0, q4_1, q5_0, q5_1, iq4_nl and iq4_xs, compiled as kernels_x86.cpp is, with vectors of 256 bits
// everywhere: LZN_BLOCKS_VARIANT names the table.
#pragma GCC diagnostic ignored "-Wunused-function"  // x86.h has more than these types need
#define LZN_256_BITS
#include "iq4_xs_avx2.h"

namespace {

template <typename Rows> constexpr row_kernels table() {
    return {dots<of_blocks<Rows>>, dots_tokens<of_blocks<Rows>>, axpys_blocks<Rows>, arranged_size_of_blocks, arrange_blocks<Rows>, finish_blocks<Rows>};
}

// Its numbers need not be packed, and sums are in order.
const row_kernels Q8_0 = {dots<of_blocks<q8_0_rows>>, dots_tokens<of_blocks<q8_0_rows>>, axpys_q8_0, arranged_size_of_blocks, arrange_blocks<q8_0_rows>, nullptr};
const row_kernels Q4_1 = table<q4_1_rows>(), Q5_0 = table<q5_0_rows>(), Q5_1 = table<q5_1_rows>(), IQ4_NL = table<iq4_nl_rows>();
const row_kernels IQ4_XS = {dots<of_k_blocks<iq4_xs_rows>>, dots_tokens<of_k_blocks<iq4_xs_rows>>, axpys_k<iq4_xs_rows>, k_arranged_size, k_arrange<iq4_xs_rows>, k_finish<iq4_xs_rows>};

}  // namespace

const row_kernels * lzn::LZN_BLOCKS_VARIANT(int type) {
    switch (type) {
        case GGML_TYPE_Q8_0: return &Q8_0;
        case GGML_TYPE_Q4_1: return &Q4_1;
        case GGML_TYPE_Q5_0: return &Q5_0;
        case GGML_TYPE_Q5_1: return &Q5_1;
        case GGML_TYPE_IQ4_NL: return &IQ4_NL;
        case GGML_TYPE_IQ4_XS: return &IQ4_XS;
        default: return nullptr;
    }
}
