// Operators that add up the neurons that fire: of few tokens, as `gate` listed them, or of many, with their gates.
#include <new>
#include <type_traits>

#include "ffn.h"

using namespace lzn;

namespace {

// How a batch is dealt to threads. A crew has a range of tokens of its own, and its threads divide the rows. Each of
// them has partial sums for those tokens only. There are as many crews as tiles of tokens, or as threads: then each
// thread has its own tokens. Either way the partial sums are bounded, whatever the number of threads and tokens.
struct crews {
    int64_t n_tokens;
    int nth;
    int n;

    crews(int64_t n_tokens, int nth)
        : n_tokens(n_tokens), nth(nth), n(static_cast<int>(std::min<int64_t>(nth, tiles(n_tokens)))) {}

    static int64_t tiles(int64_t n_tokens) { return (n_tokens + TOKEN_TILE - 1) / TOKEN_TILE; }
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

// Whether every thread has tokens of its own: then it puts its sums where they belong, tile by tile.
bool alone(const lzn_ffn & f, int64_t n_tokens) { return crews::tiles(n_tokens) >= f.n_threads; }

int64_t product_length(const lzn_ffn & f) { return f.n_embd + (f.squares ? 1 : 0); }

// What one thread still has to add up for a token: its share, AXPY_ROWS neurons at a time.
struct turn {
    share<gate_result::token> left;
    fired_neuron * now[AXPY_ROWS];
    int n;

    explicit turn(const gate_result::token & gates, int ith, int nth) : left(gates, ith, nth) { go_on(); }
    void go_on() { n = left.find(now, AXPY_ROWS); }
};

// Adds up every token's share by rising rows: so a row that several tokens want is still in the cache. What one token
// adds up, and in which order, is the same as alone.
class turns {
  public:
    turns(const gate_result & gates, int ith, int nth) : n_tokens_(gates.n_tokens) {
        for (int64_t t = 0; t < n_tokens_; t++) {
            new (of_ + t * sizeof(turn)) turn(gates.of(t), ith, nth);
        }
    }

    turn & of(int64_t t) { return *reinterpret_cast<turn *>(of_ + t * sizeof(turn)); }

    // The token whose next neuron comes first; -1 for none.
    int64_t next() {
        int64_t found = -1;
        for (int64_t t = 0; t < n_tokens_; t++) {
            if (of(t).n > 0 && (found < 0 || of(t).now[0]->row < of(found).now[0]->row)) {
                found = t;
            }
        }
        return found;
    }

  private:
    static_assert(std::is_trivially_destructible<turn>::value, "nothing destroys them");
    alignas(turn) char of_[LZN_FEW_TOKENS * sizeof(turn)];
    int64_t n_tokens_;
};

// The neurons that the thread has of each token, in turns: each(t, neurons, n, ahead, n_ahead), where `ahead` has the
// next turn's.
template <typename Each> void by_turns(const gate_result & gates, int ith, int nth, Each each) {
    turns all(gates, ith, nth);
    for (int64_t t = all.next(); t >= 0;) {
        turn & mine = all.of(t);
        fired_neuron * now[AXPY_ROWS];
        const int n = mine.n;
        std::copy(mine.now, mine.now + n, now);
        mine.go_on();
        const int64_t next = all.next();
        each(t, now, n, next < 0 ? nullptr : all.of(next).now, next < 0 ? 0 : all.of(next).n);
        t = next;
    }
}

// All up rows, then all down rows: rows that are fetched while others of their matrix are read come faster than those
// of two matrices in turn.
void down_few_tokens(const down_rows & rows, const gate_result & gates, const partial & out, int ith, int nth) {
    using neurons = fired_neuron * const *;
    if (rows.f.gated) {
        by_turns(gates, ith, nth, [&](int64_t t, neurons now, int n, neurons ahead, int n_ahead) {
            rows.strengthen(now, n, ahead, n_ahead, t);
        });
    }
    by_turns(gates, ith, nth, [&](int64_t t, neurons now, int n, neurons ahead, int n_ahead) {
        rows.add(now, n, ahead, n_ahead, out.sums + t * y_stride(rows.f), out.scratch);
    });
}

// The neurons that fire for each token of a tile, with all that their down rows are multiplied by. They are added up
// AXPY_ROWS at a time, in whatever blocks of rows they were found: so what a token adds up together, and in which order,
// depends on its own neurons alone.
class waiting {
  public:
    explicit waiting(int64_t n_tokens) { std::fill(n_, n_ + n_tokens, 0); }

    void push(int64_t at, const fired_neuron & neuron) { of_[at][n_[at]++] = neuron; }

    // Adds up what there is of the first n tokens, but what is less than AXPY_ROWS of a token only in the end.
    void add(const down_rows & rows, int64_t n, bool end, const partial & out) {
        for (int64_t t = 0; t < n; t++) {
            float * y = out.sums + t * y_stride(rows.f);
            fired_neuron * neurons[ROW_BLOCK + AXPY_ROWS];
            for (int k = 0; k < n_[t]; k++) {
                neurons[k] = of_[t] + k;
            }
            int k = 0;
            for (; n_[t] - k >= (end ? 1 : AXPY_ROWS); k += AXPY_ROWS) {
                rows.add(neurons + k, std::min(AXPY_ROWS, n_[t] - k), nullptr, 0, y, out.scratch);
            }
            n_[t] = std::max(0, n_[t] - k);
            std::copy(of_[t] + k, of_[t] + k + n_[t], of_[t]);
        }
    }

  private:
    fired_neuron of_[TOKEN_TILE][ROW_BLOCK + AXPY_ROWS];
    int n_[TOKEN_TILE];
};

// Many tokens. A block of rows against every token of a tile: its gates, then the neurons that fire. So the rows
// stay in the cache, and so do the sums. A row that no token of the tile wants is not read.
class tiles_of_tokens {
  public:
    tiles_of_tokens(const lzn_ffn & f, const ggml_tensor * dst)
        : f_(f), from_(dst), x_(from_.next()), gate_(f, x_, from_), rows_(f, x_, from_), n_tokens_(x_->ne[1]),
          chosen_(f, f.predicted ? gate_.candidates : x_, n_tokens_) {}

    int64_t n_tokens() const { return n_tokens_; }
    void count_choices() const { gate_.ranges.count(n_tokens_); }
    void finish(const partial & out, int64_t n) const { rows_.finish(out.sums, n); }

    // Tokens t0 to t1 - 1, at most TOKEN_TILE, of which `out` has the sums. ith, nth: of the crew
    void add(int64_t t0, int64_t t1, const partial & out, int ith, int nth) const {
        token_rows ranges[TOKEN_TILE];
        for (int64_t t = t0; t < t1; t++) {
            gate_.ranges.of(t, ranges[t - t0]);
        }
        waiting found(t1 - t0);
        for (int64_t block = ith * ROW_BLOCK; block < f_.n_ff; block += nth * ROW_BLOCK) {
            uint32_t wanted[ROW_BLOCK] = {};
            for (int64_t t = t0; t < t1; t++) {
                out.counts[t - t0].gates += want(block, ranges[t - t0], t, 1u << (t - t0), wanted);
            }
            for (int64_t r = block; r < std::min<int64_t>(block + ROW_BLOCK, f_.n_ff); r++) {
                find(static_cast<int32_t>(r), wanted[r - block], t0, ranges, found, out.counts);
            }
            found.add(rows_, t1 - t0, false, out);
        }
        found.add(rows_, t1 - t0, true, out);
    }

  private:
    // Sets a token's bit for the rows of a block that it scans; returns how many.
    int32_t want(int64_t block, const token_rows & ranges, int64_t t, uint32_t bit, uint32_t * wanted) const {
        const uint64_t * masks = f_.predicted ? chosen_.masks(t) : nullptr;
        int32_t n = 0;
        for (int i = 0; i < ranges.n; i++) {
            const int64_t first = std::max<int64_t>(block, ranges.of[i].first);
            const int64_t end = std::min<int64_t>(block + ROW_BLOCK, ranges.of[i].end);
            for (int64_t r = first; r < end; r++) {
                const bool wants = !masks || (masks[r] >> t % MASK_TOKENS & 1);
                wanted[r - block] |= wants ? bit : 0;
                n += wants;
            }
        }
        return n;
    }

    // One row's neuron, for the tokens of a tile that want it, which begins with t0: their gates, and the up products of
    // those for which it fires. What is read next is fetched meanwhile: most of what a predictor names fires.
    void find(int32_t row, uint32_t wanted, int64_t t0, const token_rows * ranges, waiting & found,
              count * counts) const {
        int64_t fired[TOKEN_TILE];
        float strengths[TOKEN_TILE];
        int n_fired = 0;
        for (const char * next = f_.predicted ? rows_.after_gate(row) : nullptr; wanted; next = nullptr) {
            int64_t tokens[DOT_TOKENS];
            float gates[DOT_TOKENS];
            const int n = take(wanted, t0, tokens);
            gate_.of_tokens(row, 1, tokens, n, next ? &next : nullptr, gates);
            for (int k = 0; k < n; k++) {
                fired[n_fired] = tokens[k];  // overwritten by the next one if this does not fire
                strengths[n_fired] = gate_.strength(gates[k], ranges[tokens[k] - t0].around(row).weight);
                n_fired += gate_.fires(gates[k]);
            }
        }
        for (int k = 0; k < n_fired; k += DOT_TOKENS) {
            const char * next = k ? nullptr : rows_.after_up(row);
            rows_.strengthen(row, fired + k, std::min(DOT_TOKENS, n_fired - k), next, strengths + k);
        }
        for (int k = 0; k < n_fired; k++) {
            found.push(fired[k] - t0, {row, strengths[k]});
            counts[fired[k] - t0].fired++;
        }
    }

    // Takes the lowest DOT_TOKENS bits out of `wanted`, if there are as many; returns how many tokens they stand for.
    static int take(uint32_t & wanted, int64_t t0, int64_t * tokens) {
        int n = 0;
        for (; wanted && n < DOT_TOKENS; wanted &= wanted - 1) {
            tokens[n++] = t0 + __builtin_ctz(wanted);
        }
        return n;
    }

    const lzn_ffn & f_;
    sources from_;
    const ggml_tensor * x_;
    const gate_rows gate_;
    const down_rows rows_;
    const int64_t n_tokens_;
    const candidates chosen_;  // only where there is a predictor
};

// The tokens first to last - 1 in even tiles: each(first, last).
template <typename Each> void by_tiles(int64_t first, int64_t last, Each each) {
    const int64_t n = last - first, n_tiles = crews::tiles(n);
    for (int64_t tile = 0; tile < n_tiles; tile++) {
        each(first + n * tile / n_tiles, first + n * (tile + 1) / n_tiles);
    }
}

// A thread's own tokens, tile by tile, straight into the result.
void tokens_alone(const lzn_ffn & f, const tiles_of_tokens & tokens, ggml_tensor * dst, int ith, int nth) {
    const int64_t n_tokens = tokens.n_tokens(), length = product_length(f);
    float * result = static_cast<float *>(dst->data);
    const partial out(f, aligned(result + n_tokens * length) + ith * partial::size(f, TOKEN_TILE), TOKEN_TILE);
    by_tiles(split(n_tokens, ith, nth), split(n_tokens, ith + 1, nth), [&](int64_t t0, int64_t t1) {
        out.clear(f, t1 - t0);
        tokens.add(t0, t1, out, 0, 1);
        tokens.finish(out, t1 - t0);
        for (int64_t t = t0; t < t1; t++) {
            const float * sums = out.sums + (t - t0) * y_stride(f);
            std::copy(sums, sums + f.n_embd, result + t * length);
            if (f.squares) {
                result[t * length + f.n_embd] = sums[y_size(f.n_embd)];
            }
            f.counts[t] = out.counts[t - t0].fired;
            f.counts[n_tokens + t] = out.counts[t - t0].gates;
        }
    });
}

void tokens_together(const lzn_ffn & f, const tiles_of_tokens & tokens, ggml_tensor * dst, int ith, int nth) {
    const crews dealt(tokens.n_tokens(), nth);
    const int crew = dealt.of_thread(ith), first_thread = dealt.first_thread(crew);
    const int threads = dealt.first_thread(crew + 1) - first_thread;
    const int64_t first = dealt.first_token(crew), last = dealt.first_token(crew + 1), room = dealt.room();
    const partial out(f, aligned(dst->data) + ith * partial::size(f, room), room);
    out.clear(f, last - first);
    by_tiles(first, last, [&](int64_t t0, int64_t t1) {
        partial tile = out;
        tile.sums += (t0 - first) * y_stride(f);
        tile.counts += t0 - first;
        tokens.add(t0, t1, tile, ith - first_thread, threads);
    });
    tokens.finish(out, last - first);
}

}  // namespace

bool lzn_tokens_alone(const lzn_ffn * ffn, int64_t n_tokens) {
    return n_tokens > LZN_FEW_TOKENS && alone(*ffn, n_tokens);
}

// Fewer threads than there is room for have more tokens each.
size_t lzn_down_size(const lzn_ffn * ffn, int64_t n_tokens) {
    if (lzn_tokens_alone(ffn, n_tokens)) {
        const size_t result = n_tokens * product_length(*ffn) * sizeof(float);
        return aligned(result) + CACHE_LINE + ffn->n_threads * partial::size(*ffn, TOKEN_TILE);
    }
    size_t most = 0;
    for (int nth = 1; nth <= ffn->n_threads; nth++) {
        most = std::max(most, nth * partial::size(*ffn, crews(n_tokens, nth).room()));
    }
    return CACHE_LINE + most;
}

void lzn_ffn_down(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    sources from(dst);
    const ggml_tensor * x = from.next();
    const gate_result gates{static_cast<char *>(from.next()->data), f, x->ne[1]};
    const down_rows rows(f, x, from);
    const partial out(f, aligned(dst->data) + ith * partial::size(f, gates.n_tokens), gates.n_tokens);
    out.clear(f, gates.n_tokens);
    for (int64_t t = 0; t < gates.n_tokens; t++) {
        out.counts[t] = gates.of(t).head_of(ith).counted;
    }
    down_few_tokens(rows, gates, out, ith, nth);
    rows.finish(out.sums, gates.n_tokens);
}

void lzn_ffn_tokens(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const tiles_of_tokens tokens(f, dst);
    if (ith == 0) {
        tokens.count_choices();
    }
    if (alone(f, tokens.n_tokens())) {
        tokens_alone(f, tokens, dst, ith, nth);
    } else {
        tokens_together(f, tokens, dst, ith, nth);
    }
}

// Each thread adds up some columns of all tokens, and the counts of some tokens.
void lzn_ffn_reduce(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const int64_t n_tokens = dst->ne[1], first = split(f.n_embd, ith, nth), last = split(f.n_embd, ith + 1, nth);
    const crews dealt(n_tokens, nth);
    const int64_t room = dealt.room();
    char * partials = aligned(dst->src[0]->data);
    for (int crew = 0; crew < dealt.n; crew++) {
        for (int64_t t = dealt.first_token(crew); t < dealt.first_token(crew + 1); t++) {
            const int64_t at = t - dealt.first_token(crew);
            float * y = static_cast<float *>(dst->data) + t * dst->ne[0];
            std::memset(y + first, 0, (last - first) * sizeof(float));
            float squares = 0.0f;
            count total{0, 0};
            for (int i = dealt.first_thread(crew); i < dealt.first_thread(crew + 1); i++) {
                const partial from(f, partials + i * partial::size(f, room), room);
                const float * sums = from.sums + at * y_stride(f);
                for (int64_t c = first; c < last; c++) {
                    y[c] += sums[c];
                }
                squares += f.squares ? sums[y_size(f.n_embd)] : 0.0f;
                total.fired += from.counts[at].fired;
                total.gates += from.counts[at].gates;
            }
            if (ith == 0) {
                if (f.squares) {
                    y[f.n_embd] = squares;
                }
                f.counts[t] = total.fired;
                f.counts[n_tokens + t] = total.gates;
            }
        }
    }
}
