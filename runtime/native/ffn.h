// What the operators of one FFN share: how work is dealt to threads, how rows are read, what is handed on.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "lazyneuron.h"

namespace lzn {

constexpr size_t CACHE_LINE = 64;
constexpr int64_t TOKEN_TILE = 16;  // partial sums of this many tokens stay in L2 while weight rows pass
constexpr int64_t SCORE_TILE = 64;  // each thread has a copy of a predictor's input for this many tokens
constexpr int64_t ROW_BLOCK = 64;   // rows are dealt to threads in blocks of this many: hot rows lie side by side

inline size_t aligned(size_t size) { return (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// ggml aligns its tensors to less than our loops like: operators' results are longer by a cache line.
inline char * aligned(void * p) { return reinterpret_cast<char *>(aligned(reinterpret_cast<uintptr_t>(p))); }

inline int64_t split(int64_t n, int ith, int nth) { return n * ith / nth; }

// An operator's sources, one after the other.
class sources {
  public:
    explicit sources(const ggml_tensor * dst) : at_(dst->src) {}
    const ggml_tensor * next() { return *at_++; }
    const ggml_tensor * next_if(bool present) { return present ? next() : nullptr; }

  private:
    ggml_tensor * const * at_;
};

// --- rows ------------------------------------------------------------------------------------------------------------

inline const row_kernels * kernels_of(const lzn_rows & rows) { return static_cast<const row_kernels *>(rows.kernels); }

inline const char * row_of(const ggml_tensor * weights, const lzn_rows & rows, int64_t r) {
    return static_cast<const char *>(weights->data) + r * rows.row_size;
}

inline float bias_of(const ggml_tensor * bias, int64_t r) {
    return bias ? static_cast<const float *>(bias->data)[r] : 0.0f;
}

// One token's activations as `rows` want them.
inline void prepare(const lzn_rows & rows, int64_t n, const float * x, char * out) {
    rows.from_float(x, out + rows.arranged_size, n);
    if (rows.arranged_size) {
        kernels_of(rows)->arrange(n, out + rows.arranged_size, out);
    }
}

// Several products with one x, the rows' own kernels or ggml's; `next` is fetched meanwhile if it is not null.
inline void dots(const lzn_rows & rows, int64_t n, int n_rows, const char * const * row, const char * const * next,
                 const char * x_token, float * out) {
    const void * x = x_token + rows.x_offset;
    if (rows.kernels) {
        return kernels_of(rows)->dots(n, n_rows, row, next, x, out);
    }
    for (int k = 0; k < n_rows; k++) {
        rows.vec_dot(static_cast<int>(n), out + k, 0, row[k], 0, x, 0, 1);
    }
}

// --- the rows that a token scans -------------------------------------------------------------------------------------

// Rows first to end - 1; what their neurons give is multiplied by `weight`.
struct row_range {
    int32_t first;
    int32_t end;
    float weight;
};

// The ranges of one token, in the order in which they were chosen. They do not overlap.
struct token_rows {
    row_range of[LZN_MAX_RANGES];
    int n = 0;

    int64_t size() const {
        int64_t total = 0;
        for (int i = 0; i < n; i++) {
            total += of[i].end - of[i].first;
        }
        return total;
    }

    float weight(int32_t row) const {
        int i = 0;
        while (i + 1 < n && !(of[i].first <= row && row < of[i].end)) {
            i++;
        }
        return of[i].weight;
    }
};

// Which ranges each token of a batch scans: all rows, or those of the table that were chosen for it.
class token_ranges {
  public:
    token_ranges(const lzn_ffn & f, const ggml_tensor * chosen, const ggml_tensor * weights)
        : f_(f), chosen_(chosen), weights_(weights) {}

    // Never more rows than there are, and none outside of the matrix, whatever the sources hold.
    void of(int64_t t, token_rows & out) const {
        out.n = 0;
        if (!f_.n_ranges) {
            out.of[out.n++] = {0, f_.n_ff, 1.0f};
            return;
        }
        int64_t room = f_.n_ff;
        for (int64_t i = 0; i < std::min<int64_t>(chosen_->ne[0], LZN_MAX_RANGES); i++) {
            const int32_t id = at<int32_t>(chosen_, i, t);
            if (id < 0 || id >= f_.n_ranges) {
                continue;
            }
            const int32_t first = f_.ranges[2 * id], end = f_.ranges[2 * id + 1];
            if (0 <= first && first < end && end <= f_.n_ff && end - first <= room) {
                out.of[out.n++] = {first, end, weights_ ? at<float>(weights_, i, t) : 1.0f};
                room -= end - first;
            }
        }
    }

  private:
    template <typename T> static T at(const ggml_tensor * m, int64_t i, int64_t t) {
        return *reinterpret_cast<const T *>(static_cast<const char *>(m->data) + i * m->nb[0] + t * m->nb[1]);
    }

    const lzn_ffn & f_;
    const ggml_tensor *chosen_, *weights_;
};

// Calls each(first, end, weight) for the pieces of a token's rows that one thread gets, when all its ranges, one behind
// the other, are split evenly. Returns where the thread's part begins in that order.
template <typename Each> int64_t split_rows(const token_rows & rows, int ith, int nth, Each each) {
    const int64_t total = rows.size(), first = split(total, ith, nth), last = split(total, ith + 1, nth);
    int64_t at = 0;  // of the range in that order
    for (int i = 0; i < rows.n; i++) {
        const row_range & r = rows.of[i];
        const int64_t from = std::max(first, at), to = std::min(last, at + r.end - r.first);
        if (from < to) {
            each(r.first + from - at, r.first + to - at, r.weight);
        }
        at += r.end - r.first;
    }
    return first;
}

// --- what operators hand on ------------------------------------------------------------------------------------------

// What one thread found for a single token: n entries, listed from `start` on.
struct part {
    int64_t n;
    int64_t start;
};

template <typename Parts> int64_t total_of(const Parts & parts, int nth) {
    int64_t total = 0;
    for (int i = 0; i < nth; i++) {
        total += parts.of(i).n;
    }
    return total;
}

// One thread's even share of what all threads listed, whoever found it.
template <typename Parts> class share {
  public:
    share(const Parts & parts, int ith, int nth) : parts_(parts) {
        const int64_t total = total_of(parts, nth);
        at_ = split(total, ith, nth);
        left_ = split(total, ith + 1, nth) - at_;
        size_ = left_;
        while (left_ > 0 && at_ >= parts_.of(part_).n) {
            at_ -= parts_.of(part_++).n;
        }
    }

    int64_t size() const { return size_; }

    // Up to `max` more entries; returns how many.
    template <typename Entry> int take(Entry * out, int max) {
        int n = 0;
        for (; n < max && left_ > 0; n++, left_--) {
            while (at_ >= parts_.of(part_).n) {
                at_ = 0;
                part_++;
            }
            out[n] = parts_.list()[parts_.of(part_).start + at_++];
        }
        return n;
    }

  private:
    const Parts & parts_;
    int part_ = 0;
    int64_t at_ = 0, left_ = 0, size_ = 0;
};

// Bytes of one token's input to the predictor, as its rows want it; sign bits where the rows have no type.
inline size_t predictor_x_size(const lzn_ffn & f) {
    return f.predictor.vec_dot ? aligned(f.predictor.arranged_size + f.predictor.x_size) : f.n_embd / 8;
}

// The result of a predictor: what each thread found, room for its own copy of the input of a tile, then
//   for one token    I32 [n_ff], the candidates, one thread's after `start`
//   for several      I8 [n_tokens, n_ff], 1 for a candidate; rows that a token does not scan are not written
struct candidates {
    char * base;
    int32_t n_threads;
    size_t input_size;  // bytes of one thread's copy

    candidates(const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens)
        : base(aligned(result->data)), n_threads(f.n_threads), input_size(thread_input(f, n_tokens)) {}

    static size_t thread_input(const lzn_ffn & f, int64_t n_tokens) {
        return aligned(std::min(n_tokens, SCORE_TILE) * predictor_x_size(f));
    }

    part & of(int ith) const { return *reinterpret_cast<part *>(base + ith * CACHE_LINE); }
    char * input(int ith) const { return base + n_threads * CACHE_LINE + ith * input_size; }
    char * body() const { return input(n_threads); }
    int32_t * list() const { return reinterpret_cast<int32_t *>(body()); }
    int8_t * matrix() const { return reinterpret_cast<int8_t *>(body()); }
};

// A neuron that fires. strength: what it adds to the output per unit of its up product and of its down row.
struct fired_neuron {
    int32_t row;
    float strength;
};

// What one thread did for one token.
struct count {
    int32_t fired;  // neurons that fired
    int32_t gates;  // gate rows read
};

// The result of `gate`, for one token: what each thread found and counted, then the neurons, one thread's after its
// `start`.
struct gate_result {
    struct head {
        part found;
        count counted;
    };
    static_assert(sizeof(head) <= CACHE_LINE, "one cache line for each thread");

    char * base;
    int32_t n_threads;

    head & head_of(int ith) const { return *reinterpret_cast<head *>(base + ith * CACHE_LINE); }
    part & of(int ith) const { return head_of(ith).found; }
    fired_neuron * list() const { return reinterpret_cast<fired_neuron *>(base + n_threads * CACHE_LINE); }
};

// --- gate rows, and up and down rows ---------------------------------------------------------------------------------

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

    // Add up to AXPY_ROWS neurons to the sums y of token t: first their up rows, while their down rows are fetched;
    // then the down rows, while the up rows of `ahead` are. scratch: [2 n_embd]
    void add(const fired_neuron * neurons, int n, const fired_neuron * ahead, int n_ahead, int64_t t, float * y,
             float * scratch) const {
        const char *rows[AXPY_ROWS], *next[AXPY_ROWS];
        float strengths[AXPY_ROWS];
        for (int k = 0; k < n; k++) {
            rows[k] = row_of(down, f.down, neurons[k].row);
        }
        for (int k = 0; k < n; k += DOT_ROWS) {
            strengths_of(neurons + k, std::min(DOT_ROWS, n - k), rows + k, t, strengths + k);
        }
        const bool fetch = f.gated && n_ahead == n;
        for (int k = 0; fetch && k < n; k++) {
            next[k] = row_of(up, f.up, ahead[k].row);
        }
        axpys(n, rows, fetch ? next : nullptr, strengths, y, scratch);
        for (int k = 0; f.squares && k < n; k++) {
            y[y_size(f.n_embd)] += strengths[k] * strengths[k];
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

    void strengths_of(const fired_neuron * neurons, int n, const char * const * rows, int64_t t, float * out) const {
        if (!f.gated) {
            for (int k = 0; k < n; k++) {
                out[k] = neurons[k].strength;
            }
            return;
        }
        const char * up_rows[DOT_ROWS];
        for (int k = 0; k < n; k++) {
            up_rows[k] = row_of(up, f.up, neurons[k].row);
        }
        // The rows of both matrices are of one length only where they are of one type.
        const bool fetch = f.up.row_size == f.down.row_size;
        float ups[DOT_ROWS];
        dots(f.up, f.n_embd, n, up_rows, fetch ? rows : nullptr, x + t * f.x_stride, ups);
        for (int k = 0; k < n; k++) {
            const float u = ups[k] + bias_of(bias, neurons[k].row);
            out[k] = neurons[k].strength * (f.activation == LZN_DRELU ? std::max(u, 0.0f) : u);
        }
    }
};

}  // namespace lzn
