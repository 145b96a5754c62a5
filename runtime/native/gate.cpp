// Operators that prepare the activations and decide, for one token, which neurons fire.
#include "ffn.h"

using namespace lzn;

namespace {

// Appends the neurons that fire to one thread's list: first with their gates, in the end with their strengths.
struct firing_list {
    const gate_rows & gate;
    fired_neuron * list;
    int32_t n = 0;

    void look(const int32_t * neurons, int count, const int32_t * ahead) {
        float gates[DOT_ROWS];
        gate.of(neurons, count, ahead, 0, gates);
        for (int k = 0; k < count; k++) {
            // Overwritten by the next one if this does not fire: a branch here would be mispredicted.
            list[n] = {neurons[k], gates[k]};
            n += gate.fires(gates[k]);
        }
    }

    // weights: (row) -> what the row's strength is multiplied by
    template <typename Weights> void weigh(Weights weights) {
        for (int32_t k = 0; k < n; k++) {
            list[k].strength = gate.strength(list[k].strength, weights(list[k].row));
        }
    }
};

// Every row of a range, one by one: one stream of bytes is what the hardware fetches best; it does not follow several
// at once. Returns how many fire.
int32_t gate_range(const gate_rows & gate, int64_t first, int64_t end, float weight, fired_neuron * list) {
    firing_list found{gate, list};
    for (int64_t r = first; r < end; r++) {
        const int32_t neuron = static_cast<int32_t>(r);
        found.look(&neuron, 1, nullptr);
    }
    found.weigh([=](int32_t) { return weight; });
    return found.n;
}

void gate_every(const gate_rows & gate, const token_rows & rows, const gate_result & out, int ith, int nth) {
    const int64_t start = split(rows.size(), ith, nth);
    count counted{0, 0};
    split_rows(rows, ith, nth, [&](int64_t first, int64_t end, float weight) {
        counted.fired += gate_range(gate, first, end, weight, out.list() + start + counted.fired);
        counted.gates += static_cast<int32_t>(end - first);
    });
    out.head_of(ith) = {{counted.fired, start}, counted};
}

void gate_candidates(const gate_rows & gate, const token_rows & rows, const gate_result & out, int ith, int nth) {
    const candidates chosen(gate.f, gate.candidates, 1);
    share<candidates> mine(chosen, ith, nth);
    const int64_t start = split(total_of(chosen, nth), ith, nth);
    firing_list found{gate, out.list() + start};
    int32_t now[DOT_ROWS], ahead[DOT_ROWS];
    int n = mine.take(now, DOT_ROWS);
    while (n > 0) {
        const int n_ahead = mine.take(ahead, DOT_ROWS);
        found.look(now, n, n_ahead == n ? ahead : nullptr);
        std::copy(ahead, ahead + n_ahead, now);
        n = n_ahead;
    }
    found.weigh([&](int32_t row) { return rows.weight(row); });
    out.head_of(ith) = {{found.n, start}, {found.n, static_cast<int32_t>(mine.size())}};
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
    if (f.predicted) {
        gate_candidates(gate, rows, out, ith, nth);
    } else {
        gate_every(gate, rows, out, ith, nth);
    }
}
