// Products of matrices with many tokens: some rows times TILE_TOKENS tokens at a time, by whole numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lzn {

constexpr int TILE_TOKENS = 16;
constexpr int TILE_ROWS = 16;       // at most
constexpr int TILE_COLUMNS = 2048;  // that are packed together
constexpr int TILE_BLOCK = 32;      // columns with one scale

// TILE_TOKENS tokens' x in one block of columns: 8-bit numbers, what sums start with, and scales.
struct alignas(64) tile_x {
    int8_t q[TILE_TOKENS][TILE_BLOCK];
    int32_t start[TILE_TOKENS];  // minus the weights' offset times the sum of q
    float d[TILE_TOKENS];
};

// Rows of TILE_COLUMNS columns: at most a byte per weight, and two for each block's scale.
constexpr size_t TILE_PACKED = TILE_ROWS * (TILE_COLUMNS + TILE_COLUMNS / TILE_BLOCK * sizeof(uint16_t));

// What there is for one weight type. n is a multiple of TILE_BLOCK; `packed` and `x` begin at a multiple of 64.
struct tile_kernels {
    int rows;  // of a tile, at most TILE_ROWS
    // Rounds x of n_tokens <= TILE_TOKENS tokens, `stride` numbers apart, to 8 bits; the other tokens are zeros.
    void (*arrange)(int64_t n, int n_tokens, const float * x, int64_t stride, tile_x * out);
    // Interleaves the first n <= TILE_COLUMNS columns of n_rows <= rows rows, `stride` bytes apart; the others are zeros.
    void (*pack)(int64_t n, int n_rows, const char * first, size_t stride, void * out);
    // out[t * stride + r] = rows[r] . x[t]; `more`: added to what is there.
    void (*tile)(int64_t n, const void * packed, const tile_x * x, int n_rows, int n_tokens, bool more, float * out, int64_t stride);
};

// Null where the variant has none for a type.
const tile_kernels * tiles_avx2(int type);
const tile_kernels * tiles_avxvnni(int type);
const tile_kernels * tiles_avx512(int type);
const tile_kernels * tiles_neon(int type);
const tile_kernels * tiles_i8mm(int type);

}  // namespace lzn
