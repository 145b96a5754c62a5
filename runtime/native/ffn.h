// The rows of one FFN: the gates that decide who fires, and what is added up of those that do.
#pragma once

#include "ranges.h"
#include "results.h"

namespace lzn {

constexpr int64_t TOKEN_TILE = 32;  // partial sums of this many tokens stay in L2 while weight rows pass, at most 32

// The gate rows of one FFN, and who scans which of them.
struct gate_rows {
    const lzn_ffn & f;
    const char * x;  // of all tokens, as `quantize` left them
    const ggml_tensor * weights;
    const ggml_tensor * bias;
    const ggml_tensor * candidates;
    token_ranges ranges;

    // In the order in which the operators have their sources.
    gate_rows(const lzn_ffn & f, const ggml_tensor * x, sources & from)
        : f(f), x(aligned(x->data)), weights(from.next()), bias(from.next_if(f.gate_bias)),
          candidates(from.next_if(f.predicted)), ranges(ranges_from(f, from)) {}

    // Gates of up to DOT_ROWS neurons; the rows of `ahead` are fetched meanwhile where there are as many.
    void of(const int32_t * neurons, int n, const int32_t * ahead, int64_t t, float * out) const {
        const char *rows[DOT_ROWS], *next[DOT_ROWS];
        for (int k = 0; k < n; k++) {
            rows[k] = row_of(weights, f.gate, neurons[k]);
            next[k] = ahead ? row_of(weights, f.gate, ahead[k]) : nullptr;
        }
        dots(f.gate, f.n_embd, n, rows, ahead ? next : nullptr, x + t * f.x_stride, out);
        for (int k = 0; k < n; k++) {
            out[k] += bias_of(bias, neurons[k]);
        }
    }

    // Gates of some neurons that follow each other, at most DOT_ROWS, for n tokens, at most DOT_TOKENS: out[k * n + t].
    // next: null or as many rows to fetch meanwhile.
    void of_tokens(int32_t neuron, int n_rows, const int64_t * tokens, int n, const char * const * next,
                   float * out) const {
        if (f.scored) {
            for (int k = 0; k < n_rows; k++) {
                for (int t = 0; t < n; t++) {
                    out[k * n + t] = static_cast<const float *>(weights->data)[tokens[t] * f.n_ff + neuron + k];
                }
            }
        } else {
            const char *xs[DOT_TOKENS], *rows[DOT_ROWS];
            for (int t = 0; t < n; t++) {
                xs[t] = x + tokens[t] * f.x_stride;
            }
            consecutive(weights, f.gate, neuron, n_rows, rows);
            dots_tokens(f.gate, f.n_embd, n_rows, rows, next, n, xs, out);
        }
        for (int k = 0; k < n_rows; k++) {
            for (int t = 0; t < n; t++) {
                out[k * n + t] += bias_of(bias, neuron + k);
            }
        }
    }

    bool fires(float gate) const { return gate > f.threshold; }

    float strength(float gate, float weight) const {
        return (f.activation == LZN_RELU2 ? gate * gate : gate) * weight;
    }

  private:
    static token_ranges ranges_from(const lzn_ffn & f, sources & from) {
        const ggml_tensor * chosen = from.next_if(f.n_ranges > 0);
        return {f, chosen, from.next_if(f.n_ranges > 0)};
    }
};

// Floats that the kernels may use of one token's sums; behind them stands the sum of squares.
inline int64_t y_size(int64_t n_embd) { return (n_embd + GROUP - 1) / GROUP * GROUP; }

// Floats from one token's sums to the next one's.
inline int64_t y_stride(const lzn_ffn & f) { return y_size(f.n_embd) + (f.squares ? GROUP : 0); }

// One thread's sums for some tokens, what it counted for them, and a scratch of two rows.
struct partial {
    float * sums;     // [y_stride, room]
    float * scratch;  // [2 y_stride]
    count * counts;   // [room]

    partial(const lzn_ffn & f, char * base, int64_t room)
        : sums(reinterpret_cast<float *>(base)), scratch(sums + room * y_stride(f)),
          counts(reinterpret_cast<count *>(scratch + 2 * y_stride(f))) {}

    static size_t size(const lzn_ffn & f, int64_t room) {
        return (room + 2) * y_stride(f) * sizeof(float) + aligned(room * sizeof(count));
    }

    // No sums and no counts of n tokens.
    void clear(const lzn_ffn & f, int64_t n) const {
        std::memset(sums, 0, n * y_stride(f) * sizeof(float));
        std::memset(static_cast<void *>(counts), 0, n * sizeof(count));
    }
};

// The up and down rows of one FFN.
struct down_rows {
    const lzn_ffn & f;
    const char * x;
    const ggml_tensor * down;
    const ggml_tensor * up;
    const ggml_tensor * bias;

    down_rows(const lzn_ffn & f, const ggml_tensor * x, sources & from)
        : f(f), x(aligned(x->data)), down(from.next()), up(from.next_if(f.gated)),
          bias(from.next_if(f.gated && f.up_bias)) {}

    // Multiplies the strengths of up to AXPY_ROWS neurons with token t's up products. DOT_ROWS rows are fetched while as
    // many are read; the first ones of `ahead` while the last are.
    void strengthen(fired_neuron * const * neurons, int n, fired_neuron * const * ahead, int n_ahead, int64_t t) const {
        const char * rows[AXPY_ROWS + DOT_ROWS];
        const int known = n + std::min(n_ahead, DOT_ROWS);
        for (int k = 0; k < known; k++) {
            rows[k] = row_of(up, f.up, (k < n ? neurons[k] : ahead[k - n])->row);
        }
        for (int k = 0; k < n; k += DOT_ROWS) {
            const int together = std::min(DOT_ROWS, n - k);
            const bool fetch = k + together + together <= known;
            float ups[DOT_ROWS];
            dots(f.up, f.n_embd, together, rows + k, fetch ? rows + k + together : nullptr, x + t * f.x_stride, ups);
            for (int j = 0; j < together; j++) {
                neurons[k + j]->strength *= activated(ups[j] + bias_of(bias, neurons[k + j]->row));
            }
        }
    }

    // Adds up to AXPY_ROWS neurons, whose up products are in their strengths, to a token's sums y. The down rows of
    // `ahead` are fetched meanwhile where there are as many. scratch: [2 n_embd]
    void add(fired_neuron * const * neurons, int n, fired_neuron * const * ahead, int n_ahead, float * y,
             float * scratch) const {
        const char *rows[AXPY_ROWS], *next[AXPY_ROWS];
        float strengths[AXPY_ROWS];
        const bool fetch = n_ahead == n;
        for (int k = 0; k < n; k++) {
            rows[k] = row_of(down, f.down, neurons[k]->row);
            next[k] = fetch ? row_of(down, f.down, ahead[k]->row) : nullptr;
            strengths[k] = neurons[k]->strength;
        }
        axpys(n, rows, fetch ? next : nullptr, strengths, y, scratch);
        for (int k = 0; f.squares && k < n; k++) {
            y[y_size(f.n_embd)] += strengths[k] * strengths[k];
        }
    }

    // What is read after a neuron's gate row, and after its up row, if it is as long; null for none.
    const char * after_gate(int32_t neuron) const {
        const lzn_rows & rows = f.gated ? f.up : f.down;
        return rows.row_size == f.gate.row_size ? row_of(f.gated ? up : down, rows, neuron) : nullptr;
    }
    const char * after_up(int32_t neuron) const {
        return f.up.row_size == f.down.row_size ? row_of(down, f.down, neuron) : nullptr;
    }

    // Multiplies the strengths of one neuron, for up to DOT_TOKENS tokens, with its up products. next: null or a row to
    // fetch meanwhile.
    void strengthen(int32_t neuron, const int64_t * tokens, int n, const char * next, float * strengths) const {
        if (!f.gated || !n) {
            return;
        }
        const char * xs[DOT_TOKENS];
        float ups[DOT_TOKENS];
        for (int k = 0; k < n; k++) {
            xs[k] = x + tokens[k] * f.x_stride;
        }
        const char * row = row_of(up, f.up, neuron);
        dots_tokens(f.up, f.n_embd, 1, &row, next ? &next : nullptr, n, xs, ups);
        for (int k = 0; k < n; k++) {
            strengths[k] *= activated(ups[k] + bias_of(bias, neuron));
        }
    }

    // Put the sums y of n tokens in order.
    void finish(float * y, int64_t n) const {
        const row_kernels * kernels = kernels_of(f.down);
        for (int64_t t = 0; kernels && kernels->finish && t < n; t++) {
            kernels->finish(f.n_embd, y + t * y_stride(f));
        }
    }

  private:
    float activated(float up) const { return f.activation == LZN_DRELU ? std::max(up, 0.0f) : up; }

    // y += sum of a[k] * rows[k]
    void axpys(int n_rows, const char * const * rows, const char * const * next, const float * a, float * y,
               float * scratch) const {
        if (f.down.kernels) {
            return kernels_of(f.down)->axpys(f.n_embd, n_rows, rows, next, a, y);
        }
        // One row's numbers, and the sum of this pass: numbers lose less when they are added to small ones first.
        const int64_t n = f.n_embd;
        float *numbers = scratch, *sums = scratch + n;
        std::fill(sums, sums + n, 0.0f);
        for (int k = 0; k < n_rows; k++) {
            f.down.to_float(rows[k], numbers, n);
            for (int64_t i = 0; i < n; i++) {
                sums[i] += a[k] * numbers[i];
            }
        }
        for (int64_t i = 0; i < n; i++) {
            y[i] += sums[i];
        }
    }
};

}  // namespace lzn
