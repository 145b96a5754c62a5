// Attention of few tokens over keys and values in F16: some heads that share them, some cells at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lzn {

constexpr int ATTENTION_CELLS = 32;  // that are added up together
constexpr int ATTENTION_HEADS = 4;   // for which a key is unpacked once

// What one head of one token has seen so far: the largest score, and sums of exp(score - largest) and of these times
// the values. Numbers are head_length floats long, and begin at a multiple of 64 bytes.
struct attention_state {
    float * query;  // with its scale
    float * values;
    float * largest;
    float * sum;
};

struct attention_kernels {
    // Some cells, n of them, for n_heads <= ATTENTION_HEADS heads of one token; each head has the same bits in any
    // company. head_length is a multiple of 16.
    void (*attend)(int64_t head_length, int n_heads, const attention_state * heads, int n, const char * const * keys,
                   const char * const * values);
};

extern const attention_kernels attention_avx2;
extern const attention_kernels attention_avxvnni;
extern const attention_kernels attention_avx512;

}  // namespace lzn
