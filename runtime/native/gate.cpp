// Operators that prepare the activations and decide, for up to LZN_FEW_TOKENS tokens, which neurons fire.
#include "ffn.h"

using namespace lzn;

namespace {

// Appends the neurons that fire to each token's list of one thread: first with their gates, in the end with their
// strengths. They rise by rows, as at any number of threads and tokens. A block of rows stays in L2 and the x of a few
// tokens in L1. One stream of rows is what the hardware follows, not several at once; told of rows ahead, it is faster.
class firing_lists {
  public:
    // start: (token) -> where the thread's part of its list begins
    template <typename Start>
    firing_lists(const gate_rows & gate, const few_ranges & ranges, const gate_result & out, int ith, Start start)
        : gate_(gate), ranges_(ranges), out_(out), ith_(ith) {
        for (int64_t t = 0; t < ranges.n_tokens; t++) {
            start_[t] = start(t);
            list_[t] = out.of(t).list() + start_[t];
            found_[t] = {0, 0};
        }
    }

    // Rows first to end - 1, every one, for some tokens.
    void every(int64_t first, int64_t end, const int64_t * tokens, int n_tokens) {
        for (int64_t block = first; block < end; block += ROW_BLOCK) {
            for (int k = 0; k < n_tokens; k += DOT_TOKENS) {
                const int64_t last = std::min(block + ROW_BLOCK, end);
                const int n = std::min(DOT_TOKENS, n_tokens - k);
                for (int64_t r = block; r < last;) {
                    const int n_rows = static_cast<int>(std::min<int64_t>(rows_together(n), last - r));
                    const int64_t ahead = k == 0 && r + ROWS_AHEAD + n_rows <= end ? r + ROWS_AHEAD : -1;
                    look(static_cast<int32_t>(r), n_rows, tokens + k, n, static_cast<int32_t>(ahead));
                    r += n_rows;
                }
            }
        }
    }

    // Those of rows first to end - 1 that tokens want, by their masks. A row is read once, for all who want it.
    void wanted(int64_t first, int64_t end, const uint64_t * masks) {
        const auto next = [=](int64_t r) {
            while (r < end && !masks[r]) {
                r++;
            }
            return r;
        };
        int64_t after = next(first);
        for (int64_t r = after; r < end; r = after) {
            after = next(r + 1);
            // Two rows ahead: one is not there in time. The other tokens of a row need not fetch it again.
            int64_t ahead = next(after + 1);
            for (uint64_t who = masks[r]; who; ahead = end) {
                int64_t tokens[DOT_TOKENS];
                int n = 0;
                for (; who && n < DOT_TOKENS; who &= who - 1) {
                    tokens[n++] = __builtin_ctzll(who);
                }
                look(static_cast<int32_t>(r), 1, tokens, n, ahead < end ? static_cast<int32_t>(ahead) : -1);
            }
        }
    }

    // The gates of up to DOT_ROWS candidates of the only token.
    void candidates_of_one(const int32_t * rows, int n, const int32_t * ahead) {
        float gates[DOT_ROWS];
        gate_.of(rows, n, ahead, 0, gates);
        for (int k = 0; k < n; k++) {
            append(0, rows[k], gates[k]);
        }
    }

    void finish() {
        for (int64_t t = 0; t < ranges_.n_tokens; t++) {
            for (int32_t k = 0; k < found_[t].fired; k++) {
                fired_neuron & neuron = list_[t][k];
                neuron.strength = gate_.strength(neuron.strength, ranges_.of[t].around(neuron.row).weight);
            }
            out_.of(t).head_of(ith_) = {{found_[t].fired, start_[t]}, found_[t]};
        }
    }

  private:
    // As `gate_rows::of_tokens`; as many rows from `ahead` on are fetched meanwhile if it is not -1.
    void look(int32_t row, int n_rows, const int64_t * tokens, int n, int32_t ahead) {
        const char * next[DOT_ROWS];
        if (ahead >= 0) {
            consecutive(gate_.weights, gate_.f.gate, ahead, n_rows, next);
        }
        float gates[DOT_ROWS * DOT_TOKENS];
        gate_.of_tokens(row, n_rows, tokens, n, ahead < 0 ? nullptr : next, gates);
        for (int k = 0; k < n_rows; k++) {
            for (int t = 0; t < n; t++) {
                append(tokens[t], row + k, gates[k * n + t]);
            }
        }
    }

    void append(int64_t token, int32_t row, float gate) {
        // Overwritten by the next one if this does not fire: a branch here would be mispredicted.
        list_[token][found_[token].fired] = {row, gate};
        found_[token].fired += gate_.fires(gate);
        found_[token].gates++;
    }

    const gate_rows & gate_;
    const few_ranges & ranges_;
    const gate_result & out_;
    const int ith_;
    int64_t start_[LZN_FEW_TOKENS];
    fired_neuron * list_[LZN_FEW_TOKENS];
    count found_[LZN_FEW_TOKENS];
};

void gate_every(const gate_rows & gate, const few_ranges & ranges, const gate_result & out, int ith, int nth) {
    const int64_t first = ranges.start(gate.f.n_ff, ith, nth), last = ranges.start(gate.f.n_ff, ith + 1, nth);
    firing_lists found(gate, ranges, out, ith, [&](int64_t t) { return ranges.of[t].before(first); });
    for (int64_t r = first; r < last;) {
        const few_ranges::company who = ranges.at(r, last);
        found.every(r, who.end, who.tokens, who.n);
        r = who.end;
    }
    found.finish();
}

void gate_candidates_of_one(const gate_rows & gate, const few_ranges & ranges, const gate_result & out, int ith,
                            int nth) {
    const candidates chosen(gate.f, gate.candidates, 1);
    share<candidates> mine(chosen, ith, nth);
    const int64_t start = split(total_of(chosen, nth), ith, nth);
    firing_lists found(gate, ranges, out, ith, [=](int64_t) { return start; });
    int32_t now[DOT_ROWS], ahead[DOT_ROWS];
    int n = mine.take(now, DOT_ROWS);
    while (n > 0) {
        const int n_ahead = mine.take(ahead, DOT_ROWS);
        found.candidates_of_one(now, n, n_ahead == n ? ahead : nullptr);
        std::copy(ahead, ahead + n_ahead, now);
        n = n_ahead;
    }
    found.finish();
}

void gate_candidates(const gate_rows & gate, const few_ranges & ranges, const gate_result & out, int ith, int nth) {
    const candidates chosen(gate.f, gate.candidates, ranges.n_tokens);
    const int64_t first = chosen.start(ith, nth), last = chosen.start(ith + 1, nth);
    firing_lists found(gate, ranges, out, ith, [&](int64_t t) { return ranges.of[t].before(first); });
    found.wanted(first, last, chosen.masks(0));
    found.finish();
}

}  // namespace

size_t lzn_gate_size(const lzn_ffn * ffn, int64_t n_tokens) { return gate_result::size(*ffn, n_tokens); }

void lzn_ffn_quantize(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    const ggml_tensor * x = dst->src[0];
    const int64_t n_tokens = x->ne[1];
    for (int64_t t = split(n_tokens, ith, nth); t < split(n_tokens, ith + 1, nth); t++) {
        const float * from = reinterpret_cast<const float *>(static_cast<const char *>(x->data) + t * x->nb[1]);
        char * to = aligned(dst->data) + t * f.x_stride;
        prepare(f.gate, f.n_embd, from, to + f.gate.x_offset);
        if (f.gated && f.up.x_offset != f.gate.x_offset) {
            prepare(f.up, f.n_embd, from, to + f.up.x_offset);
        }
    }
}

void lzn_ffn_gate(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    sources from(dst);
    const ggml_tensor * x = from.next();
    const gate_rows gate(f, x, from);
    const few_ranges ranges(gate.ranges, x->ne[1]);
    const gate_result out{static_cast<char *>(dst->data), f, x->ne[1]};
    if (ith == 0) {
        gate.ranges.count(x->ne[1]);
    }
    if (!f.predicted) {
        gate_every(gate, ranges, out, ith, nth);
    } else if (ranges.n_tokens == 1) {
        gate_candidates_of_one(gate, ranges, out, ith, nth);
    } else {
        gate_candidates(gate, ranges, out, ith, nth);
    }
}
