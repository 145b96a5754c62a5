// The sparse FFN as ggml custom operators. Includes ggml's public headers, links to nothing of ggml: the functions that read a weight type come from its type traits when a graph is built.
//
// One FFN is a few operators, run one after the other by ggml's CPU backend, each on every thread of the team:
//   predict   scores of a predictor         -> candidates: which neurons may fire (only where there is a predictor; `choose` where the scores are given)
//   quantize  x F32 [n_embd, n_tokens]      -> x in the types that the dot products want
//   gate      gate rows (ungated: up rows), of every neuron or of the candidates -> which neurons fire, and how strongly
//   down      up and down_t rows of those   -> one partial sum per thread
//   reduce    partial sums, in order        -> y F32 [n_embd, n_tokens]
// No operator allocates, locks or depends on timing: the same number of threads gives the same bits.
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
    size_t x_size;         // bytes of a row of activations in the type that vec_dot expects
    size_t arranged_size;  // bytes of the same as our own loops want it, in front of them; 0 where these want them as they are
    size_t x_offset;       // where both lie within one token's activations
    void (*from_float)(const float * x, void * y, int64_t k);
    void (*vec_dot)(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, int nrc);
    void (*to_float)(const void * x, float * y, int64_t k);
    const void * kernels;  // our own loops for this type on this CPU, or null: then ggml's functions above do
};

// Variants of the kernels; PORTABLE stands for ggml's functions and plain C++.
enum lzn_variant { LZN_PORTABLE = 0, LZN_AVX2 = 1, LZN_AVX512 = 2, LZN_NEON = 3 };

enum lzn_activation { LZN_RELU = 0, LZN_RELU2 = 1, LZN_FATRELU = 2, LZN_DRELU = 3 };

// One FFN: the userdata of its operators. Nothing of it is written but what `counts` points to.
struct lzn_ffn {
    int32_t n_embd;
    int32_t n_ff;
    int32_t n_threads;   // partial sums there is room for
    int32_t activation;  // enum lzn_activation
    int32_t gated;
    int32_t gate_bias;  // whether a bias F32 [n_ff] follows the gate rows among the sources of `gate`
    int32_t up_bias;    // whether a bias F32 [n_ff] follows the up rows among the sources of `down`
    int32_t predicted;  // whether the candidates follow among the sources of `gate`; else every neuron is one
    int32_t rank;       // elements of a predictor row
    float shift;        // added to every score of the predictor
    float threshold;    // a neuron fires where its gate is above this
    int32_t squares;    // whether the product ends with the sum of the neurons' squares: one element more than n_embd
    size_t x_stride;    // bytes from one token's activations, all types together, to the next one's; 64 more than they need
    struct lzn_rows gate;
    struct lzn_rows up;
    struct lzn_rows down;
    struct lzn_rows predictor;  // rows of `rank` elements
    // I32 [n_tokens, 2], the caller's memory, written anew by every run: for each token the neurons whose up and down
    // rows were read, then for each token those whose gate rows were.
    int32_t * counts;
};

// ggml's version that the headers belonged to, e.g. "0.25.3"; and the size of the one struct that is shared with it.
LZN_API const char * lzn_ggml_version(void);
LZN_API size_t lzn_sizeof_tensor(void);
LZN_API size_t lzn_sizeof_ffn(void);

// The fastest variant that this CPU and this build have; whether they have `variant`; and its kernels for a ggml type.
LZN_API int32_t lzn_best_variant(void);
LZN_API bool lzn_has_variant(int32_t variant);
LZN_API const void * lzn_kernels(int32_t type, int32_t variant);
LZN_API size_t lzn_arranged_size(const void * kernels, int64_t n);

// What becomes of a program when ggml gives up (an assertion, a lost device) or a C++ exception is caught by nobody: one line on stderr, exit status 1.
// `lzn_on_abort` is a ggml_abort_callback_t; `lzn_guard` sets the handler of exceptions.
LZN_API void lzn_on_abort(const char * message);
LZN_API void lzn_guard(void);

// Bytes of the operators' results that are not plain F32 matrices.
LZN_API size_t lzn_predict_size(const struct lzn_ffn * ffn, int64_t n_tokens);
LZN_API size_t lzn_gate_size(const struct lzn_ffn * ffn, int64_t n_tokens);
LZN_API size_t lzn_down_size(const struct lzn_ffn * ffn, int64_t n_tokens);

// ggml_custom_op_t; dst->src as listed, dst I8 except where stated. A neuron is a candidate where its score + bias + shift > 0.
LZN_API void lzn_ffn_predict(struct ggml_tensor * dst, int ith, int nth, void * userdata);       // z F32 [rank, n_tokens], predictor rows, bias; score = row . z
LZN_API void lzn_ffn_predict_sign(struct ggml_tensor * dst, int ith, int nth, void * userdata);  // x F32, sign bits I8 [n_embd / 8, n_ff], bias; score = -(how many signs differ)
LZN_API void lzn_ffn_choose(struct ggml_tensor * dst, int ith, int nth, void * userdata);        // scores F32 [n_ff, n_tokens] that another device computed, bias
LZN_API void lzn_ffn_quantize(struct ggml_tensor * dst, int ith, int nth, void * userdata);      // x
LZN_API void lzn_ffn_gate(struct ggml_tensor * dst, int ith, int nth, void * userdata);          // quantize, gate rows [, bias] [, candidates]
LZN_API void lzn_ffn_down(struct ggml_tensor * dst, int ith, int nth, void * userdata);          // quantize, gate, down_t rows [, up rows [, bias]]
LZN_API void lzn_ffn_reduce(struct ggml_tensor * dst, int ith, int nth, void * userdata);        // down, gate; dst F32 [n_embd, n_tokens], or [n_embd + 1, n_tokens] with `squares`
