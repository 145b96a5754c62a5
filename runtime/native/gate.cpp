// Operators that prepare the activations and decide, for one token, which neurons fire.
#include "ffn.h"

using namespace lzn;

namespace {

// Appends the neurons that fire to one thread's list.
struct firing_list {
    const gate_rows & gate;
    fired_neuron * list;
    int32_t n = 0, read = 0;

    // weights: (row) -> what the row's strength is multiplied by
    template <typename Weights> void look(const int32_t * neurons, int count, const int32_t * ahead, Weights weights) {
        float gates[DOT_ROWS];
        gate.of(neurons, count, ahead, 0, gates);
        for (int k = 0; k < count; k++) {
            // Overwritten by the next one if this does not fire: a branch here would be mispredicted.
            list[n] = {neurons[k], gate.strength(gates[k], weights(neurons[k]))};
            n += gate.fires(gates[k]);
        }
        read += count;
    }
};

// Every row of the token's ranges, one by one: one stream of bytes is what the hardware fetches best; it does not follow
// several at once.
void gate_every(const token_rows & rows, int ith, int nth, firing_list & found) {
    split_rows(rows, ith, nth, [&](int64_t first, int64_t end, float weight) {
        for (int64_t r = first; r < end; r++) {
            const int32_t neuron = static_cast<int32_t>(r);
            found.look(&neuron, 1, nullptr, [=](int32_t) { return weight; });
        }
    });
}

void gate_candidates(share<candidates> & mine, const token_rows & rows, firing_list & found) {
    int32_t now[DOT_ROWS], ahead[DOT_ROWS];
    int n = mine.take(now, DOT_ROWS);
    while (n > 0) {
        const int n_ahead = mine.take(ahead, DOT_ROWS);
        found.look(now, n, n_ahead == n ? ahead : nullptr, [&](int32_t row) { return rows.weight(row); });
        std::copy(ahead, ahead + n_ahead, now);
        n = n_ahead;
    }
}

}  // namespace

size_t lzn_gate_size(const lzn_ffn * ffn) { return ffn->n_threads * CACHE_LINE + ffn->n_ff * sizeof(fired_neuron); }

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
    const gate_result out{static_cast<char *>(dst->data), f.n_threads};
    token_rows rows;
    gate.ranges.of(0, rows);
    int64_t start = split(rows.size(), ith, nth);
    firing_list found{gate, out.list() + start};
    if (f.predicted) {
        const candidates chosen(f, gate.candidates, 1);
        start = split(total_of(chosen, nth), ith, nth);
        found.list = out.list() + start;
        share<candidates> mine(chosen, ith, nth);
        gate_candidates(mine, rows, found);
    } else {
        gate_every(rows, ith, nth, found);
    }
    out.head_of(ith) = {{found.n, start}, {found.n, found.read}};
}
