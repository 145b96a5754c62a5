// The sparse FFN as ggml custom operators. Includes ggml's public headers and links to nothing of ggml: the functions
// that read a weight type come from its type traits when a graph is built.
//
// One FFN is a few operators, run one after the other by ggml's CPU backend, each on every thread of the team:
//   predict   scores of a predictor -> candidates: which neurons may fire. Only where there is a predictor;
//             `choose` where the scores are given
//   quantize  x F32 [n_embd, n_tokens] -> x in the types that the dot products want
// then for up to LZN_FEW_TOKENS tokens
//   gate      gate rows (ungated: up rows), of every neuron or of the candidates -> which neurons fire, how strongly
//   down      up and down_t rows of those -> one partial sum per thread and token
//   reduce    partial sums, in order -> y F32 [n_embd, n_tokens]
// and for more
//   tokens    gate, up and down_t rows -> partial sums for `reduce`; or, where each thread has tokens of its own, y itself
// No operator allocates, locks or depends on timing: the same number of threads and tokens gives the same bits, and a
// token's result does not depend on what the other tokens of its batch are. Of few tokens each one's result has the same
// bits as alone.
//
// The neurons are rows of one matrix, and a token may scan some ranges of them only: a table says which ranges there
// are, and a source of the operators says for each token which of them it scans and what their neurons are multiplied
// by. The experts of a mixture are such ranges.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "ggml.h"

#if defined(_WIN32)
#define LZN_API extern "C" __declspec(dllexport)
#else
#define LZN_API extern "C" __attribute__((visibility("default")))
#endif

// How to read rows (of n_embd elements, if not said otherwise) of one weight type.
struct lzn_rows {
    size_t row_size;       // bytes of a row of weights
    size_t stride;         // bytes from one row to the next
    size_t x_size;         // bytes of a row of activations in the type that vec_dot expects
    size_t arranged_size;  // bytes of the same as our own loops want it, in front of them; 0 where they want no other
    size_t x_offset;       // where both lie within one token's activations
    void (*from_float)(const float * x, void * y, int64_t k);
    void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
    void (*to_float)(const void * x, float * y, int64_t k);
    const void * kernels;  // our own loops for this type on this CPU, or null: then ggml's functions above do
};

// Variants of the kernels; PORTABLE stands for ggml's functions and plain C++.
enum lzn_variant { LZN_PORTABLE = 0, LZN_AVX2 = 1, LZN_AVXVNNI = 2, LZN_AVX512 = 3, LZN_NEON = 4, LZN_I8MM = 5 };

enum lzn_activation { LZN_RELU = 0, LZN_RELU2 = 1, LZN_FATRELU = 2, LZN_DRELU = 3 };

// One FFN: the userdata of its operators. Nothing of it is written but what `counts` and `chosen` point to.
struct lzn_ffn {
    int32_t n_embd;
    int32_t n_ff;        // neurons, of all ranges together
    int32_t n_threads;   // that there is room for in the operators' results
    int32_t activation;  // enum lzn_activation
    int32_t gated;
    int32_t gate_bias;   // whether a bias F32 [n_ff] follows the gate rows among the sources
    int32_t up_bias;     // whether a bias F32 [n_ff] follows the up rows among the sources
    int32_t scored;      // whether `tokens` has the gates F32 [n_ff, n_tokens], without bias, in the place of the gate rows
    int32_t predicted;   // whether there are candidates among the sources; else every neuron is one
    int32_t rank;        // elements of a predictor row
    float shift;         // added to every score of the predictor
    float threshold;     // a neuron fires where its gate is above this
    int32_t squares;     // whether the product ends with the sum of the neurons' squares: one element more than n_embd
    int32_t n_ranges;    // ranges in the table; 0: every token scans every row, and the sources name no ranges
    size_t x_stride;     // bytes from one token's activations, all types together, to the next one's; 64 more than needed
    struct lzn_rows gate;
    struct lzn_rows up;
    struct lzn_rows down;
    struct lzn_rows predictor;  // rows of `rank` elements
    const int32_t * ranges;     // [2, n_ranges], the first row of each and the one behind its last, the caller's memory
    // [n_tokens, 2], the caller's memory, written anew by every run: for each token the neurons whose up and down rows
    // were read, then for each token those whose gate rows were.
    int32_t * counts;
    int64_t * chosen;  // [n_ranges], the caller's memory, or null: how many tokens chose each range, added up by every run
};

// One matrix that tokens are multiplied with: the userdata of `lzn_multiply`.
struct lzn_product {
    int32_t n_in;
    int32_t n_out;
    int32_t n_threads;  // that there is room for in the result
    struct lzn_rows rows;
};

// One matrix that many tokens are multiplied with: the userdata of `lzn_tiles_arrange` and `lzn_tiles_multiply`.
struct lzn_tiles {
    int32_t n_in;       // a multiple of 32
    int32_t n_out;
    size_t stride;      // bytes from one row of weights to the next
    size_t block_size;  // bytes of 32 weights
    const void * kernels;  // `lzn_tile_kernels` of the type
};

// The attention of a model's block: the userdata of `lzn_attend`.
struct lzn_attention {
    int32_t head_length;  // a multiple of 16
    int32_t n_heads;
    int32_t n_heads_kv;  // of which n_heads is a multiple
    int32_t n_threads;
    float scale;          // of the scores
    const void * kernels;  // `lzn_attention_kernels`
};

// What scores of some neurons come to on some tokens, counted by `lzn_count_margins`; [n_tokens, n_neurons] in, [n_neurons,
// n_bins] out and added to.
struct lzn_margins {
    int64_t n_tokens;
    int64_t n_neurons;
    int64_t n_bins;
    const float * scores;
    const bool * fired;
    const float * energy;  // of those that fired
    const float * slope;   // [n_neurons]; a score's bin is the whole part of slope * score + offset, or the nearest bin
    const float * offset;
    int32_t * predicted;  // tokens in each bin
    int32_t * hits;       // of these, where the neuron fired
    double * kept;        // and their energy
};

// What a pager did since its last `lzn_pager_load`, in pages: asked for, read, dropped again, and there now. reads: of
// several pages each.
struct lzn_pager_stats {
    int64_t wanted;
    int64_t read;
    int64_t reads;
    int64_t dropped;
    int64_t resident;
    int64_t nanoseconds;  // waited for
};

// Which rows `lzn_fetch` asks for: of all neurons (of the ranges that the tokens chose), of the candidates, or of those
// that fire; or whole matrices.
enum lzn_fetched { LZN_ALL = 0, LZN_CANDIDATES = 1, LZN_FIRED = 2, LZN_WHOLE = 3 };

// What is to be there before the next operator: the userdata of `lzn_fetch`.
struct lzn_fetch {
    void * pager;
    const struct lzn_ffn * ffn;  // of the rows
    int32_t what;                // enum lzn_fetched
    int32_t n_matrices;
    const void * first[3];       // of each matrix, its first row
    size_t size[3];              // bytes of a row, or of a whole matrix
    size_t stride[3];            // bytes from one row to the next
};

#define LZN_MAX_RANGES 64  // that one token scans
#define LZN_FEW_TOKENS 16  // at most, for `gate` and `down`

// ggml's version that the headers belonged to, e.g. "0.25.3"; and the size of the one struct that is shared with it.
LZN_API const char * lzn_ggml_version(void);
LZN_API size_t lzn_sizeof_tensor(void);
LZN_API size_t lzn_sizeof_ffn(void);
LZN_API size_t lzn_sizeof_product(void);
LZN_API size_t lzn_sizeof_tiles(void);
LZN_API size_t lzn_sizeof_margins(void);
LZN_API size_t lzn_sizeof_attention(void);
LZN_API size_t lzn_sizeof_fetch(void);
LZN_API size_t lzn_sizeof_pager_stats(void);

// The fastest variant that this CPU and this build have; whether they have `variant`; and its kernels for a ggml type.
LZN_API int32_t lzn_best_variant(void);
LZN_API bool lzn_has_variant(int32_t variant);
LZN_API const void * lzn_kernels(int32_t type, int32_t variant);
LZN_API const void * lzn_tile_kernels(int32_t type, int32_t variant);
LZN_API const void * lzn_attention_kernels(int32_t variant);  // for keys and values in F16; null where there are none
LZN_API size_t lzn_arranged_size(const void * kernels, int64_t n);

// What happens when ggml gives up (an assertion, a lost device) or nobody catches a C++ exception: one line on stderr,
// exit status 1. `lzn_on_abort` is a ggml_abort_callback_t; `lzn_guard` sets the handler of exceptions.
LZN_API void lzn_on_abort(const char * message);
LZN_API void lzn_guard(void);

// Bytes of the operators' results that are not plain matrices; `down` means `tokens` too.
LZN_API size_t lzn_predict_size(const struct lzn_ffn * ffn, int64_t n_tokens);
LZN_API size_t lzn_gate_size(const struct lzn_ffn * ffn, int64_t n_tokens);
LZN_API size_t lzn_down_size(const struct lzn_ffn * ffn, int64_t n_tokens);
LZN_API size_t lzn_product_size(const struct lzn_product * product, int64_t n_tokens);
LZN_API size_t lzn_attention_size(const struct lzn_attention * attention, int64_t n_tokens);
LZN_API size_t lzn_tiles_size(const struct lzn_tiles * tiles, int64_t n_tokens);  // of `lzn_tiles_arrange`
// Whether the result of `tokens` begins with y F32 [n_embd, n_tokens], and needs no `reduce`.
LZN_API bool lzn_tokens_alone(const struct lzn_ffn * ffn, int64_t n_tokens);

// ggml_custom_op_t. The comments list dst->src; what is in brackets is there if the FFN says so. dst is bytes except
// where stated. Where there are ranges, `chosen` is I32 [k, n_tokens], indices into their table (an index outside of
// it: no range), and `weights` F32 [k, n_tokens]; a token's ranges must not overlap. A neuron is a candidate where its
// score + bias + shift > 0; y has one row more with `squares`.
#define LZN_OPERATOR(name) LZN_API void lzn_ffn_##name(struct ggml_tensor * dst, int ith, int nth, void * userdata)
LZN_OPERATOR(predict);       // z F32 [rank, n_tokens], predictor rows, bias [, chosen]; score = row . z
LZN_OPERATOR(predict_sign);  // x, sign bits I8 [n_embd / 8, n_ff], bias [, chosen]; score = -(how many signs differ)
LZN_OPERATOR(choose);        // scores F32 [n_ff, n_tokens] that another device computed, bias [, chosen]
LZN_OPERATOR(quantize);      // x F32 [n_embd, n_tokens]
LZN_OPERATOR(gate);          // quantize, gate rows [, bias] [, candidates] [, chosen, weights]
LZN_OPERATOR(down);          // quantize, gate, down_t rows [, up rows [, bias]]
LZN_OPERATOR(tokens);        // quantize, what `gate` has after it, what `down` has after gate
LZN_OPERATOR(reduce);        // down or tokens; dst is y F32 [n_embd, n_tokens]

// ggml_custom_op_t: x F32 [n_in, n_tokens], W [n_in, n_out] -> W x F32 [n_out, n_tokens], and scratch behind it. A token's
// result has the same bits whatever the other tokens and their number are.
LZN_API void lzn_multiply(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// ggml_custom_op_t: q F32 [head_length, n_heads, n_tokens], keys F16 [head_length, n_cells, n_heads_kv], values the same, mask
// F16 [n_cells, n_tokens], minus infinity for what a token does not see -> F32 [head_length * n_heads, n_tokens], and scratch
// behind it. A token's result has the same bits whatever the other tokens, their number and the threads are.
LZN_API void lzn_attend(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// ggml_custom_op_t: the same product for many tokens. First x F32 [n_in, n_tokens] -> tiles; then tiles, W [n_in, n_out]
// -> W x F32 [n_out, n_tokens]. x is rounded to 8 bits by blocks of 32, as ggml does. A token's result has the same bits
// in any batch, but not those of `lzn_multiply`.
LZN_API void lzn_tiles_arrange(struct ggml_tensor * dst, int ith, int nth, void * userdata);
LZN_API void lzn_tiles_multiply(struct ggml_tensor * dst, int ith, int nth, void * userdata);

// --- rows that are read when they are asked for (pager.cpp) -----------------------------------------------------------

// A window of memory as large as some files, read by so many threads; null where the system has none. One thread may
// use it at a time. `error`: 0, or what went wrong (an errno).
LZN_API void * lzn_pager_new(const char * const * paths, int32_t n_files, int32_t n_readers, int32_t * error);
LZN_API void lzn_pager_free(void * pager);
LZN_API void * lzn_pager_address(const void * pager, int32_t file);  // of the file's first byte
LZN_API void lzn_pager_limit(void * pager, int64_t pages);           // how many may be there
LZN_API int32_t lzn_pager_error(void * pager);                       // see `pager::take_error`
LZN_API void lzn_pager_stats_of(const void * pager, struct lzn_pager_stats * stats);
// Reads bytes that lie in the window, n ranges (first, size), as hot ones.
LZN_API void lzn_pager_load(void * pager, const int64_t * ranges, int64_t n);

// ggml_custom2_op_t: hands `a` on when the rows are there. b is x as `quantize` left it, of all tokens; or the ranges that
// the tokens chose, I32 [k, n_tokens]. a is for LZN_CANDIDATES the candidates, for LZN_FIRED the result of `gate`.
LZN_API void lzn_fetch_rows(struct ggml_tensor * dst, const struct ggml_tensor * a, const struct ggml_tensor * b, int ith, int nth, void * userdata);

// What a fit of predictors counts; no operators. `lzn_moments` gives the sums over tokens of scores, of goals, of their
// squares and of their products: [5, n_neurons], from [n_tokens, n_neurons] each.
LZN_API void lzn_count_margins(const struct lzn_margins * margins);
LZN_API void lzn_moments(const float * scores, const float * goal, int64_t n_tokens, int64_t n_neurons, double * sums);

// --- grammars (grammar.cpp) ------------------------------------------------------------------------------------------

// An automaton for a grammar over bytes. code [n_code, 2]: elements of rules, (kind, value): 0 the rule ends, 1 another
// alternative follows, 2 rule `value`, 3 a byte of set `value`. rules [n_rules]: where each rule begins; the first one
// is the whole text. sets [n_sets, 256]: the bytes of each. Null where there is no memory.
// States are numbers; -1: nothing can follow; -2: given up, as a bound on work or memory was reached.
LZN_API void * lzn_grammar_new(const int32_t * code, int32_t n_code, const int32_t * rules, int32_t n_rules, const uint8_t * sets, int32_t n_sets);
LZN_API void lzn_grammar_free(void * grammar);
LZN_API int32_t lzn_grammar_begin(void * grammar);
LZN_API int32_t lzn_grammar_step(void * grammar, int32_t state, const uint8_t * bytes, int64_t n);
// 0: more must follow, 1: the text may end here, 2: it must.
LZN_API int32_t lzn_grammar_ends(void * grammar, int32_t state);
// allowed [number of tokens] <- 1 for tokens that may follow. bytes, offsets: of all tokens. order [n]: some tokens by
// their bytes, ascending; common [n]: how many bytes each has in common with the one before it.
LZN_API int32_t lzn_grammar_mask(void * grammar, int32_t state, const uint8_t * bytes, const int64_t * offsets, const int32_t * order, const int32_t * common, int32_t n, uint8_t * allowed);
