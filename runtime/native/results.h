// What the operators of one FFN hand on to each other.
#pragma once

#include "rows.h"

namespace lzn {

constexpr int64_t MASK_TOKENS = 64;  // that one word says of each row whether they want it

// What one thread found for a token: n entries, listed from `start` on.
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
        return some(max, [=](int k, Entry * found) { out[k] = *found; });
    }

    // Where up to `max` more entries are listed; returns how many.
    template <typename Entry> int find(Entry ** out, int max) {
        return some(max, [=](int k, Entry * found) { out[k] = found; });
    }

  private:
    template <typename Each> int some(int max, Each each) {
        int n = 0;
        for (; n < max && left_ > 0; n++, left_--) {
            while (at_ >= parts_.of(part_).n) {
                at_ = 0;
                part_++;
            }
            each(n, parts_.list() + parts_.of(part_).start + at_++);
        }
        return n;
    }

    Parts parts_;
    int part_ = 0;
    int64_t at_ = 0, left_ = 0, size_ = 0;
};

// Bytes of one token's input to the predictor, as its rows want it; sign bits where the rows have no type.
inline size_t predictor_x_size(const lzn_ffn & f) {
    return f.predictor.vec_dot ? aligned(f.predictor.arranged_size + f.predictor.x_size) : f.n_embd / 8;
}

// The result of a predictor: what each thread found, room for its own copy of the input of a tile, then
//   for one token    I32 [n_ff], the candidates, one thread's after `start`
//   for several      I32 [n_ff / ROW_BLOCK], how many products the first MASK_TOKENS tokens want of each block of rows;
//                    then for each MASK_TOKENS tokens I64 [n_ff], a bit for each token that wants a row
struct candidates {
    char * base;
    int32_t n_threads;
    int64_t n_ff;
    size_t input_size;  // bytes of one thread's copy

    candidates(const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens)
        : base(aligned(result->data)), n_threads(f.n_threads), n_ff(f.n_ff), input_size(thread_input(f, n_tokens)) {}

    static size_t thread_input(const lzn_ffn & f, int64_t n_tokens) {
        return aligned(std::min(n_tokens, MASK_TOKENS) * predictor_x_size(f));
    }
    static int64_t blocks(int64_t n_ff) { return (n_ff + ROW_BLOCK - 1) / ROW_BLOCK; }
    static size_t body_size(int64_t n_ff, int64_t n_tokens) {
        const int64_t words = (n_tokens + MASK_TOKENS - 1) / MASK_TOKENS;
        return n_tokens == 1 ? n_ff * sizeof(int32_t)
                             : aligned(blocks(n_ff) * sizeof(int32_t)) + words * n_ff * sizeof(uint64_t);
    }

    part & of(int ith) const { return *reinterpret_cast<part *>(base + ith * CACHE_LINE); }
    char * input(int ith) const { return base + n_threads * CACHE_LINE + ith * input_size; }
    char * body() const { return input(n_threads); }
    int32_t * list() const { return reinterpret_cast<int32_t *>(body()); }
    int32_t * wanted_of_blocks() const { return list(); }
    // Of the rows, for the tokens around t.
    uint64_t * masks(int64_t t) const {
        char * first = body() + aligned(blocks(n_ff) * sizeof(int32_t));
        return reinterpret_cast<uint64_t *>(first) + t / MASK_TOKENS * n_ff;
    }

    // The row where the part of thread `ith` begins, so that all have about as many products; of up to MASK_TOKENS.
    int64_t start(int ith, int nth) const {
        const int32_t * wanted = wanted_of_blocks();
        const int64_t n = blocks(n_ff);
        int64_t total = 0;
        for (int64_t b = 0; b < n; b++) {
            total += wanted[b];
        }
        int64_t before = 0, b = 0;
        for (; b < n && before < split(total, ith, nth); b++) {
            before += wanted[b];
        }
        return ith == nth ? n_ff : std::min(b * ROW_BLOCK, n_ff);
    }
};

// A neuron that fires. strength: what it adds to the output per unit of its up product and of its down row; `down`
// multiplies it with the up product.
struct fired_neuron {
    int32_t row;
    float strength;
};

// What one thread did for one token.
struct count {
    int32_t fired;  // neurons that fired
    int32_t gates;  // gate rows read
};

// The result of `gate`: what each thread found and counted for each token, then each token's neurons by rising rows,
// one thread's after its `start`.
struct gate_result {
    struct head {
        part found;
        count counted;
    };

    // Of one token.
    struct token {
        char * heads;
        size_t head_stride;
        fired_neuron * neurons;

        head & head_of(int ith) const { return *reinterpret_cast<head *>(heads + ith * head_stride); }
        part & of(int ith) const { return head_of(ith).found; }
        fired_neuron * list() const { return neurons; }
    };

    char * base;
    const lzn_ffn & f;
    int64_t n_tokens;

    // One thread's do not share a cache line with another's.
    static size_t head_size(int64_t n_tokens) { return aligned(n_tokens * sizeof(head)); }
    static size_t size(const lzn_ffn & f, int64_t n_tokens) {
        return f.n_threads * head_size(n_tokens) + n_tokens * f.n_ff * sizeof(fired_neuron);
    }

    token of(int64_t t) const {
        char * lists = base + f.n_threads * head_size(n_tokens);
        return {base + t * sizeof(head), head_size(n_tokens), reinterpret_cast<fired_neuron *>(lists) + t * f.n_ff};
    }
};

}  // namespace lzn
