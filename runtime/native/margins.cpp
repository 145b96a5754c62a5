// How far scores lie above thresholds, counted: what a fit of predictors judges its candidates by.
#include <algorithm>
#include <cstring>

#include "lazyneuron.h"

namespace {

constexpr int64_t TOGETHER = 64;  // neurons whose counts stay in L1 while the tokens pass

// The bin of each score: whole steps of `slope * score + offset`, 0 and bins - 1 for all beyond.
void bins_of(const lzn_margins & m, const float * scores, int64_t first, int64_t n, int32_t * bins) {
    const float last = static_cast<float>(m.n_bins - 1);
    for (int64_t j = 0; j < n; j++) {
        const float at = scores[first + j] * m.slope[first + j] + m.offset[first + j];
        bins[j] = static_cast<int32_t>(std::min(at > 0.0f ? at : 0.0f, last));  // NaN: 0
    }
}

void some_neurons(const lzn_margins & m, int64_t first, int64_t n) {
    for (int64_t t = 0; t < m.n_tokens; t++) {
        int32_t bins[TOGETHER];
        bins_of(m, m.scores + t * m.n_neurons, first, n, bins);
        const bool * fired = m.fired + t * m.n_neurons + first;
        const float * energy = m.energy + t * m.n_neurons + first;
        for (int64_t j = 0; j < n; j++) {
            const int64_t at = (first + j) * m.n_bins + bins[j];
            m.predicted[at]++;
            if (fired[j]) {
                m.hits[at]++;
                m.kept[at] += energy[j];
            }
        }
    }
}

}  // namespace

size_t lzn_sizeof_margins(void) { return sizeof(lzn_margins); }

void lzn_count_margins(const lzn_margins * m) {
    for (int64_t first = 0; first < m->n_neurons; first += TOGETHER) {
        some_neurons(*m, first, std::min(TOGETHER, m->n_neurons - first));
    }
}

void lzn_moments(const float * scores, const float * goal, int64_t n_tokens, int64_t n_neurons, double * sums) {
    std::memset(sums, 0, 5 * n_neurons * sizeof(double));
    double *of_scores = sums, *of_goal = sums + n_neurons, *scores_2 = sums + 2 * n_neurons;
    double *goal_2 = sums + 3 * n_neurons, *products = sums + 4 * n_neurons;
    for (int64_t first = 0; first < n_neurons; first += TOGETHER) {
        const int64_t end = std::min(first + TOGETHER, n_neurons);
        for (int64_t t = 0; t < n_tokens; t++) {
            for (int64_t j = first; j < end; j++) {
                const double s = scores[t * n_neurons + j], g = goal[t * n_neurons + j];
                of_scores[j] += s;
                of_goal[j] += g;
                scores_2[j] += s * s;
                goal_2[j] += g * g;
                products[j] += s * g;
            }
        }
    }
}
