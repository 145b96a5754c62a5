// Every row kernel of every variant that this machine can run, against loops in float64 on random blocks.
//
// Stands alone: blocks are made and read (row_formats.h) by code that shares nothing with the kernels. So it runs where there is no Python and no ggml, under an emulator for instance.
// Every row and every x ends where memory ends, so that a kernel that reads past one stops the program.
#include <cmath>

#include "harness.h"
#include "kernels.h"

namespace {

using lzn::row_kernels;

// Bounds of the error in units of the sum of the terms' sizes. Some accumulations round each coefficient to bfloat16, by at most 1/256 of itself.
constexpr double FLOAT = 1e-6;
double axpy_bound(const std::string & variant, const std::string & type) {
    return variant == "avx512" && (type == "q4_0" || type == "q4_K" || type == "q5_K" || type == "q6_K") ? 1.0 / 256 : FLOAT;
}

struct rows_of {
    std::vector<row> rows;
    std::vector<const char *> pointers;

    rows_of(const format & f, int64_t n, int count) {
        for (int k = 0; k < count; k++) {
            rows.push_back(random_row(f, n));
            pointers.push_back(rows.back().data());
        }
    }
};

void test_dots(const row_kernels & kernels, const format & f, const std::string & name, int64_t n, const rows_of & w, const rows_of & next) {
    std::snprintf(at_work, sizeof(at_work), "%s dots\n", name.c_str());
    const row x = random_row(*f.x, n);
    const void * given = x.data();
    aligned_memory arranged;
    if (kernels.arrange) {
        arranged = cache_lines(kernels.arranged_size(n));
        kernels.arrange(n, x.data(), arranged.get());
        given = arranged.get();
    }
    for (int count = 1; count <= lzn::DOT_ROWS; count++) {
        float out[lzn::DOT_ROWS + 1];
        std::fill(out, out + lzn::DOT_ROWS + 1, -7.0f);
        kernels.dots(n, count, w.pointers.data(), count % 2 ? next.pointers.data() : nullptr, given, out);
        for (int k = 0; k < count; k++) {
            double expected = 0, size = 0;
            for (int64_t i = 0; i < n; i++) {
                const double term = w.rows[k].numbers[i] * x.numbers[i];
                expected += term;
                size += std::fabs(term);
            }
            // Where weights have an offset, the kernels add and subtract parts that are larger than the products.
            const double error = std::fabs(out[k] - expected) / size;
            check(error <= 4 * FLOAT, name + " dots of " + std::to_string(count), error, 4 * FLOAT);
        }
        check(out[count] == -7.0f, name + " dots writes past its results", out[count], -7);
    }
}

// One row and several tokens: the same bits as `dots` gives for each token, whatever the number of rows.
void test_dots_tokens(const row_kernels & kernels, const format & f, const std::string & name, int64_t n, const rows_of & w, const rows_of & next) {
    std::snprintf(at_work, sizeof(at_work), "%s dots_tokens\n", name.c_str());
    std::vector<row> x;
    std::vector<aligned_memory> arranged;
    const void * given[lzn::DOT_TOKENS];
    for (int t = 0; t < lzn::DOT_TOKENS; t++) {
        x.push_back(random_row(*f.x, n));
        given[t] = x.back().data();
        if (kernels.arrange) {
            arranged.push_back(cache_lines(kernels.arranged_size(n)));
            kernels.arrange(n, x.back().data(), arranged.back().get());
            given[t] = arranged.back().get();
        }
    }
    for (int n_tokens = 1; n_tokens <= lzn::DOT_TOKENS; n_tokens++) {
        for (int n_rows = 1; n_rows <= lzn::DOT_ROWS; n_rows++) {
            float out[lzn::DOT_ROWS * lzn::DOT_TOKENS + 1];
            std::fill(out, out + lzn::DOT_ROWS * lzn::DOT_TOKENS + 1, -7.0f);
            kernels.dots_tokens(n, n_rows, w.pointers.data(), n_rows % 2 ? next.pointers.data() : nullptr, n_tokens, given, out);
            for (int t = 0; t < n_tokens; t++) {
                for (int k = 0; k < n_rows; k++) {
                    float alone[lzn::DOT_ROWS];
                    const float found = out[k * n_tokens + t];
                    kernels.dots(n, k + 1, w.pointers.data(), nullptr, given[t], alone);
                    check(std::memcmp(&alone[k], &found, sizeof(float)) == 0, name + " dots_tokens of " + std::to_string(n_tokens), std::fabs(alone[k] - found), 0);
                }
            }
            check(out[n_rows * n_tokens] == -7.0f, name + " dots_tokens writes past its results", out[n_rows * n_tokens], -7);
        }
    }
}

void test_axpys(const row_kernels & kernels, const std::string & name, int64_t n, const rows_of & w, const rows_of & next, double bound) {
    std::snprintf(at_work, sizeof(at_work), "%s axpys\n", name.c_str());
    const int64_t room = (n + lzn::GROUP - 1) / lzn::GROUP * lzn::GROUP;
    for (int count = 1; count <= lzn::AXPY_ROWS; count++) {
        const aligned_memory memory = cache_lines(room * sizeof(float));
        float * y = reinterpret_cast<float *>(memory.get());
        std::fill(y, y + room, 0.0f);
        std::vector<double> expected(n), size(n);
        for (int pass = 0; pass < 2; pass++) {  // the second one adds to the first
            std::vector<float> a(count);
            for (int k = 0; k < count; k++) {
                a[k] = uniform(0, 9) ? std::normal_distribution<float>()(rng) : 0.0f;
                for (int64_t i = 0; i < n; i++) {
                    expected[i] += a[k] * w.rows[k].numbers[i];
                    size[i] += std::fabs(a[k] * w.rows[k].numbers[i]);
                }
            }
            kernels.axpys(n, count, w.pointers.data(), pass ? next.pointers.data() : nullptr, a.data(), y);
        }
        if (kernels.finish) {
            kernels.finish(n, y);
        }
        double error = 0, scale = 1e-30;
        for (int64_t i = 0; i < n; i++) {
            error += (y[i] - expected[i]) * (y[i] - expected[i]);
            scale += size[i] * size[i];
        }
        check(std::sqrt(error / scale) <= bound, name + " axpys of " + std::to_string(count), std::sqrt(error / scale), bound);
    }
}

// The rows in turns of `count`, in the order given.
std::vector<float> accumulated(const row_kernels & kernels, int64_t n, const rows_of & w, const std::vector<float> & a, const std::vector<int> & order, size_t count) {
    const int64_t room = (n + lzn::GROUP - 1) / lzn::GROUP * lzn::GROUP;
    const aligned_memory memory = cache_lines(room * sizeof(float));
    float * y = reinterpret_cast<float *>(memory.get());
    std::fill(y, y + room, 0.0f);
    for (size_t at = 0; at < order.size(); at += count) {
        std::vector<const char *> rows;
        std::vector<float> strengths;
        for (size_t k = at; k < std::min(at + count, order.size()); k++) {
            rows.push_back(w.pointers[order[k]]);
            strengths.push_back(a[order[k]]);
        }
        kernels.axpys(n, static_cast<int>(rows.size()), rows.data(), nullptr, strengths.data(), y);
    }
    if (kernels.finish) {
        kernels.finish(n, y);
    }
    return {y, y + n};
}

// The order of rows, and which of them share a pass, changes the order of float additions and no rounding of a coefficient, however different they are.
void test_order(const row_kernels & kernels, const std::string & name, int64_t n, const rows_of & w) {
    std::snprintf(at_work, sizeof(at_work), "%s axpys\n", name.c_str());
    std::vector<float> a(w.rows.size());
    std::vector<int> order(a.size());
    for (size_t k = 0; k < a.size(); k++) {
        a[k] = std::ldexp(std::normal_distribution<float>()(rng), uniform(-6, 6));
        order[k] = static_cast<int>(k);
    }
    const std::vector<float> expected = accumulated(kernels, n, w, a, order, 1);
    double largest = 0;
    for (float y : expected) {
        largest = std::max(largest, std::fabs(static_cast<double>(y)));
    }
    for (size_t count : {2, 5, 7, 16}) {
        std::shuffle(order.begin(), order.end(), rng);
        const std::vector<float> found = accumulated(kernels, n, w, a, order, count);
        double difference = 0;
        for (int64_t i = 0; i < n; i++) {
            difference = std::max(difference, std::fabs(static_cast<double>(found[i]) - expected[i]));
        }
        check(difference <= FLOAT * largest, name + " axpys of " + std::to_string(count) + " in another order", difference / largest, FLOAT);
    }
}

void test_format(const row_kernels & kernels, const format & f, const std::string & variant) {
    for (const int64_t n : {32, 64, 96, 128, 160, 256, 352, 512, 1024, 4096}) {
        if (n % f.elements) {
            continue;
        }
        const std::string name = variant + " " + f.name + " [" + std::to_string(n) + "]";
        const rows_of w(f, n, lzn::AXPY_ROWS), next(f, n, lzn::AXPY_ROWS);
        test_dots(kernels, f, name, n, w, next);
        if (kernels.dots_tokens) {
            test_dots_tokens(kernels, f, name, n, w, next);
        }
        test_axpys(kernels, name, n, w, next, axpy_bound(variant, f.name));
        test_order(kernels, name, n, w);
    }
}

// Four rows with four tokens, which i8mm multiplies by instructions of its own: the bits of dotprod.
void test_same(const row_kernels & one, const row_kernels & other, const format & f) {
    std::snprintf(at_work, sizeof(at_work), "%s of two variants\n", f.name);
    for (const int64_t n : {256, 1024, 4096}) {
        const rows_of w(f, n, lzn::DOT_ROWS);
        std::vector<row> x;
        float found[2][lzn::DOT_ROWS * lzn::DOT_TOKENS];
        for (int t = 0; t < lzn::DOT_TOKENS; t++) {
            x.push_back(random_row(*f.x, n));
        }
        for (const row_kernels * kernels : {&one, &other}) {
            const void * given[lzn::DOT_TOKENS];
            std::vector<aligned_memory> arranged;
            for (int t = 0; t < lzn::DOT_TOKENS; t++) {
                given[t] = x[t].data();
                if (kernels->arrange) {
                    arranged.push_back(cache_lines(kernels->arranged_size(n)));
                    kernels->arrange(n, x[t].data(), arranged.back().get());
                    given[t] = arranged.back().get();
                }
            }
            kernels->dots_tokens(n, lzn::DOT_ROWS, w.pointers.data(), nullptr, lzn::DOT_TOKENS, given, found[kernels == &other]);
        }
        check(std::memcmp(found[0], found[1], sizeof(found[0])) == 0, std::string(f.name) + " of two variants", 1, 0);
    }
}

void test_signs(const row_kernels & kernels, const std::string & variant) {
    std::snprintf(at_work, sizeof(at_work), "%s signs\n", variant.c_str());
    for (const int n : {8, 24, 128, 256, 264, 512, 600, 1024, 4096, 5000}) {
        const format bits = {"", 0, 8, 1, [](uint8_t * b) { *b = static_cast<uint8_t>(uniform(0, 255)); }, [](const uint8_t * b, double * out) {
                                 for (int i = 0; i < 8; i++) {
                                     out[i] = *b >> i & 1;
                                 }
                             }, nullptr};
        const rows_of w(bits, n, lzn::DOT_ROWS);
        const row x = random_row(bits, n);
        for (int count = 1; count <= lzn::DOT_ROWS; count++) {
            float out[lzn::DOT_ROWS];
            kernels.dots(n, count, w.pointers.data(), nullptr, x.data(), out);
            for (int k = 0; k < count; k++) {
                int differing = 0;
                for (int i = 0; i < n; i++) {
                    differing += w.rows[k].numbers[i] != x.numbers[i];
                }
                check(out[k] == -differing, variant + " signs [" + std::to_string(n) + "]", out[k], -differing);
            }
        }
    }
}

}  // namespace

// Prints the variants that were tested, one line each; exits with 1 where a kernel is wrong, or where a variant named as an argument cannot run.
int main(int argc, char ** argv) {
    begin();
    for (int32_t variant = LZN_PORTABLE + 1; variant <= LZN_I8MM; variant++) {
        const std::string name = VARIANTS[variant];
        if (!runs_here(variant, argc, argv)) {
            continue;
        }
        std::string tested;
        for (const format * f : FORMATS) {
            if (const void * kernels = lzn_kernels(f->ggml_type, variant)) {
                test_format(*static_cast<const row_kernels *>(kernels), *f, name);
                tested += std::string(" ") + f->name;
            }
        }
        if (const void * signs = lzn_kernels(GGML_TYPE_I8, variant)) {
            test_signs(*static_cast<const row_kernels *>(signs), name);
            tested += " signs";
        }
        std::printf("%s:%s\n", name.c_str(), tested.c_str());
    }
    for (const format * f : FORMATS) {
        if (lzn_has_variant(LZN_I8MM) && lzn_kernels(f->ggml_type, LZN_I8MM)) {
            test_same(*static_cast<const row_kernels *>(lzn_kernels(f->ggml_type, LZN_NEON)), *static_cast<const row_kernels *>(lzn_kernels(f->ggml_type, LZN_I8MM)), *f);
        }
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures != 0;
}
