#include "lazyneuron.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t CACHE_LINE = 64;
constexpr int64_t TOKEN_TILE = 16;  // partial sums of this many tokens stay in L2 while weight rows pass
constexpr int64_t SCORE_TILE = 64;  // each thread has a copy of a predictor's input for this many tokens
constexpr int64_t ROW_BLOCK = 64;   // rows are dealt to threads in blocks of this many: hot rows lie side by side

using lzn::AXPY_ROWS;
using lzn::DOT_ROWS;
using lzn::row_kernels;

struct fired_neuron {
    int32_t row;
    float gate;
};

// What one thread found: n neurons, listed from `start` on.
struct part {
    int64_t n;
    int64_t start;
};

// What one thread did for one token.
struct count {
    int32_t fired;  // neurons that fired
    int32_t gates;  // gate rows read
};

size_t aligned(size_t size) { return (size + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

// The result of `gate`: what each thread found (one token only), what it counted for each token, then
//   for one token    the fired neurons, one thread's after `start`
//   for several      F32 [n_tokens, n_ff], 0 where a neuron did not fire
struct gate_result {
    char * base;
    int32_t n_threads;
    int64_t n_tokens;

    size_t thread_size() const { return CACHE_LINE + aligned(n_tokens * sizeof(count)); }
    part & of(int ith) const { return *reinterpret_cast<part *>(base + ith * thread_size()); }
    count * counts(int ith) const { return reinterpret_cast<count *>(base + ith * thread_size() + CACHE_LINE); }
    char * body() const { return base + n_threads * thread_size(); }
    fired_neuron * list() const { return reinterpret_cast<fired_neuron *>(body()); }
    float * matrix() const { return reinterpret_cast<float *>(body()); }
};

// ggml aligns its tensors to less than our loops like: operators' results are longer by a cache line.
char * aligned_data(const ggml_tensor * t) { return reinterpret_cast<char *>(aligned(reinterpret_cast<uintptr_t>(t->data))); }

// The result of a predictor: what each thread found, room for its own copy of the input of a tile, then
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
size_t predictor_x_size(const lzn_ffn & f) { return f.predictor.vec_dot ? aligned(f.predictor.arranged_size + f.predictor.x_size) : f.n_embd / 8; }

candidates candidates_of(const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens) {
    return {aligned_data(result), f.n_threads, aligned(std::min(n_tokens, SCORE_TILE) * predictor_x_size(f))};
}

const row_kernels * kernels_of(const lzn_rows & rows) { return static_cast<const row_kernels *>(rows.kernels); }

// One token's activations as `rows` want them.
void prepare(const lzn_rows & rows, int64_t n, const float * x, char * out) {
    rows.from_float(x, out + rows.arranged_size, n);
    if (rows.arranged_size) {
        kernels_of(rows)->arrange(n, out + rows.arranged_size, out);
    }
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

// Several products with one x, the rows' own kernels or ggml's; `next` is fetched meanwhile if it is not null.
void dots(const lzn_rows & rows, int64_t n, int n_rows, const char * const * row, const char * const * next, const char * x_token, float * out) {
    const void * x = x_token + rows.x_offset;
    if (rows.kernels) {
        return kernels_of(rows)->dots(n, n_rows, row, next, x, out);
    }
    for (int k = 0; k < n_rows; k++) {
        rows.vec_dot(static_cast<int>(n), out + k, 0, row[k], 0, x, 0, 1);
    }
}

void add(int64_t n, const float * x, float * y) {
    for (int64_t i = 0; i < n; i++) {
        y[i] += x[i];
    }
}

// y += sum of a[k] * row[k]; scratch: 2 n floats, for a row and for the sum of this pass: numbers lose less when they are added to small ones first
void axpys(const lzn_rows & rows, int64_t n, int n_rows, const char * const * row, const char * const * next, const float * a, float * y, float * scratch) {
    if (rows.kernels) {
        return kernels_of(rows)->axpys(n, n_rows, row, next, a, y);
    }
    float *numbers = scratch, *sums = scratch + n;
    std::fill(sums, sums + n, 0.0f);
    for (int k = 0; k < n_rows; k++) {
        rows.to_float(row[k], numbers, n);
        for (int64_t i = 0; i < n; i++) {
            sums[i] += a[k] * numbers[i];
        }
    }
    add(n, sums, y);
}

const char * row_of(const ggml_tensor * weights, const lzn_rows & rows, int64_t r) {
    return static_cast<const char *>(weights->data) + r * rows.row_size;
}

float bias_of(const ggml_tensor * bias, int64_t r) { return bias ? static_cast<const float *>(bias->data)[r] : 0.0f; }

// Score the rows of one thread's part, a few at a time. Prepare is (first token, last token) of a tile, Scores is (first row, how many, token, token within the tile, out).
template <typename Prepare, typename Scores>
void choose(const lzn_ffn & f, const candidates & out, int64_t n_tokens, int ith, int nth, const float * bias, Prepare prepare_tile, Scores scores) {
    const int64_t first = split(f.n_ff, ith, nth), last = split(f.n_ff, ith + 1, nth);
    int64_t n = 0;
    for (int64_t t0 = 0; t0 < n_tokens; t0 += SCORE_TILE) {
        const int64_t t1 = std::min(t0 + SCORE_TILE, n_tokens);
        prepare_tile(t0, t1);
        for (int64_t r = first; r < last; r += DOT_ROWS) {
            const int n_rows = static_cast<int>(std::min<int64_t>(DOT_ROWS, last - r));
            for (int64_t t = t0; t < t1; t++) {
                float score[DOT_ROWS];
                scores(r, n_rows, t, t - t0, score);
                for (int k = 0; k < n_rows; k++) {
                    const bool chosen = score[k] + bias[r + k] + f.shift > 0.0f;
                    if (n_tokens > 1) {
                        out.matrix()[(r + k) * n_tokens + t] = chosen;
                    } else {
                        out.list()[first + n] = static_cast<int32_t>(r + k);  // overwritten by the next one if not chosen
                    }
                    n += chosen;
                }
            }
        }
    }
    out.of(ith) = {n, first};
}

// The signs of eight numbers, the first one's in the lowest bit; 1 is negative, and zero is not, whatever its sign.
uint8_t eight_signs(const float * x) {
#if defined(__SSE2__)
    const __m128 zero = _mm_setzero_ps();
    return static_cast<uint8_t>(_mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(x), zero)) | _mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(x + 4), zero)) << 4);
#else
    uint8_t byte = 0;
    for (int j = 0; j < 8; j++) {
        byte |= static_cast<uint8_t>(x[j] < 0.0f) << j;
    }
    return byte;
#endif
}

void pack_signs(int64_t n, const float * x, uint8_t * bits) {
    for (int64_t i = 0; i < n / 8; i++) {
        bits[i] = eight_signs(x + 8 * i);
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

// The gate rows of one FFN.
struct gate_rows {
    const lzn_ffn & f;
    const ggml_tensor * weights;
    const ggml_tensor * bias;
    const char * x;

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
};

// Appends the neurons that fire to one thread's list.
struct firing_list {
    const gate_rows & gate;
    fired_neuron * list;
    int64_t n = 0;

    void look(const int32_t * neurons, int count, const int32_t * ahead) {
        float gates[DOT_ROWS];
        gate.of(neurons, count, ahead, 0, gates);
        for (int k = 0; k < count; k++) {
            list[n] = {neurons[k], gates[k]};  // overwritten by the next one if this does not fire: a branch here would be mispredicted
            n += fires(gate.f, gates[k]);
        }
    }
};

// Every neuron, row by row: one stream of bytes is what the hardware fetches best, several at once it does not follow.
void gate_every(const gate_rows & gate, const gate_result & out, int ith, int nth) {
    const int64_t first = split(gate.f.n_ff, ith, nth), last = split(gate.f.n_ff, ith + 1, nth);
    firing_list found{gate, out.list() + first};
    for (int64_t r = first; r < last; r++) {
        const int32_t neuron = static_cast<int32_t>(r);
        found.look(&neuron, 1, nullptr);
    }
    out.of(ith) = {found.n, first};
    out.counts(ith)[0] = {static_cast<int32_t>(found.n), static_cast<int32_t>(last - first)};
}

void gate_candidates(const gate_rows & gate, const candidates & chosen, const gate_result & out, int ith, int nth) {
    share<candidates> mine(chosen, ith, nth);
    const int64_t first = split(total_of(chosen, nth), ith, nth);
    firing_list found{gate, out.list() + first};
    int32_t now[DOT_ROWS], ahead[DOT_ROWS];
    int n = mine.take(now, DOT_ROWS);
    while (n > 0) {
        const int n_ahead = mine.take(ahead, DOT_ROWS);
        found.look(now, n, n_ahead == n ? ahead : nullptr);
        std::copy(ahead, ahead + n_ahead, now);
        n = n_ahead;
    }
    out.of(ith) = {found.n, first};
    out.counts(ith)[0] = {static_cast<int32_t>(found.n), static_cast<int32_t>(mine.size())};
}

// Several tokens: a few rows against every token of a tile; a row that no token of the tile wants is not read.
void gate_tokens(const gate_rows & gate, const candidates * chosen, const gate_result & out, int64_t n_tokens, int ith, int nth) {
    const lzn_ffn & f = gate.f;
    count * found = out.counts(ith);
    std::fill(found, found + n_tokens, count{0, 0});
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TOKEN_TILE) {
        const int64_t t1 = std::min(t0 + TOKEN_TILE, n_tokens);
        for (int64_t block = ith * ROW_BLOCK; block < f.n_ff; block += nth * ROW_BLOCK) {
            const int64_t end = std::min<int64_t>(block + ROW_BLOCK, f.n_ff);
            for (int64_t t = t0; t < t1; t++) {
                int32_t neurons[ROW_BLOCK];
                int n = 0;
                for (int64_t r = block; r < end; r++) {
                    out.matrix()[r * n_tokens + t] = 0.0f;
                    neurons[n] = static_cast<int32_t>(r);
                    n += !chosen || chosen->matrix()[r * n_tokens + t];
                }
                for (int k = 0; k < n; k += DOT_ROWS) {
                    float gates[DOT_ROWS];
                    const int count = std::min(DOT_ROWS, n - k);
                    gate.of(neurons + k, count, nullptr, t, gates);
                    for (int j = 0; j < count; j++) {
                        if (fires(f, gates[j])) {
                            out.matrix()[neurons[k + j] * n_tokens + t] = gates[j];
                            found[t].fired++;
                        }
                    }
                }
                found[t].gates += n;
            }
        }
    }
}

// Floats that the kernels may use of one token's sums; behind them stands the sum of squares.
int64_t y_size(int64_t n_embd) { return (n_embd + lzn::GROUP - 1) / lzn::GROUP * lzn::GROUP; }

// Floats from one token's sums to the next one's.
int64_t y_stride(const lzn_ffn & f) { return y_size(f.n_embd) + (f.squares ? lzn::GROUP : 0); }

// How a batch is dealt to threads. A crew has a range of tokens of its own, and its threads divide the rows; each of them has partial sums for those tokens only.
// There are as many crews as tiles of tokens, or as threads: then each thread has its own tokens. Either way the partial sums are bounded, whatever the number of threads and tokens.
struct crews {
    int64_t n_tokens;
    int nth;
    int n;

    crews(int64_t n_tokens, int nth) : n_tokens(n_tokens), nth(nth), n(static_cast<int>(std::min<int64_t>(nth, (n_tokens + TOKEN_TILE - 1) / TOKEN_TILE))) {}

    int first_thread(int crew) const { return static_cast<int>(split(nth, crew, n)); }
    int64_t first_token(int crew) const { return split(n_tokens, first_thread(crew), nth); }  // as many as its threads
    int of_thread(int ith) const {
        int crew = 0;
        while (first_thread(crew + 1) <= ith) {
            crew++;
        }
        return crew;
    }
    // Tokens of the largest one.
    int64_t room() const {
        int64_t most = 0;
        for (int c = 0; c < n; c++) {
            most = std::max(most, first_token(c + 1) - first_token(c));
        }
        return most;
    }
};

// The up and down rows of one FFN, and where one thread's sums go.
struct accumulator {
    const lzn_ffn & f;
    const ggml_tensor * down;
    const ggml_tensor * up;
    const ggml_tensor * bias;
    const char * x;
    float * sums;     // [y_stride, last - first]
    int64_t first, last;  // tokens
    float * scratch;  // [2 n_embd]

    // Add up to AXPY_ROWS neurons to token t: first their up rows, while their down rows are fetched; then the down rows, while the up rows of `ahead` are.
    void add(const fired_neuron * neurons, int n, const fired_neuron * ahead, int n_ahead, int64_t t) const {
        const char *down_rows[AXPY_ROWS], *next[AXPY_ROWS];
        float strengths[AXPY_ROWS];
        for (int k = 0; k < n; k++) {
            down_rows[k] = row_of(down, f.down, neurons[k].row);
        }
        for (int k = 0; k < n; k += DOT_ROWS) {
            up_strengths(neurons + k, std::min(DOT_ROWS, n - k), down_rows + k, t, strengths + k);
        }
        const bool fetch = f.gated && n_ahead == n;
        for (int k = 0; fetch && k < n; k++) {
            next[k] = row_of(up, f.up, ahead[k].row);
        }
        axpys(f.down, f.n_embd, n, down_rows, fetch ? next : nullptr, strengths, of(t), scratch);
        for (int k = 0; f.squares && k < n; k++) {
            of(t)[y_size(f.n_embd)] += strengths[k] * strengths[k];
        }
    }

    // Put the sums in order.
    void finish() const {
        const row_kernels * kernels = kernels_of(f.down);
        for (int64_t t = first; kernels && kernels->finish && t < last; t++) {
            kernels->finish(f.n_embd, of(t));
        }
    }

  private:
    float * of(int64_t t) const { return sums + (t - first) * y_stride(f); }

    void up_strengths(const fired_neuron * neurons, int n, const char * const * down_rows, int64_t t, float * out) const {
        float ups[DOT_ROWS] = {1.0f, 1.0f, 1.0f, 1.0f};
        if (f.gated) {
            const char * rows[DOT_ROWS];
            for (int k = 0; k < n; k++) {
                rows[k] = row_of(up, f.up, neurons[k].row);
            }
            // The rows of both matrices are of one length only where they are of one type.
            const bool fetch = f.up.row_size == f.down.row_size;
            dots(f.up, f.n_embd, n, rows, fetch ? down_rows : nullptr, x + t * f.x_stride, ups);
        }
        for (int k = 0; k < n; k++) {
            out[k] = strength(f, neurons[k].gate, ups[k] + (f.gated ? bias_of(bias, neurons[k].row) : 0.0f));
        }
    }
};

void down_one_token(const accumulator & a, const gate_result & gates, int ith, int nth) {
    share<gate_result> mine(gates, ith, nth);
    fired_neuron now[AXPY_ROWS], ahead[AXPY_ROWS];
    int n = mine.take(now, AXPY_ROWS);
    while (n > 0) {
        const int n_ahead = mine.take(ahead, AXPY_ROWS);
        a.add(now, n, ahead, n_ahead, 0);
        std::copy(ahead, ahead + n_ahead, now);
        n = n_ahead;
    }
}

// Token by token within a tile and a block of rows: the rows stay in the cache, and so do the sums.
// ith, nth: of the crew
void down_tokens(const accumulator & a, const gate_result & gates, int64_t n_tokens, int ith, int nth) {
    const int64_t mine = a.last - a.first, n_tiles = (mine + TOKEN_TILE - 1) / TOKEN_TILE;
    for (int64_t tile = 0; tile < n_tiles; tile++) {
        const int64_t t0 = a.first + mine * tile / n_tiles, t1 = a.first + mine * (tile + 1) / n_tiles;
        for (int64_t block = ith * ROW_BLOCK; block < a.f.n_ff; block += nth * ROW_BLOCK) {
            const int64_t end = std::min<int64_t>(block + ROW_BLOCK, a.f.n_ff);
            for (int64_t t = t0; t < t1; t++) {
                fired_neuron fired[ROW_BLOCK];
                int n = 0;
                for (int64_t r = block; r < end; r++) {
                    const float gate = gates.matrix()[r * n_tokens + t];
                    fired[n] = {static_cast<int32_t>(r), gate};
                    n += gate != 0.0f;
                }
                for (int k = 0; k < n; k += AXPY_ROWS) {
                    a.add(fired + k, std::min(AXPY_ROWS, n - k), nullptr, 0, t);
                }
            }
        }
    }
}

// Bytes of one thread's partial sums and of its scratch.
size_t partial_size(const lzn_ffn & f, const crews & dealt) { return (dealt.room() + 2) * y_stride(f) * sizeof(float); }

}  // namespace

const char * lzn_ggml_version(void) { return LZN_GGML_VERSION; }
size_t lzn_sizeof_tensor(void) { return sizeof(ggml_tensor); }
size_t lzn_sizeof_ffn(void) { return sizeof(lzn_ffn); }

size_t lzn_predict_size(const lzn_ffn * ffn, int64_t n_tokens) {
    const size_t body = ffn->n_ff * (n_tokens == 1 ? sizeof(int32_t) : n_tokens);
    return CACHE_LINE + ffn->n_threads * (CACHE_LINE + aligned(std::min(n_tokens, SCORE_TILE) * predictor_x_size(*ffn))) + body;
}

size_t lzn_gate_size(const lzn_ffn * ffn, int64_t n_tokens) {
    const size_t head = ffn->n_threads * gate_result{nullptr, ffn->n_threads, n_tokens}.thread_size();
    return head + ffn->n_ff * (n_tokens == 1 ? sizeof(fired_neuron) : n_tokens * sizeof(float));
}

// Fewer threads than there is room for have more tokens each.
size_t lzn_down_size(const lzn_ffn * ffn, int64_t n_tokens) {
    size_t most = 0;
    for (int nth = 1; nth <= ffn->n_threads; nth++) {
        most = std::max(most, nth * partial_size(*ffn, crews(n_tokens, nth)));
    }
    return CACHE_LINE + most;
}

size_t lzn_arranged_size(const void * kernels, int64_t n) {
    const row_kernels * k = static_cast<const row_kernels *>(kernels);
    return k && k->arranged_size ? k->arranged_size(n) : 0;
}

// Every thread makes its own copy of the input: it is short, and a barrier costs more.
void lzn_ffn_predict(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor *z = dst->src[0], *rows = dst->src[1];
    const int64_t n_tokens = z->ne[1];
    const candidates out = candidates_of(f, dst, n_tokens);
    const size_t x_size = predictor_x_size(f);
    const auto prepare_tile = [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++) {
            prepare(f.predictor, f.rank, static_cast<const float *>(z->data) + t * f.rank, out.input(ith) + (t - t0) * x_size);
        }
    };
    choose(f, out, n_tokens, ith, nth, static_cast<const float *>(dst->src[2]->data), prepare_tile, [&](int64_t r, int n, int64_t, int64_t at, float * scores) {
        const char * row[DOT_ROWS];
        for (int k = 0; k < n; k++) {
            row[k] = row_of(rows, f.predictor, r + k);
        }
        dots(f.predictor, f.rank, n, row, nullptr, out.input(ith) + at * x_size, scores);
    });
}

void lzn_ffn_predict_sign(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1], n_bytes = f.n_embd / 8;
    const candidates out = candidates_of(f, dst, n_tokens);
    uint8_t * signs = reinterpret_cast<uint8_t *>(out.input(ith));
    const auto prepare_tile = [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++) {
            pack_signs(f.n_embd, static_cast<const float *>(x->data) + t * f.n_embd, signs + (t - t0) * n_bytes);
        }
    };
    const uint8_t * rows = static_cast<const uint8_t *>(dst->src[1]->data);
    const auto * kernels = static_cast<const lzn::row_kernels *>(f.predictor.kernels);
    choose(f, out, n_tokens, ith, nth, static_cast<const float *>(dst->src[2]->data), prepare_tile, [&](int64_t r, int n, int64_t, int64_t at, float * scores) {
        if (kernels) {
            const char * row[DOT_ROWS];
            for (int k = 0; k < n; k++) {
                row[k] = reinterpret_cast<const char *>(rows + (r + k) * n_bytes);
            }
            return kernels->dots(f.n_embd, n, row, nullptr, signs + at * n_bytes, scores);
        }
        for (int k = 0; k < n; k++) {
            scores[k] = -static_cast<float>(count_differing(n_bytes, rows + (r + k) * n_bytes, signs + at * n_bytes));
        }
    });
}

void lzn_ffn_choose(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * given = dst->src[0];
    const candidates out = candidates_of(f, dst, given->ne[1]);
    const auto nothing = [](int64_t, int64_t) {};
    choose(f, out, given->ne[1], ith, nth, static_cast<const float *>(dst->src[1]->data), nothing, [&](int64_t r, int n, int64_t t, int64_t, float * scores) {
        const float * from = reinterpret_cast<const float *>(static_cast<const char *>(given->data) + t * given->nb[1]) + r;
        std::copy(from, from + n, scores);
    });
}

void lzn_ffn_quantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1];
    for (int64_t t = split(n_tokens, ith, nth); t < split(n_tokens, ith + 1, nth); t++) {
        const float * from = reinterpret_cast<const float *>(static_cast<const char *>(x->data) + t * x->nb[1]);
        char * to = aligned_data(dst) + t * f.x_stride;
        prepare(f.gate, f.n_embd, from, to + f.gate.x_offset);
        if (f.gated && f.up.x_offset != f.gate.x_offset) {
            prepare(f.up, f.n_embd, from, to + f.up.x_offset);
        }
    }
}

void lzn_ffn_gate(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->src[0]->ne[1];
    const gate_rows gate{f, dst->src[1], f.gate_bias ? dst->src[2] : nullptr, aligned_data(dst->src[0])};
    const gate_result out{static_cast<char *>(dst->data), f.n_threads, n_tokens};
    candidates chosen{};
    if (f.predicted) {
        chosen = candidates_of(f, dst->src[f.gate_bias ? 3 : 2], n_tokens);
    }
    if (n_tokens > 1) {
        gate_tokens(gate, f.predicted ? &chosen : nullptr, out, n_tokens, ith, nth);
    } else if (f.predicted) {
        gate_candidates(gate, chosen, out, ith, nth);
    } else {
        gate_every(gate, out, ith, nth);
    }
}

void lzn_ffn_down(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->src[0]->ne[1];
    const crews dealt(n_tokens, nth);
    const int crew = dealt.of_thread(ith), first_thread = dealt.first_thread(crew);
    const int64_t first = dealt.first_token(crew), last = dealt.first_token(crew + 1);
    float * sums = reinterpret_cast<float *>(aligned_data(dst) + ith * partial_size(f, dealt));
    float * scratch = sums + (last - first) * y_stride(f);
    const gate_result gates{static_cast<char *>(dst->src[1]->data), f.n_threads, n_tokens};
    const accumulator a{f, dst->src[2], f.gated ? dst->src[3] : nullptr, f.gated && f.up_bias ? dst->src[4] : nullptr, aligned_data(dst->src[0]), sums, first, last, scratch};
    std::memset(sums, 0, (scratch - sums) * sizeof(float));
    if (n_tokens == 1) {
        down_one_token(a, gates, ith, nth);
    } else {
        down_tokens(a, gates, n_tokens, ith - first_thread, dealt.first_thread(crew + 1) - first_thread);
    }
    a.finish();
}

void lzn_ffn_reduce(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->ne[1], first = split(f.n_embd, ith, nth), last = split(f.n_embd, ith + 1, nth);
    const crews dealt(n_tokens, nth);
    const char * partial = aligned_data(dst->src[0]);
    for (int crew = 0; crew < dealt.n; crew++) {
        for (int64_t t = dealt.first_token(crew); t < dealt.first_token(crew + 1); t++) {
            float * y = static_cast<float *>(dst->data) + t * dst->ne[0];
            std::memset(y + first, 0, (last - first) * sizeof(float));
            float squares = 0.0f;
            for (int i = dealt.first_thread(crew); i < dealt.first_thread(crew + 1); i++) {
                const float * sums = reinterpret_cast<const float *>(partial + i * partial_size(f, dealt)) + (t - dealt.first_token(crew)) * y_stride(f);
                add(last - first, sums + first, y + first);
                squares += f.squares ? sums[y_size(f.n_embd)] : 0.0f;
            }
            if (f.squares && ith == 0) {
                y[f.n_embd] = squares;
            }
        }
    }
    const gate_result gates{static_cast<char *>(dst->src[1]->data), f.n_threads, n_tokens};
    for (int64_t t = split(n_tokens, ith, nth); t < split(n_tokens, ith + 1, nth); t++) {
        count total{0, 0};
        for (int i = 0; i < nth; i++) {
            total.fired += gates.counts(i)[t].fired;
            total.gates += gates.counts(i)[t].gates;
        }
        f.counts[t] = total.fired;
        f.counts[n_tokens + t] = total.gates;
    }
}
