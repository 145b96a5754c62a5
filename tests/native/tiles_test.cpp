// The tiles of every variant that this machine can run, against loops in float64; stands alone, as row_kernels_test.cpp does.
// Rows, x, what is packed and the results all end where memory ends.
#include <cmath>

#include "harness.h"
#include "tiles.h"

namespace {

using lzn::tile_kernels;
using lzn::tile_x;
using lzn::TILE_BLOCK;
using lzn::TILE_TOKENS;

constexpr int SPARE = 3;  // numbers between one token's and the next one's

struct matrix {
    guarded memory;
    size_t stride;
    std::vector<std::vector<double>> numbers;

    const char * data() const { return reinterpret_cast<const char *>(memory.data()); }
};

matrix random_matrix(const format & f, int64_t n, int n_rows) {
    const size_t stride = n / f.elements * f.bytes;
    matrix made{guarded(stride * n_rows), stride, {}};
    for (int r = 0; r < n_rows; r++) {
        made.numbers.emplace_back(n);
        for (int64_t i = 0; i < n / f.elements; i++) {
            uint8_t * block = made.memory.data() + r * stride + i * f.bytes;
            f.make(block);
            f.read(block, made.numbers[r].data() + i * f.elements);
        }
    }
    return made;
}

struct tokens {
    guarded memory;
    int64_t n, stride;
    int count;

    tokens(int64_t n, int count) : memory(((count - 1) * (n + SPARE) + n) * sizeof(float)), n(n), stride(n + SPARE), count(count) {}
    float * of(int t) const { return reinterpret_cast<float *>(memory.data()) + t * stride; }
};

// Numbers that 8 bits hold exactly: whole ones times a power of two, and the largest in each block is 127 of these.
tokens exact_tokens(int64_t n, int count) {
    tokens made(n, count);
    for (int t = 0; t < count; t++) {
        for (int64_t b = 0; b < n; b += TILE_BLOCK) {
            const int power = uniform(-8, 2), largest = uniform(0, TILE_BLOCK - 1), kind = uniform(0, 9);
            for (int i = 0; i < TILE_BLOCK; i++) {
                const int q = i == largest ? 127 : kind ? uniform(-127, 127) : -127;
                made.of(t)[b + i] = static_cast<float>(std::ldexp(q, power));
            }
        }
    }
    return made;
}

// [n_tokens, n_rows + SPARE] numbers, what is between rows -7.
std::vector<float> multiplied(const tile_kernels & kernels, const matrix & w, int n_rows, const tokens & x, bool twice) {
    const guarded arranged(x.n / TILE_BLOCK * sizeof(tile_x)), packed(lzn::TILE_PACKED);
    const int64_t stride = n_rows + SPARE, size = (x.count - 1) * stride + n_rows;
    const guarded result(size * sizeof(float));
    tile_x * const tile = reinterpret_cast<tile_x *>(arranged.data());
    float * const out = reinterpret_cast<float *>(result.data());
    std::fill(out, out + size, -7.0f);
    kernels.arrange(x.n, x.count, x.of(0), x.stride, tile);
    kernels.pack(x.n, n_rows, w.data(), w.stride, packed.data());
    for (int pass = 0; pass <= twice; pass++) {
        kernels.tile(x.n, packed.data(), tile, n_rows, x.count, pass, out, stride);
    }
    return {out, out + size};
}

void test_products(const tile_kernels & kernels, const format & f, const std::string & name, int64_t n, int n_rows, int n_tokens) {
    const matrix w = random_matrix(f, n, n_rows);
    const tokens x = exact_tokens(n, n_tokens);
    const std::vector<float> out = multiplied(kernels, w, n_rows, x, false), more = multiplied(kernels, w, n_rows, x, true);
    for (size_t at = 0; at < out.size(); at++) {
        const int t = static_cast<int>(at) / (n_rows + SPARE), r = static_cast<int>(at) % (n_rows + SPARE);
        if (r >= n_rows) {
            check(out[at] == -7.0f, name + " writes between its results", out[at], -7);
            continue;
        }
        double expected = 0, size = 1e-30;
        for (int64_t i = 0; i < n; i++) {
            const double term = w.numbers[r][i] * x.of(t)[i];
            expected += term;
            size += std::fabs(term);
        }
        const double error = std::fabs(out[at] - expected) / size;
        check(error <= 1e-6, name + " product", error, 1e-6);
        check(more[at] == 2 * out[at], name + " product added to itself", more[at] - 2 * out[at], 0);
    }
}

// Any x is rounded to the nearest of 255 numbers: rows with a single 1 give it back.
void test_rounding(const tile_kernels & kernels, const format & f, const std::string & name, void (*one)(uint8_t * block, int column)) {
    tokens x(TILE_BLOCK, TILE_TOKENS);
    for (int t = 0; t < TILE_TOKENS; t++) {
        for (int i = 0; i < TILE_BLOCK; i++) {
            x.of(t)[i] = t ? static_cast<float>(std::ldexp(std::normal_distribution<double>()(rng), uniform(-3, t))) : 0.0f;
        }
    }
    for (int column = 0; column < TILE_BLOCK; column++) {
        matrix w{guarded(f.bytes), static_cast<size_t>(f.bytes), {}};
        one(w.memory.data(), column);
        const std::vector<float> out = multiplied(kernels, w, 1, x, false);
        for (int t = 0; t < TILE_TOKENS; t++) {
            double largest = 0;
            for (int i = 0; i < TILE_BLOCK; i++) {
                largest = std::max(largest, std::fabs(static_cast<double>(x.of(t)[i])));
            }
            // Half a unit, and the unit itself is rounded to 11 bits.
            const double error = std::fabs(out[t * (1 + SPARE)] - x.of(t)[column]), bound = largest / 127 * (0.5001 + 127.0 / 2048);
            check(error <= bound, name + " rounding", error, bound);
        }
    }
}

void one_q4_0(uint8_t * block, int column) {
    put_word(block, 0x3c00);
    std::memset(block + 2, 0x88, 16);
    block[2 + column % 16] = static_cast<uint8_t>(column < 16 ? 0x89 : 0x98);
}

void one_q8_0(uint8_t * block, int column) {
    std::memset(block, 0, 34);
    put_word(block, 0x3c00);
    block[2 + column] = 1;
}

void test_format(const tile_kernels & kernels, const format & f, const std::string & name) {
    std::snprintf(at_work, sizeof(at_work), "%s tiles\n", name.c_str());
    for (const int64_t n : {32, 96, 544, 2048}) {
        for (int n_rows = 1; n_rows <= kernels.rows; n_rows++) {
            test_products(kernels, f, name, n, n_rows, uniform(1, TILE_TOKENS));
        }
        for (int n_tokens = 1; n_tokens <= TILE_TOKENS; n_tokens++) {
            test_products(kernels, f, name, n, uniform(1, kernels.rows), n_tokens);
        }
    }
    test_rounding(kernels, f, name, f.ggml_type == GGML_TYPE_Q4_0 ? one_q4_0 : one_q8_0);
}

// Sums are whole within a block, so that i8mm gives the bits of dotprod.
void test_same(const tile_kernels & one, const tile_kernels & other, const format & f) {
    const matrix w = random_matrix(f, 2048, lzn::TILE_ROWS);
    tokens x(2048, TILE_TOKENS);
    for (int t = 0; t < TILE_TOKENS; t++) {
        std::generate(x.of(t), x.of(t) + x.n, [] { return std::normal_distribution<float>()(rng); });
    }
    std::fill(x.of(0), x.of(0) + TILE_BLOCK, 0.0f);
    const std::vector<float> a = multiplied(one, w, lzn::TILE_ROWS, x, false), b = multiplied(other, w, lzn::TILE_ROWS, x, false);
    check(a == b, std::string(f.name) + " tiles of two variants", 1, 0);
}

const tile_kernels * kernels_of(const format & f, int32_t variant) { return static_cast<const tile_kernels *>(lzn_tile_kernels(f.ggml_type, variant)); }

}  // namespace

// Prints and exits as row_kernels_test does.
int main(int argc, char ** argv) {
    begin();
    for (int32_t variant = LZN_PORTABLE + 1; variant <= LZN_I8MM; variant++) {
        if (!runs_here(variant, argc, argv)) {
            continue;
        }
        std::string tested;
        for (const format * f : {&Q4_0, &Q8_0}) {
            if (const tile_kernels * kernels = kernels_of(*f, variant)) {
                test_format(*kernels, *f, std::string(VARIANTS[variant]) + " " + f->name);
                tested += std::string(" ") + f->name;
            }
        }
        std::printf("%s:%s\n", VARIANTS[variant], tested.c_str());
    }
    for (const format * f : {&Q4_0, &Q8_0}) {
        if (lzn_has_variant(LZN_I8MM)) {
            test_same(*kernels_of(*f, LZN_NEON), *kernels_of(*f, LZN_I8MM), *f);
        }
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
