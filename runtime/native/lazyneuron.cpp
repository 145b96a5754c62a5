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

// What one thread found: n neurons, listed from `start` on, after reading `rows` of them.
struct part {
    int64_t n;
    int64_t start;
    int64_t rows;
};

// The result of `gate`: what each thread found, then
//   for one token    the fired neurons, one thread's after `start`
//   for several      F32 [n_tokens, n_ff], 0 where a neuron did not fire
struct gate_result {
    char * base;
    int32_t n_threads;

    part & of(int ith) const { return *reinterpret_cast<part *>(base + ith * CACHE_LINE); }
    char * body() const { return base + n_threads * CACHE_LINE; }
    fired_neuron * list() const { return reinterpret_cast<fired_neuron *>(body()); }
    float * matrix() const { return reinterpret_cast<float *>(body()); }
};

size_t aligned(size_t size) { return (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// The result of a predictor: what each thread found, room for its own copy of the input, then
//   for one token    I32 [n_ff], the candidates, one thread's after `start`
//   for several      I8 [n_tokens, n_ff], 1 for a candidate
struct candidates {
    char * base;
    int32_t n_threads;
    size_t input_size;  // bytes of one thread's copy

    part & of(int ith) const { return *reinterpret_cast<part *>(base + ith * CACHE_LINE); }
    char * input(int ith) const { return base + n_threads * CACHE_LINE + ith * input_size; }
    char * body() const { return input(n_threads); }
    int32_t * list() const { return reinterpret_cast<int32_t *>(body()); }
    int8_t * matrix() const { return reinterpret_cast<int8_t *>(body()); }
};

// Bytes of one token's input to the predictor, as its rows want it; sign bits where the rows have no type.
size_t predictor_x_size(const lzn_ffn & f) { return f.predictor.vec_dot ? f.predictor.x_size : f.n_embd / 8; }

candidates candidates_of(const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens) {
    return {static_cast<char *>(result->data), f.n_threads, aligned(n_tokens * predictor_x_size(f))};
}

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

// Score the rows of one thread's part; Score is int64_t row, int64_t token -> float.
template <typename Score> void choose(const lzn_ffn & f, const candidates & out, int64_t n_tokens, int ith, int nth, const float * bias, Score score) {
    const int64_t first = split(f.n_ff, ith, nth), last = split(f.n_ff, ith + 1, nth);
    int64_t n = 0;
    for (int64_t r = first; r < last; r++) {
        const float offset = bias[r] + f.shift;
        for (int64_t t = 0; t < n_tokens; t++) {
            const bool chosen = score(r, t) + offset > 0.0f;
            if (n_tokens > 1) {
                out.matrix()[r * n_tokens + t] = chosen;
            } else if (chosen) {
                out.list()[first + n] = static_cast<int32_t>(r);
            }
            n += chosen;
        }
    }
    out.of(ith) = {n, first, last - first};
}

void pack_signs(int64_t n, const float * x, uint8_t * bits) {
    for (int64_t i = 0; i < n / 8; i++) {
        uint8_t byte = 0;
        for (int j = 0; j < 8; j++) {
            byte |= static_cast<uint8_t>(x[8 * i + j] < 0.0f) << j;
        }
        bits[i] = byte;
    }
}

int64_t count_differing(int64_t n_bytes, const uint8_t * a, const uint8_t * b) {
    int64_t n = 0, i = 0;
    for (; i + 8 <= n_bytes; i += 8) {
        uint64_t u, v;
        std::memcpy(&u, a + i, 8);
        std::memcpy(&v, b + i, 8);
        n += __builtin_popcountll(u ^ v);
    }
    for (; i < n_bytes; i++) {
        n += __builtin_popcount(a[i] ^ b[i]);
    }
    return n;
}

// Walk over positions first .. last - 1 of the lists that the threads wrote, one after the other; Visit gets the index in the body.
template <typename Parts, typename Visit> void walk(const Parts & parts, int nth, int64_t first, int64_t last, Visit visit) {
    int64_t base = 0;
    for (int i = 0; i < nth; i++) {
        const part & p = parts.of(i);
        for (int64_t k = std::max(first - base, int64_t(0)); k < std::min(last - base, p.n); k++) {
            visit(p.start + k);
        }
        base += p.n;
    }
}

template <typename Parts> int64_t total_of(const Parts & parts, int nth) {
    int64_t total = 0;
    for (int i = 0; i < nth; i++) {
        total += parts.of(i).n;
    }
    return total;
}

// The gate rows of one FFN.
struct gate_rows {
    const lzn_ffn & f;
    const ggml_tensor * weights;
    const ggml_tensor * bias;
    const char * x;

    float operator()(int64_t r, int64_t t) const { return dot(f.gate, f.n_embd, row_of(weights, f.gate, r), x + t * f.x_stride) + bias_of(bias, r); }
};

// Neurons or, if there are any, candidates are split evenly among the threads.
void gate_one_token(const gate_rows & gate, const candidates * chosen, const gate_result & out, int ith, int nth) {
    const int64_t n_rows = chosen ? total_of(*chosen, nth) : gate.f.n_ff;
    const int64_t first = split(n_rows, ith, nth), last = split(n_rows, ith + 1, nth);
    fired_neuron * list = out.list() + first;
    int64_t n = 0;
    const auto look = [&](int64_t r) {
        const float value = gate(r, 0);
        if (fires(gate.f, value)) {
            list[n++] = {static_cast<int32_t>(r), value};
        }
    };
    if (chosen) {
        walk(*chosen, nth, first, last, [&](int64_t k) { look(chosen->list()[k]); });
    } else {
        for (int64_t r = first; r < last; r++) {
            look(r);
        }
    }
    out.of(ith) = {n, first, last - first};
}

void gate_tokens(const gate_rows & gate, const candidates * chosen, const gate_result & out, int64_t n_tokens, int ith, int nth) {
    const lzn_ffn & f = gate.f;
    part found = {0, 0, 0};
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TOKEN_TILE) {
        const int64_t t1 = std::min(t0 + TOKEN_TILE, n_tokens);
        for (int64_t block = ith * ROW_BLOCK; block < f.n_ff; block += nth * ROW_BLOCK) {
            for (int64_t r = block; r < std::min<int64_t>(block + ROW_BLOCK, f.n_ff); r++) {
                float * gates = out.matrix() + r * n_tokens;
                for (int64_t t = t0; t < t1; t++) {
                    const bool look = !chosen || chosen->matrix()[r * n_tokens + t];
                    const float value = look ? gate(r, t) : 0.0f;
                    const bool fired = look && fires(f, value);
                    gates[t] = fired ? value : 0.0f;
                    found.n += fired;
                    found.rows += look;
                }
            }
        }
    }
    out.of(ith) = found;
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
    const int64_t total = total_of(gates, nth);
    walk(gates, nth, split(total, ith, nth), split(total, ith + 1, nth), [&](int64_t k) { a.add_one(gates.list()[k].row, gates.list()[k].gate); });
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

size_t lzn_predict_size(const lzn_ffn * ffn, int64_t n_tokens) {
    const size_t body = ffn->n_ff * (n_tokens == 1 ? sizeof(int32_t) : n_tokens);
    return ffn->n_threads * (CACHE_LINE + aligned(n_tokens * predictor_x_size(*ffn))) + body;
}

size_t lzn_gate_size(const lzn_ffn * ffn, int64_t n_tokens) {
    return ffn->n_threads * CACHE_LINE + ffn->n_ff * (n_tokens == 1 ? sizeof(fired_neuron) : n_tokens * sizeof(float));
}

size_t lzn_down_size(const lzn_ffn * ffn, int64_t n_tokens) { return ffn->n_threads * partial_size(*ffn, n_tokens); }

// Every thread makes its own copy of the input: it is short, and a barrier costs more.
void lzn_ffn_predict(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor *z = dst->src[0], *rows = dst->src[1];
    const int64_t n_tokens = z->ne[1];
    const candidates out = candidates_of(f, dst, n_tokens);
    const size_t x_size = f.predictor.x_size;
    for (int64_t t = 0; t < n_tokens; t++) {
        f.predictor.from_float(static_cast<const float *>(z->data) + t * f.rank, out.input(ith) + t * x_size, f.rank);
    }
    choose(f, out, n_tokens, ith, nth, static_cast<const float *>(dst->src[2]->data),
           [&](int64_t r, int64_t t) { return dot(f.predictor, f.rank, row_of(rows, f.predictor, r), out.input(ith) + t * x_size); });
}

void lzn_ffn_predict_sign(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1], n_bytes = f.n_embd / 8;
    const candidates out = candidates_of(f, dst, n_tokens);
    uint8_t * signs = reinterpret_cast<uint8_t *>(out.input(ith));
    for (int64_t t = 0; t < n_tokens; t++) {
        pack_signs(f.n_embd, static_cast<const float *>(x->data) + t * f.n_embd, signs + t * n_bytes);
    }
    const uint8_t * rows = static_cast<const uint8_t *>(dst->src[1]->data);
    choose(f, out, n_tokens, ith, nth, static_cast<const float *>(dst->src[2]->data),
           [&](int64_t r, int64_t t) { return -static_cast<float>(count_differing(n_bytes, rows + r * n_bytes, signs + t * n_bytes)); });
}

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
    const int64_t n_tokens = dst->src[0]->ne[1];
    const gate_rows gate{f, dst->src[1], f.gate_bias ? dst->src[2] : nullptr, static_cast<const char *>(dst->src[0]->data)};
    const gate_result out{static_cast<char *>(dst->data), f.n_threads};
    candidates chosen{};
    if (f.predicted) {
        chosen = candidates_of(f, dst->src[f.gate_bias ? 3 : 2], n_tokens);
    }
    if (n_tokens == 1) {
        gate_one_token(gate, f.predicted ? &chosen : nullptr, out, ith, nth);
    } else {
        gate_tokens(gate, f.predicted ? &chosen : nullptr, out, n_tokens, ith, nth);
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
            f.fired += gates.of(i).n;
            f.gates += gates.of(i).rows;
        }
        f.seen += n_tokens;
    }
}
