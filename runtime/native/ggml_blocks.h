// Blocks of weights as ggml lays them out, on every machine.
#pragma once

#include <cstdint>

namespace {

struct block_q4_0 {
    uint16_t d;
    uint8_t qs[16];
};
struct block_q8_0 {
    uint16_t d;
    int8_t qs[32];
};
struct block_q8_1 {
    uint16_t d, s;  // s: what ggml uses for its own products
    int8_t qs[32];
};
struct block_q4_1 {
    uint16_t d, m;
    uint8_t qs[16];
};
struct block_q5_0 {
    uint16_t d;
    uint8_t qh[4];  // bit i: the fifth of weight i
    uint8_t qs[16];
};
struct block_q5_1 {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
};
using block_iq4_nl = block_q4_0;
struct block_q4_K {
    uint16_t d, dmin;
    uint8_t scales[12];  // eight scales and eight minima of 6 bits
    uint8_t qs[128];     // of 64 columns the first 32 in the low nibbles, the others in the high ones
};
struct block_q5_K {
    uint16_t d, dmin;
    uint8_t scales[12];  // as in q4_K
    uint8_t qh[32];      // bit j: of 32 columns, eighth j of the block
    uint8_t qs[128];     // the low nibbles as in q4_K
};
struct block_q6_K {
    uint8_t ql[128];     // of 128 columns the first 64 in the low nibbles, the others in the high ones
    uint8_t qh[64];      // of 128 columns four times 32, two bits each
    int8_t scales[16];
    uint16_t d;
};
struct block_q8_K {
    float d;
    int8_t qs[256];
    int16_t bsums[16];   // of 16 values each
};
static_assert(sizeof(block_q4_0) == 18 && sizeof(block_q8_0) == 34 && sizeof(block_q8_1) == 36, "as in ggml");
static_assert(sizeof(block_q4_1) == 20 && sizeof(block_q5_0) == 22 && sizeof(block_q5_1) == 24, "as in ggml");
static_assert(sizeof(block_q4_K) == 144 && sizeof(block_q5_K) == 176 && sizeof(block_q6_K) == 210 && sizeof(block_q8_K) == 292, "as in ggml");

}  // namespace
