// Products of whole matrices with many tokens: x rounded to 8 bits once, then W x tile by tile.
#include "tiles.h"

#include "rows.h"

using namespace lzn;

namespace {

constexpr int64_t TOKENS_TOGETHER = 256;  // whose x stays near while the rows pass

const tile_kernels & kernels_of(const lzn_tiles & p) { return *static_cast<const tile_kernels *>(p.kernels); }

int64_t blocks(const lzn_tiles & p) { return p.n_in / TILE_BLOCK; }

int64_t up_to(int64_t n, int64_t most) { return std::min(n, most); }

// The x of a tile of tokens, block after block.
tile_x * tile_of(const lzn_tiles & p, void * tiles, int64_t t0) {
    return reinterpret_cast<tile_x *>(aligned(tiles)) + t0 / TILE_TOKENS * blocks(p);
}

// Rows first .. first + n_rows - 1 with the tokens t0 .. t1 - 1.
void multiply(const lzn_tiles & p, const char * rows, int64_t first, int n_rows, void * tiles, int64_t t0, int64_t t1, float * result) {
    alignas(64) char packed[TILE_PACKED];
    for (int64_t c = 0; c < p.n_in; c += TILE_COLUMNS) {
        const int64_t n = up_to(p.n_in - c, TILE_COLUMNS);
        kernels_of(p).pack(n, n_rows, rows + first * p.stride + c / TILE_BLOCK * p.block_size, p.stride, packed);
        for (int64_t t = t0; t < t1; t += TILE_TOKENS) {
            const int n_tokens = static_cast<int>(up_to(t1 - t, TILE_TOKENS));
            kernels_of(p).tile(n, packed, tile_of(p, tiles, t) + c / TILE_BLOCK, n_rows, n_tokens, c > 0, result + t * p.n_out + first, p.n_out);
        }
    }
}

}  // namespace

size_t lzn_tiles_size(const lzn_tiles * p, int64_t n_tokens) {
    return CACHE_LINE + (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS * blocks(*p) * sizeof(tile_x);
}

void lzn_tiles_arrange(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_tiles & p = *static_cast<const lzn_tiles *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1], n_tiles = (n_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    for (int64_t k = split(n_tiles, ith, nth); k < split(n_tiles, ith + 1, nth); k++) {
        const int64_t t0 = k * TILE_TOKENS;
        const int n = static_cast<int>(up_to(n_tokens - t0, TILE_TOKENS));
        const char * from = static_cast<const char *>(x->data) + t0 * x->nb[1];
        kernels_of(p).arrange(p.n_in, n, reinterpret_cast<const float *>(from), x->nb[1] / sizeof(float), tile_of(p, dst->data, t0));
    }
}

void lzn_tiles_multiply(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_tiles & p = *static_cast<const lzn_tiles *>(userdata);
    const ggml_tensor *tiles = dst->src[0], *weights = dst->src[1];
    const int64_t n_tokens = dst->ne[1], height = kernels_of(p).rows, n_groups = (p.n_out + height - 1) / height;
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TOKENS_TOGETHER) {
        const int64_t t1 = std::min(t0 + TOKENS_TOGETHER, n_tokens);
        for (int64_t g = split(n_groups, ith, nth); g < split(n_groups, ith + 1, nth); g++) {
            const int n_rows = static_cast<int>(up_to(p.n_out - g * height, height));
            multiply(p, static_cast<const char *>(weights->data), g * height, n_rows, tiles->data, t0, t1, static_cast<float *>(dst->data));
        }
    }
}
