// What the kernels for q4_K, q5_K and q6_K share: activations of blocks of 256 weights as the products want them.
//
// Weights stay unsigned bytes in every product, 0 to 15, 31 or 63; what is to be taken off is the same for a whole run
// of 32 or 16 weights and enters once for all of them.
#pragma once

#include "x86.h"

namespace {

constexpr int64_t K_COLUMNS = 256;

// x of one block: values in the order in which Rows::bytes gives the weights, and their sums by scale.
struct alignas(64) k_x {
    int8_t q[256];
    int16_t sums[16];
    float d;
};

size_t k_arranged_size(int64_t n) { return n / K_COLUMNS * sizeof(k_x); }

// Rows::place says where 16 columns' values go.
template <typename Rows> void k_arrange(int64_t n, const void * x, void * out) {
    for (int64_t i = 0; i < n / K_COLUMNS; i++) {
        const block_q8_K & from = static_cast<const block_q8_K *>(x)[i];
        k_x & to = static_cast<k_x *>(out)[i];
        std::memset(to.sums, 0, sizeof(to.sums));
        to.d = from.d;
        for (int c = 0; c < K_COLUMNS; c += 16) {
            std::memcpy(to.q + Rows::place(c), from.qs + c, 16);
        }
        for (int s = 0; s < 16; s++) {
            to.sums[s * 16 / Rows::RUN] += from.bsums[s];
        }
    }
}

// Rows::dot<T>(block, x of T tokens, T sums) adds a block's products.
template <typename Rows> struct of_k_blocks {
    using block = typename Rows::block;

    template <int R, int T> static void products(int64_t n, const char * const * rows, const char * const * next, const void * const * xs, float * out) {
        vec acc[R][T];
        for (auto & row : acc) {
            for (vec & a : row) {
                a = zero();
            }
        }
        for (int64_t i = 0; i < n / K_COLUMNS; i++) {
            fetch<sizeof(block)>(next, R, i * sizeof(block));
            const k_x * x[T];
            for (int t = 0; t < T; t++) {
                x[t] = static_cast<const k_x *>(xs[t]) + i;
            }
            for (int k = 0; k < R; k++) {
                Rows::template dot<T>(reinterpret_cast<const block *>(rows[k])[i], x, acc[k]);
            }
        }
        for (int k = 0; k < R; k++) {
            for (int t = 0; t < T; t++) {
                out[k * T + t] = sum(acc[k][t]);
            }
        }
    }
};

// Rows::finish puts eight vectors of sums in order.
template <typename Rows> void k_finish(int64_t n, float * y) {
    for (int64_t i = 0; i < n; i += 8 * WIDTH) {
        vec sums[8];
        for (int j = 0; j < 8; j++) {
            sums[j] = load(y + i + WIDTH * j);
        }
        Rows::finish(sums, y + i);
    }
}

}  // namespace
