// Which rows each token scans: all, or some ranges of them. And how a batch's rows are dealt to threads.
#pragma once

#include "rows.h"

namespace lzn {

// Rows first to end - 1; what their neurons give is multiplied by `weight`.
struct row_range {
    int32_t first;
    int32_t end;
    float weight;
};

// The ranges of one token, by rising rows: so what a token lists does not depend on who else is in its batch. They do
// not overlap.
struct token_rows {
    row_range of[LZN_MAX_RANGES];
    int n = 0;

    int64_t size() const { return before(INT32_MAX); }

    // How many of its rows are before `row`.
    int64_t before(int64_t row) const {
        int64_t total = 0;
        for (int i = 0; i < n; i++) {
            total += std::clamp<int64_t>(row - of[i].first, 0, of[i].end - of[i].first);
        }
        return total;
    }

    // The range that `row` is in, or the last one.
    const row_range & around(int32_t row) const {
        int i = 0;
        while (i + 1 < n && !(of[i].first <= row && row < of[i].end)) {
            i++;
        }
        return of[i];
    }

    void add(const row_range & range) {
        int at = n++;
        for (; at > 0 && of[at - 1].first > range.first; at--) {
            of[at] = of[at - 1];
        }
        of[at] = range;
    }
};

// Which ranges each token of a batch scans: all rows, or those of the table that were chosen for it.
class token_ranges {
  public:
    token_ranges(const lzn_ffn & f, const ggml_tensor * chosen, const ggml_tensor * weights)
        : f_(f), chosen_(chosen), weights_(weights) {}

    // Never more rows than there are, and none outside of the matrix, whatever the sources hold.
    void of(int64_t t, token_rows & out) const {
        out.n = 0;
        if (!f_.n_ranges) {
            return out.add({0, f_.n_ff, 1.0f});
        }
        int64_t room = f_.n_ff;
        for (int64_t i = 0; i < std::min<int64_t>(chosen_->ne[0], LZN_MAX_RANGES); i++) {
            const int32_t id = at<int32_t>(chosen_, i, t);
            if (id < 0 || id >= f_.n_ranges) {
                continue;
            }
            const int32_t first = f_.ranges[2 * id], end = f_.ranges[2 * id + 1];
            if (0 <= first && first < end && end <= f_.n_ff && end - first <= room) {
                out.add({first, end, weights_ ? at<float>(weights_, i, t) : 1.0f});
                room -= end - first;
            }
        }
    }

    // Add up how many of the first tokens chose each range.
    void count(int64_t n_tokens) const {
        if (!f_.n_ranges || !f_.chosen) {
            return;
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            for (int64_t i = 0; i < std::min<int64_t>(chosen_->ne[0], LZN_MAX_RANGES); i++) {
                const int32_t id = at<int32_t>(chosen_, i, t);
                f_.chosen[id < 0 || id >= f_.n_ranges ? 0 : id] += 0 <= id && id < f_.n_ranges;
            }
        }
    }

  private:
    template <typename T> static T at(const ggml_tensor * m, int64_t i, int64_t t) {
        return *reinterpret_cast<const T *>(static_cast<const char *>(m->data) + i * m->nb[0] + t * m->nb[1]);
    }

    const lzn_ffn & f_;
    const ggml_tensor *chosen_, *weights_;
};

// The ranges of up to LZN_FEW_TOKENS tokens.
struct few_ranges {
    token_rows of[LZN_FEW_TOKENS];
    int64_t n_tokens;

    few_ranges(const token_ranges & ranges, int64_t n_tokens) : n_tokens(n_tokens) {
        for (int64_t t = 0; t < n_tokens; t++) {
            ranges.of(t, of[t]);
        }
    }

    // Products of rows before `row`, all tokens together.
    int64_t before(int64_t row) const {
        int64_t total = 0;
        for (int64_t t = 0; t < n_tokens; t++) {
            total += of[t].before(row);
        }
        return total;
    }

    // The row where the part of thread `ith` begins, so that all have as many products.
    int64_t start(int64_t n_rows, int ith, int nth) const {
        if (ith == nth) {
            return n_rows;
        }
        const int64_t wanted = split(before(n_rows), ith, nth);
        int64_t low = 0, high = n_rows;  // before(low) <= wanted
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (before(middle) <= wanted) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }

    // The tokens that scan `row`, and the row up to which the same ones do.
    struct company {
        int64_t tokens[LZN_FEW_TOKENS];
        float weights[LZN_FEW_TOKENS];
        int n = 0;
        int64_t end;
    };

    company at(int64_t row, int64_t last) const {
        company found;
        found.end = last;
        for (int64_t t = 0; t < n_tokens; t++) {
            int i = 0;
            while (i < of[t].n && of[t].of[i].end <= row) {
                i++;
            }
            if (i == of[t].n) {
                continue;
            }
            const row_range & range = of[t].of[i];
            const bool inside = range.first <= row;
            if (inside) {
                found.tokens[found.n] = t;
                found.weights[found.n++] = range.weight;
            }
            found.end = std::min<int64_t>(found.end, inside ? range.end : range.first);
        }
        return found;
    }
};

}  // namespace lzn
