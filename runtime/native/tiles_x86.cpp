// The tiles for x86-64, compiled once for AVX2 and once for AVX-512 with VNNI: LZN_TILES names the function.
//
// A row's weights in one block are eight groups of four columns, which one instruction multiplies and adds up for all
// rows of a tile at once. Weights are unsigned with an offset, so w . x = q . x - offset * sum(x).
#include "tiles.h"

#include "x86.h"

namespace {

using lzn::TILE_BLOCK;
using lzn::TILE_ROWS;
using lzn::TILE_TOKENS;
using lzn::tile_kernels;
using lzn::tile_x;

constexpr int ROWS = WIDTH;       // of a tile: as many as a vector has floats
constexpr int GROUPS = TILE_BLOCK / 4;
static_assert(TILE_BLOCK == BLOCK && ROWS <= TILE_ROWS, "as in tiles.h");

// --- x ---------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
using ints = __m512i;
float largest(vec v) { return _mm512_reduce_max_ps(v); }
vec absolute(vec v) { return _mm512_abs_ps(v); }
vec either(vec a, vec b) { return _mm512_max_ps(a, b); }
vec times(vec a, vec b) { return _mm512_mul_ps(a, b); }
// Rounds to whole numbers from -127 to 127, writes them and returns their sum.
int round_to(vec v, int8_t * out) {
    const __m512i whole = _mm512_cvtps_epi32(v);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_cvtepi32_epi8(whole));
    return _mm512_reduce_add_epi32(whole);
}
#else
using ints = __m256i;
float largest(vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
}
vec absolute(vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
vec either(vec a, vec b) { return _mm256_max_ps(a, b); }
vec times(vec a, vec b) { return _mm256_mul_ps(a, b); }
int round_to(vec v, int8_t * out) {
    alignas(32) int32_t whole[WIDTH];
    _mm256_store_si256(reinterpret_cast<__m256i *>(whole), _mm256_cvtps_epi32(v));
    int sum = 0;
    for (int i = 0; i < WIDTH; i++) {
        out[i] = static_cast<int8_t>(whole[i]);
        sum += whole[i];
    }
    return sum;
}
#endif

template <int OFFSET> void arrange(int64_t n, int n_tokens, const float * x, int64_t stride, tile_x * out) {
    for (int64_t b = 0; b < n / BLOCK; b++) {
        if (n_tokens < TILE_TOKENS) {
            std::memset(out + b, 0, sizeof(tile_x));
        }
        for (int t = 0; t < n_tokens; t++) {
            const float * from = x + t * stride + b * BLOCK;
            vec most = zero();
            for (int i = 0; i < BLOCK; i += WIDTH) {
                most = either(most, absolute(load(from + i)));
            }
            const float amount = largest(most), inverse = amount > 0.0f ? 127.0f / amount : 0.0f;
            int sum = 0;
            for (int i = 0; i < BLOCK; i += WIDTH) {
                sum += round_to(times(load(from + i), all(inverse)), out[b].q[t] + i);
            }
            out[b].start[t] = -OFFSET * sum;
            out[b].d[t] = f16(_cvtss_sh(amount / 127.0f, 0));  // as ggml stores it
        }
    }
}

// --- weights ---------------------------------------------------------------------------------------------------------

// The 16 bytes of four rows as four groups: out[g] is group g of the four.
void interleave(const uint8_t * const * rows, int8_t flipped, uint8_t (*out)[ROWS][4], int r) {
    __m128i row[4];
    for (int k = 0; k < 4; k++) {
        row[k] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i *>(rows[k])), _mm_set1_epi8(flipped));
    }
    const __m128i first = _mm_unpacklo_epi32(row[0], row[1]), second = _mm_unpacklo_epi32(row[2], row[3]);
    const __m128i third = _mm_unpackhi_epi32(row[0], row[1]), fourth = _mm_unpackhi_epi32(row[2], row[3]);
    const __m128i groups[4] = {_mm_unpacklo_epi64(first, second), _mm_unpackhi_epi64(first, second),
                               _mm_unpacklo_epi64(third, fourth), _mm_unpackhi_epi64(third, fourth)};
    for (int g = 0; g < 4; g++) {
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out[g][r]), groups[g]);
    }
}

// One block of all rows of a tile: scales, and the groups of four columns of one row after the other.
struct q4_0_block {
    static constexpr int OFFSET = 8;

    uint16_t d[ROWS];
    uint8_t q[GROUPS / 2][ROWS][4];  // low nibbles: group g; high ones: group g + GROUPS / 2

    // Four rows, from row r of the tile on.
    void put(int r, const block_q4_0 * const * b) {
        const uint8_t * rows[4];
        for (int k = 0; k < 4; k++) {
            d[r + k] = b[k]->d;
            rows[k] = b[k]->qs;
        }
        interleave(rows, 0, q, r);
    }

    void groups(ints * out) const;
};

#if defined(__AVX512F__)
void q4_0_block::groups(ints * out) const {
    const __m512i low = _mm512_set1_epi8(15);
    for (int g = 0; g < GROUPS / 2; g++) {
        const __m512i both = _mm512_loadu_si512(q[g]);
        out[g] = _mm512_and_si512(both, low);
        out[g + GROUPS / 2] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    }
}

struct q8_0_block {
    static constexpr int OFFSET = 128;

    uint16_t d[ROWS];
    uint8_t q[GROUPS][ROWS][4];

    void put(int r, const block_q8_0 * const * b) {
        for (int half = 0; half < 2; half++) {
            const uint8_t * rows[4];
            for (int k = 0; k < 4; k++) {
                d[r + k] = b[k]->d;
                rows[k] = reinterpret_cast<const uint8_t *>(b[k]->qs + 16 * half);
            }
            interleave(rows, -128, q + GROUPS / 2 * half, r);
        }
    }

    void groups(ints * out) const {
        for (int g = 0; g < GROUPS; g++) {
            out[g] = _mm512_loadu_si512(q[g]);
        }
    }
};
#endif

template <typename Block, typename Row> void pack(int64_t n, int n_rows, const char * first, size_t stride, void * out) {
    static const Row none = {};
    Block * blocks = static_cast<Block *>(out);
    for (int r = 0; r < ROWS; r += 4) {
        for (int64_t b = 0; b < n / BLOCK; b++) {
            const Row * rows[4];
            for (int k = 0; k < 4; k++) {
                rows[k] = r + k < n_rows ? reinterpret_cast<const Row *>(first + (r + k) * stride) + b : &none;
            }
            blocks[b].put(r, rows);
        }
    }
}

// --- products --------------------------------------------------------------------------------------------------------

// The first tokens of a tile, as many as accumulators fit into the registers.
#if defined(__AVX512F__)
constexpr int AT_ONCE = 16;

template <typename Block> void products(const Block & w, const tile_x & x, int t0, vec * sums) {
    ints q[GROUPS];
    w.groups(q);
    const vec d = load_f16(w.d);
#pragma GCC unroll 16
    for (int t = 0; t < AT_ONCE; t++) {
        ints sum = _mm512_set1_epi32(x.start[t0 + t]);
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) {
            int32_t four;
            std::memcpy(&four, x.q[t0 + t] + 4 * g, sizeof(four));
            sum = _mm512_dpbusd_epi32(sum, q[g], _mm512_set1_epi32(four));
        }
        sums[t] = fma(_mm512_cvtepi32_ps(sum), times(d, all(x.d[t0 + t])), sums[t]);
    }
}
#else
constexpr int AT_ONCE = 8;

// A block's products, 8 groups of two times at most 15 * 127, fit into 16 bits.
template <typename Block> void products(const Block & w, const tile_x & x, int t0, vec * sums) {
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    ints short_sums[AT_ONCE];
    const auto four = [&](int t, int g) {
        int32_t bytes;
        std::memcpy(&bytes, x.q[t0 + t] + 4 * g, sizeof(bytes));
        return _mm256_set1_epi32(bytes);
    };
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS / 2; g++) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w.q[g]));
        const __m256i first = _mm256_and_si256(both, low), second = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
#pragma GCC unroll 8
        for (int t = 0; t < AT_ONCE; t++) {
            const __m256i p = _mm256_maddubs_epi16(first, four(t, g));
            short_sums[t] = g ? _mm256_add_epi16(short_sums[t], p) : p;
        }
#pragma GCC unroll 8
        for (int t = 0; t < AT_ONCE; t++) {
            short_sums[t] = _mm256_add_epi16(short_sums[t], _mm256_maddubs_epi16(second, four(t, g + GROUPS / 2)));
        }
    }
    const vec d = load_f16(w.d);
#pragma GCC unroll 8
    for (int t = 0; t < AT_ONCE; t++) {
        const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(short_sums[t], one), _mm256_set1_epi32(x.start[t0 + t]));
        sums[t] = fma(_mm256_cvtepi32_ps(sum), times(d, all(x.d[t0 + t])), sums[t]);
    }
}
#endif

template <typename Block>
void tile(int64_t n, const void * packed, const tile_x * x, int n_rows, int n_tokens, bool more, float * out, int64_t stride) {
    const Block * w = static_cast<const Block *>(packed);
    for (int t0 = 0; t0 < n_tokens; t0 += AT_ONCE) {
        vec sums[AT_ONCE];
#pragma GCC unroll 16
        for (int t = 0; t < AT_ONCE; t++) {
            sums[t] = zero();
        }
        for (int64_t b = 0; b < n / BLOCK; b++) {
            products(w[b], x[b], t0, sums);
        }
#pragma GCC unroll 16
        for (int t = 0; t < AT_ONCE; t++) {
            if (t0 + t < n_tokens) {
                float * to = out + (t0 + t) * stride;
                alignas(64) float part[ROWS];
                if (n_rows < ROWS) {
                    store(part, sums[t]);
                    for (int r = 0; r < n_rows; r++) {
                        to[r] = more ? to[r] + part[r] : part[r];
                    }
                } else {
                    store(to, more ? add(load(to), sums[t]) : sums[t]);
                }
            }
        }
    }
}

template <typename Block, typename Row> constexpr tile_kernels table() { return {ROWS, arrange<Block::OFFSET>, pack<Block, Row>, tile<Block>}; }

const tile_kernels Q4_0 = table<q4_0_block, block_q4_0>();
static_assert(sizeof(q4_0_block) * lzn::TILE_COLUMNS / BLOCK <= lzn::TILE_PACKED, "room for packed rows");
#if defined(__AVX512F__)
const tile_kernels Q8_0 = table<q8_0_block, block_q8_0>();
static_assert(sizeof(q8_0_block) * lzn::TILE_COLUMNS / BLOCK <= lzn::TILE_PACKED, "room for packed rows");
#endif

}  // namespace

const tile_kernels * lzn::LZN_TILES(int type) {
    switch (type) {
        case GGML_TYPE_Q4_0: return &Q4_0;
#if defined(__AVX512F__)
        case GGML_TYPE_Q8_0: return &Q8_0;
#endif
        default: return nullptr;
    }
}
