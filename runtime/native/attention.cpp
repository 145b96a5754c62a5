// Attention of up to LZN_FEW_TOKENS tokens over the cells of a cache that each of them sees.
#include "attention.h"

#include <cmath>
#include <limits>

#include "rows.h"

using namespace lzn;

namespace {

const attention_kernels & kernels_of(const lzn_attention & a) { return *static_cast<const attention_kernels *>(a.kernels); }

// Floats of one head of one token behind the result: its query, its values, and two numbers.
int64_t state_length(const lzn_attention & a) { return 2 * a.head_length + static_cast<int64_t>(CACHE_LINE / sizeof(float)); }

attention_state state_of(const lzn_attention & a, float * states, int64_t t, int64_t head) {
    float * at = states + (t * a.n_heads + head) * state_length(a), *numbers = at + 2 * a.head_length;
    return {at, at + a.head_length, numbers, numbers + 1};
}

const char * row(const ggml_tensor * m, int64_t cell, int64_t head) {
    return static_cast<const char *>(m->data) + cell * m->nb[1] + head * m->nb[2];
}

// The next cells from `at` on that a token sees, ATTENTION_CELLS if there are as many: not those whose mask is minus
// infinity. So what is added up together depends on what it sees, and not on where that lies in the cache.
int seen(const ggml_tensor * mask, int64_t t, int64_t & at, int32_t * cells) {
    const uint16_t * of = reinterpret_cast<const uint16_t *>(static_cast<const char *>(mask->data) + t * mask->nb[1]);
    int n = 0;
    for (; at < mask->ne[0] && n < ATTENTION_CELLS; at++) {
        if (of[at] != 0xfc00) {
            cells[n++] = static_cast<int32_t>(at);
        }
    }
    return n;
}

void begin(const lzn_attention & a, const ggml_tensor * q, int64_t t, int64_t head, const attention_state & state) {
    const char * from = static_cast<const char *>(q->data) + head * q->nb[1] + t * q->nb[2];
    for (int64_t j = 0; j < a.head_length; j++) {
        state.query[j] = reinterpret_cast<const float *>(from)[j] * a.scale;
        state.values[j] = 0.0f;
    }
    *state.largest = -std::numeric_limits<float>::infinity();
    *state.sum = 0.0f;
}

}  // namespace

size_t lzn_attention_size(const lzn_attention * a, int64_t n_tokens) {
    const size_t result = a->head_length * a->n_heads * n_tokens * sizeof(float);
    return aligned(result) + CACHE_LINE + n_tokens * a->n_heads * state_length(*a) * sizeof(float);
}

// Each thread has some heads. Some cells are read by one token after the other, and by heads that share them at once.
void lzn_attend(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_attention & a = *static_cast<const lzn_attention *>(userdata);
    const ggml_tensor *q = dst->src[0], *keys = dst->src[1], *values = dst->src[2], *mask = dst->src[3];
    const int64_t n_tokens = q->ne[2], group = a.n_heads / a.n_heads_kv;
    const int64_t first = split(a.n_heads, ith, nth), last = split(a.n_heads, ith + 1, nth);
    float * result = static_cast<float *>(dst->data);
    float * states = reinterpret_cast<float *>(aligned(result + a.head_length * a.n_heads * n_tokens));
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t head = first; head < last; head++) {
            begin(a, q, t, head, state_of(a, states, t, head));
        }
    }
    int64_t at[LZN_FEW_TOKENS] = {};
    for (bool more = true; more;) {
        more = false;
        for (int64_t t = 0; t < n_tokens; t++) {
            int32_t cells[ATTENTION_CELLS];
            const int n = seen(mask, t, at[t], cells);
            more = more || n > 0;
            for (int64_t head = first; n && head < last;) {
                const int64_t shared = head / group, end = std::min({(shared + 1) * group, last, head + ATTENTION_HEADS});
                attention_state heads[ATTENTION_HEADS];
                const char *k[ATTENTION_CELLS], *v[ATTENTION_CELLS];
                for (int64_t h = head; h < end; h++) {
                    heads[h - head] = state_of(a, states, t, h);
                }
                for (int c = 0; c < n; c++) {
                    k[c] = row(keys, cells[c], shared);
                    v[c] = row(values, cells[c], shared);
                }
                kernels_of(a).attend(a.head_length, static_cast<int>(end - head), heads, n, k, v);
                head = end;
            }
        }
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t head = first; head < last; head++) {
            const attention_state state = state_of(a, states, t, head);
            const float factor = *state.sum > 0.0f ? 1.0f / *state.sum : 0.0f;
            for (int64_t j = 0; j < a.head_length; j++) {
                result[(t * a.n_heads + head) * a.head_length + j] = state.values[j] * factor;
            }
        }
    }
}
