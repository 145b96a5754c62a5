#include "lazyneuron.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t CACHE_LINE = 64;
constexpr int64_t TOKEN_TILE = 16;  // partial sums of this many tokens stay in L2 while weight rows pass
constexpr int64_t ROW_BLOCK = 16;   // rows are dealt to threads in blocks of this many: hot rows lie side by side

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define LZN_CLONES __attribute__((target_clones("avx512f", "avx2,fma", "default")))
#else
#define LZN_CLONES
#endif

struct fired_neuron {
    int32_t row;
    float gate;
};

// The result of `gate`: how many neurons fired in each thread's part, then
//   for one token    each thread's fired neurons, at the offset of its first row
//   for several      F32 [n_tokens, n_ff], 0 where a neuron did not fire
struct gate_result {
    char * base;
    int32_t n_threads;

    uint64_t & count(int ith) const { return *reinterpret_cast<uint64_t *>(base + ith * CACHE_LINE); }
    char * body() const { return base + n_threads * CACHE_LINE; }
    fired_neuron * list() const { return reinterpret_cast<fired_neuron *>(body()); }
    float * matrix() const { return reinterpret_cast<float *>(body()); }
};

int64_t split(int64_t n, int ith, int nth) { return n * ith / nth; }

bool fires(const lzn_ffn & f, float gate) { return gate > f.threshold; }

// What a fired neuron adds to the output, per unit of its down row.
float strength(const lzn_ffn & f, float gate, float up) {
    switch (f.activation) {
        case LZN_RELU2: return gate * gate * up;
        case LZN_DRELU: return gate * std::max(up, 0.0f);
        default: return gate * up;
    }
}

float dot(const lzn_rows & rows, int n, const void * row, const char * x_token) {
    float s = 0.0f;
    rows.vec_dot(n, &s, 0, row, 0, x_token + rows.x_offset, 0, 1);
    return s;
}

LZN_CLONES void axpy(int64_t n, float a, const float * x, float * y) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += a * x[i];
    }
}

LZN_CLONES void add(int64_t n, const float * x, float * y) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += x[i];
    }
}

const char * row_of(const ggml_tensor * weights, const lzn_rows & rows, int64_t r) {
    return static_cast<const char *>(weights->data) + r * rows.row_size;
}

float bias_of(const ggml_tensor * bias, int64_t r) { return bias ? static_cast<const float *>(bias->data)[r] : 0.0f; }

void gate_one_token(const lzn_ffn & f, const gate_result & out, const char * x, const ggml_tensor * weights, const ggml_tensor * bias, int ith, int nth) {
    const int64_t first = split(f.n_ff, ith, nth), last = split(f.n_ff, ith + 1, nth);
    fired_neuron * list = out.list() + first;
    uint64_t n = 0;
    for (int64_t r = first; r < last; r++) {
        const float gate = dot(f.gate, f.n_embd, row_of(weights, f.gate, r), x) + bias_of(bias, r);
        if (fires(f, gate)) {
            list[n++] = {static_cast<int32_t>(r), gate};
        }
    }
    out.count(ith) = n;
}

void gate_tokens(const lzn_ffn & f, const gate_result & out, const char * x, int64_t n_tokens, const ggml_tensor * weights, const ggml_tensor * bias, int ith, int nth) {
    uint64_t n = 0;
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TOKEN_TILE) {
        const int64_t t1 = std::min(t0 + TOKEN_TILE, n_tokens);
        for (int64_t block = ith * ROW_BLOCK; block < f.n_ff; block += nth * ROW_BLOCK) {
            for (int64_t r = block; r < std::min<int64_t>(block + ROW_BLOCK, f.n_ff); r++) {
                float * gates = out.matrix() + r * n_tokens;
                for (int64_t t = t0; t < t1; t++) {
                    const float gate = dot(f.gate, f.n_embd, row_of(weights, f.gate, r), x + t * f.x_stride) + bias_of(bias, r);
                    gates[t] = fires(f, gate) ? gate : 0.0f;
                    n += fires(f, gate);
                }
            }
        }
    }
    out.count(ith) = n;
}

// The up projection, the down rows and where one thread's sums go.
struct accumulator {
    const lzn_ffn & f;
    const ggml_tensor * down;
    const ggml_tensor * up;
    const ggml_tensor * bias;
    const char * x;
    float * sums;     // [n_embd, n_tokens]
    float * scratch;  // [n_embd]

    float up_of(int64_t r, int64_t t) const {
        return f.gated ? dot(f.up, f.n_embd, row_of(up, f.up, r), x + t * f.x_stride) + bias_of(bias, r) : 1.0f;
    }

    void add_one(int64_t r, float gate) const {
        f.down.to_float(row_of(down, f.down, r), scratch, f.n_embd);
        axpy(f.n_embd, strength(f, gate, up_of(r, 0)), scratch, sums);
    }

    void add_tokens(int64_t r, const float * gates, int64_t t0, int64_t t1) const {
        bool loaded = false;
        for (int64_t t = t0; t < t1; t++) {
            if (gates[t] == 0.0f) {
                continue;
            }
            if (!loaded) {
                f.down.to_float(row_of(down, f.down, r), scratch, f.n_embd);
                loaded = true;
            }
            axpy(f.n_embd, strength(f, gates[t], up_of(r, t)), scratch, sums + t * f.n_embd);
        }
    }
};

// The compacted list is split evenly, whatever part of the rows its neurons came from.
void down_one_token(const accumulator & a, const gate_result & gates, int ith, int nth) {
    int64_t total = 0;
    for (int i = 0; i < nth; i++) {
        total += gates.count(i);
    }
    const int64_t first = split(total, ith, nth), last = split(total, ith + 1, nth);
    int64_t base = 0;
    for (int i = 0; i < nth; i++) {
        const int64_t n = gates.count(i);
        const fired_neuron * list = gates.list() + split(a.f.n_ff, i, nth);
        for (int64_t k = std::max(first - base, int64_t(0)); k < std::min(last - base, n); k++) {
            a.add_one(list[k].row, list[k].gate);
        }
        base += n;
    }
}

void down_tokens(const accumulator & a, const gate_result & gates, int64_t n_tokens, int ith, int nth) {
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TOKEN_TILE) {
        const int64_t t1 = std::min(t0 + TOKEN_TILE, n_tokens);
        for (int64_t block = ith * ROW_BLOCK; block < a.f.n_ff; block += nth * ROW_BLOCK) {
            for (int64_t r = block; r < std::min<int64_t>(block + ROW_BLOCK, a.f.n_ff); r++) {
                a.add_tokens(r, gates.matrix() + r * n_tokens, t0, t1);
            }
        }
    }
}

size_t partial_size(const lzn_ffn & f, int64_t n_tokens) { return (n_tokens + 1) * f.n_embd * sizeof(float); }

}  // namespace

const char * lzn_ggml_version(void) { return LZN_GGML_VERSION; }
size_t lzn_sizeof_tensor(void) { return sizeof(ggml_tensor); }
size_t lzn_sizeof_ffn(void) { return sizeof(lzn_ffn); }

size_t lzn_gate_size(const lzn_ffn * ffn, int64_t n_tokens) {
    return ffn->n_threads * CACHE_LINE + ffn->n_ff * (n_tokens == 1 ? sizeof(fired_neuron) : n_tokens * sizeof(float));
}

size_t lzn_down_size(const lzn_ffn * ffn, int64_t n_tokens) { return ffn->n_threads * partial_size(*ffn, n_tokens); }

void lzn_ffn_quantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1];
    for (int64_t t = split(n_tokens, ith, nth); t < split(n_tokens, ith + 1, nth); t++) {
        const float * from = reinterpret_cast<const float *>(static_cast<const char *>(x->data) + t * x->nb[1]);
        char * to = static_cast<char *>(dst->data) + t * f.x_stride;
        f.gate.from_float(from, to + f.gate.x_offset, f.n_embd);
        if (f.gated && f.up.x_offset != f.gate.x_offset) {
            f.up.from_float(from, to + f.up.x_offset, f.n_embd);
        }
    }
}

void lzn_ffn_gate(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const char * x = static_cast<const char *>(dst->src[0]->data);
    const ggml_tensor * bias = f.gate_bias ? dst->src[2] : nullptr;
    const gate_result out{static_cast<char *>(dst->data), f.n_threads};
    const int64_t n_tokens = dst->src[0]->ne[1];
    if (n_tokens == 1) {
        gate_one_token(f, out, x, dst->src[1], bias, ith, nth);
    } else {
        gate_tokens(f, out, x, n_tokens, dst->src[1], bias, ith, nth);
    }
}

void lzn_ffn_down(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->src[0]->ne[1];
    float * sums = reinterpret_cast<float *>(static_cast<char *>(dst->data) + ith * partial_size(f, n_tokens));
    const gate_result gates{static_cast<char *>(dst->src[1]->data), f.n_threads};
    const accumulator a{f,
                        dst->src[2],
                        f.gated ? dst->src[3] : nullptr,
                        f.gated && f.up_bias ? dst->src[4] : nullptr,
                        static_cast<const char *>(dst->src[0]->data),
                        sums,
                        sums + n_tokens * f.n_embd};
    std::memset(sums, 0, n_tokens * f.n_embd * sizeof(float));
    if (n_tokens == 1) {
        down_one_token(a, gates, ith, nth);
    } else {
        down_tokens(a, gates, n_tokens, ith, nth);
    }
}

void lzn_ffn_reduce(ggml_tensor * dst, int ith, int nth, void * userdata) {
    lzn_ffn & f = *static_cast<lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->ne[1], n = f.n_embd * n_tokens;
    const int64_t first = split(n, ith, nth), last = split(n, ith + 1, nth);
    const char * partial = static_cast<const char *>(dst->src[0]->data);
    float * y = static_cast<float *>(dst->data);
    std::memcpy(y + first, reinterpret_cast<const float *>(partial) + first, (last - first) * sizeof(float));
    for (int i = 1; i < nth; i++) {
        add(last - first, reinterpret_cast<const float *>(partial + i * partial_size(f, n_tokens)) + first, y + first);
    }
    if (ith == 0) {
        const gate_result gates{static_cast<char *>(dst->src[1]->data), f.n_threads};
        for (int i = 0; i < nth; i++) {
            f.fired += gates.count(i);
        }
        f.seen += n_tokens;
    }
}
