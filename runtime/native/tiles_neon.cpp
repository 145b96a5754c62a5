// The tiles for aarch64, compiled once for dotprod and once for i8mm: LZN_TILES names the function.
//
// A tile is four times four rows. dotprod multiplies four columns of four rows with those of one token, i8mm eight columns
// of two rows with those of two tokens. Sums within a block are whole, so both give the same bits.
#include "tiles.h"

#include "neon.h"

namespace {

using lzn::TILE_BLOCK;
using lzn::TILE_COLUMNS;
using lzn::TILE_ROWS;
using lzn::TILE_TOKENS;
using lzn::tile_kernels;
using lzn::tile_x;

constexpr int QUAD = 4;      // rows that are multiplied together
constexpr int AT_ONCE = 8;   // tokens, as many as sums fit into the registers
constexpr int VECTORS = TILE_BLOCK * QUAD / 16;  // of four rows' weights in one block
static_assert(TILE_BLOCK == BLOCK && TILE_ROWS % QUAD == 0 && TILE_TOKENS % AT_ONCE == 0, "as in tiles.h");

// --- x ---------------------------------------------------------------------------------------------------------------

// Where the 32 numbers of token t are: one token after the other for dotprod; for i8mm eight of one token, eight of the
// next, eight of the first.
#if defined(__ARM_FEATURE_MATMUL_INT8)
void put(tile_x & to, int t, const int8x8_t * q) {
    int8_t * pair = to.q[t / 2 * 2] + t % 2 * 8;
    for (int i = 0; i < 4; i++) {
        vst1_s8(pair + 16 * i, q[i]);
    }
}
#else
void put(tile_x & to, int t, const int8x8_t * q) {
    for (int i = 0; i < 4; i++) {
        vst1_s8(to.q[t] + 8 * i, q[i]);
    }
}
#endif

void round_block(const float * x, float unit, int t, tile_x & to) {
    float32x4_t v[BLOCK / WIDTH], most = vdupq_n_f32(0.0f);
    for (int i = 0; i < BLOCK / WIDTH; i++) {
        v[i] = vld1q_f32(x + i * WIDTH);
        most = vmaxq_f32(most, vabsq_f32(v[i]));
    }
    const float amount = vmaxvq_f32(most), inverse = amount > 0.0f ? 127.0f / amount : 0.0f;
    int8x8_t q[BLOCK / 8];
    for (int i = 0; i < BLOCK / 8; i++) {
        const int32x4_t first = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i], inverse)), second = vcvtnq_s32_f32(vmulq_n_f32(v[2 * i + 1], inverse));
        q[i] = vqmovn_s16(vcombine_s16(vqmovn_s32(first), vqmovn_s32(second)));
    }
    put(to, t, q);
    to.d[t] = static_cast<float>(static_cast<__fp16>(amount / 127.0f)) * unit;  // as ggml stores it
}

template <typename Block> void arrange(int64_t n, int n_tokens, const float * x, int64_t stride, tile_x * out) {
    for (int64_t b = 0; b < n / BLOCK; b++) {
        if (n_tokens < TILE_TOKENS) {
            std::memset(out + b, 0, sizeof(tile_x));
        }
        for (int t = 0; t < n_tokens; t++) {
            round_block(x + t * stride + b * BLOCK, Block::UNIT, t, out[b]);
        }
    }
}

// --- weights ---------------------------------------------------------------------------------------------------------

// 16 bytes of four rows as dotprod wants them, four of each row, or as i8mm does, eight of two rows and of the two others.
void interleave(const int8_t * const * rows, int8_t (*out)[16]) {
    const int8x16_t a = vld1q_s8(rows[0]), b = vld1q_s8(rows[1]), c = vld1q_s8(rows[2]), d = vld1q_s8(rows[3]);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    const int8x16_t groups[4] = {first_halves(a, b), first_halves(c, d), last_halves(a, b), last_halves(c, d)};
#else
    const int32x4x2_t ab = vzipq_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)), cd = vzipq_s32(vreinterpretq_s32_s8(c), vreinterpretq_s32_s8(d));
    const auto both = [](int32x4_t low, int32x4_t high, bool last) {
        const int8x16_t l = vreinterpretq_s8_s32(low), h = vreinterpretq_s8_s32(high);
        return last ? last_halves(l, h) : first_halves(l, h);
    };
    const int8x16_t groups[4] = {both(ab.val[0], cd.val[0], false), both(ab.val[0], cd.val[0], true), both(ab.val[1], cd.val[1], false), both(ab.val[1], cd.val[1], true)};
#endif
    for (int g = 0; g < 4; g++) {
        vst1q_s8(out[g], groups[g]);
    }
}

// One block of four rows: scales, and the weights of the first 16 columns before those of the others.
struct q4_0_block {
    static constexpr float UNIT = 1.0f / 16;  // nibbles are taken in the upper half of a byte, where they are signed

    uint16_t d[QUAD];
    int8_t q[VECTORS / 2][16];  // low nibbles: vector i; high ones: vector i + VECTORS / 2

    void put(const block_q4_0 * const * b) {
        int8_t flipped[QUAD][16];
        const int8_t * rows[QUAD];
        for (int k = 0; k < QUAD; k++) {
            d[k] = b[k]->d;
            vst1q_u8(reinterpret_cast<uint8_t *>(flipped[k]), veorq_u8(vld1q_u8(b[k]->qs), vdupq_n_u8(0x88)));
            rows[k] = flipped[k];
        }
        interleave(rows, q);
    }

    void weights(int8x16_t * out) const {
        for (int i = 0; i < VECTORS / 2; i++) {
            const int8x16_t both = vld1q_s8(q[i]);
            out[i] = vshlq_n_s8(both, 4);
            out[i + VECTORS / 2] = vandq_s8(both, vdupq_n_s8(-16));
        }
    }
};

struct q8_0_block {
    static constexpr float UNIT = 1.0f;

    uint16_t d[QUAD];
    int8_t q[VECTORS][16];

    void put(const block_q8_0 * const * b) {
        for (int half = 0; half < 2; half++) {
            const int8_t * rows[QUAD];
            for (int k = 0; k < QUAD; k++) {
                d[k] = b[k]->d;
                rows[k] = b[k]->qs + 16 * half;
            }
            interleave(rows, q + VECTORS / 2 * half);
        }
    }

    void weights(int8x16_t * out) const {
        for (int i = 0; i < VECTORS; i++) {
            out[i] = vld1q_s8(q[i]);
        }
    }
};

// The blocks of the first four rows, then those of the next ones.
template <typename Block, typename Row> void pack(int64_t n, int n_rows, const char * first, size_t stride, void * out) {
    static const Row none = {};
    Block * blocks = static_cast<Block *>(out);
    for (int r = 0; r < n_rows; r += QUAD) {
        for (int64_t b = 0; b < n / BLOCK; b++) {
            const Row * rows[QUAD];
            for (int k = 0; k < QUAD; k++) {
                rows[k] = r + k < n_rows ? reinterpret_cast<const Row *>(first + (r + k) * stride) + b : &none;
            }
            blocks++->put(rows);
        }
    }
}

// --- products --------------------------------------------------------------------------------------------------------

// The sums of AT_ONCE tokens, from token t0 of the tile on; rows_of: those of one of them, four rows.
#if defined(__ARM_FEATURE_MATMUL_INT8)
struct products {
    float32x4_t sums[2][AT_ONCE / 2];  // of two rows and two tokens: [row 0, token 0], [0, 1], [1, 0], [1, 1]

    template <typename Block> __attribute__((always_inline)) void add(const Block & w, const tile_x & x, int t0) {
        int8x16_t q[VECTORS];
        w.weights(q);
        const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(w.d)));
        const float32x4_t scales[2] = {vzip1q_f32(d, d), vzip2q_f32(d, d)};
#pragma GCC unroll 4
        for (int p = 0; p < AT_ONCE / 2; p++) {
            const int8_t * from = x.q[t0 + 2 * p];
            const float32x2_t xd = vld1_f32(x.d + t0 + 2 * p);
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) {
                int32x4_t whole = vdupq_n_s32(0);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    whole = vmmlaq_s32(whole, q[2 * j + k], vld1q_s8(from + 16 * j));
                }
                sums[k][p] = vfmaq_f32(sums[k][p], vcvtq_f32_s32(whole), vmulq_f32(scales[k], vcombine_f32(xd, xd)));
            }
        }
    }

    float32x4_t rows_of(int t) const {
        const float32x4_t a = sums[0][t / 2], b = sums[1][t / 2];
        return t % 2 ? vuzp2q_f32(a, b) : vuzp1q_f32(a, b);
    }
};
#else
struct products {
    float32x4_t sums[AT_ONCE];

    template <typename Block> __attribute__((always_inline)) void add(const Block & w, const tile_x & x, int t0) {
        int8x16_t q[VECTORS];
        w.weights(q);
        const float32x4_t d = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(w.d)));
#pragma GCC unroll 8
        for (int t = 0; t < AT_ONCE; t++) {
            int32x4_t whole = vdupq_n_s32(0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                const int8x16_t from = vld1q_s8(x.q[t0 + t] + 16 * half);
                whole = vdotq_laneq_s32(whole, q[4 * half], from, 0);
                whole = vdotq_laneq_s32(whole, q[4 * half + 1], from, 1);
                whole = vdotq_laneq_s32(whole, q[4 * half + 2], from, 2);
                whole = vdotq_laneq_s32(whole, q[4 * half + 3], from, 3);
            }
            sums[t] = vfmaq_f32(sums[t], vcvtq_f32_s32(whole), vmulq_n_f32(d, x.d[t0 + t]));
        }
    }

    float32x4_t rows_of(int t) const { return sums[t]; }
};
#endif

// The results of four rows, or of the first n of them, for one token.
void store(float32x4_t part, int n, bool more, float * to) {
    if (n >= QUAD) {
        vst1q_f32(to, more ? vaddq_f32(vld1q_f32(to), part) : part);
        return;
    }
    float some[QUAD];
    vst1q_f32(some, part);
    for (int r = 0; r < n; r++) {
        to[r] = more ? to[r] + some[r] : some[r];
    }
}

template <typename Block>
void tile(int64_t n, const void * packed, const tile_x * x, int n_rows, int n_tokens, bool more, float * out, int64_t stride) {
    const Block * w = static_cast<const Block *>(packed);
    for (int r = 0; r < n_rows; r += QUAD, w += n / BLOCK) {
        for (int t0 = 0; t0 < n_tokens; t0 += AT_ONCE) {
            products some = {};
            for (int64_t b = 0; b < n / BLOCK; b++) {
                some.add(w[b], x[b], t0);
            }
#pragma GCC unroll 8
            for (int t = 0; t < AT_ONCE; t++) {
                if (t0 + t < n_tokens) {
                    store(some.rows_of(t), n_rows - r, more, out + (t0 + t) * stride + r);
                }
            }
        }
    }
}

template <typename Block, typename Row> constexpr tile_kernels table() {
    static_assert(sizeof(Block) * (TILE_ROWS / QUAD) * (TILE_COLUMNS / BLOCK) <= lzn::TILE_PACKED, "room for packed rows");
    return {TILE_ROWS, arrange<Block>, pack<Block, Row>, tile<Block>};
}

const tile_kernels Q4_0 = table<q4_0_block, block_q4_0>(), Q8_0 = table<q8_0_block, block_q8_0>();

}  // namespace

const tile_kernels * lzn::LZN_TILES(int type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return &Q4_0;
        case GGML_TYPE_Q8_0: return &Q8_0;
        default: return nullptr;
    }
}
