// The operator that lets rows be read before others compute with them.
#include <cerrno>
#include <new>

#include "pager.h"
#include "results.h"
#include "ranges.h"

using namespace lzn;

namespace {

// Asks for rows of all matrices of a fetch.
class asking {
  public:
    asking(pager & from, const lzn_fetch & what) : from_(from), what_(what) {}

    void row(int64_t r) const {
        for (int m = 0; m < what_.n_matrices; m++) {
            from_.want(static_cast<const char *>(what_.first[m]) + r * what_.stride[m], what_.size[m]);
        }
    }

    // Rows first to end - 1.
    void rows(int64_t first, int64_t end) const {
        for (int m = 0; m < what_.n_matrices; m++) {
            const char * at = static_cast<const char *>(what_.first[m]) + first * what_.stride[m];
            if (what_.stride[m] == what_.size[m]) {
                from_.want(at, (end - first) * what_.size[m]);
                continue;
            }
            for (int64_t r = first; r < end; r++, at += what_.stride[m]) {
                from_.want(at, what_.size[m]);
            }
        }
    }

  private:
    pager & from_;
    const lzn_fetch & what_;
};

void ask_all(const asking & asked, const lzn_ffn & f, const ggml_tensor * chosen, int64_t n_tokens) {
    if (!f.n_ranges) {
        return asked.rows(0, f.n_ff);
    }
    const token_ranges ranges(f, chosen, nullptr);
    for (int64_t t = 0; t < n_tokens; t++) {
        token_rows rows;
        ranges.of(t, rows);
        for (int i = 0; i < rows.n; i++) {
            asked.rows(rows.of[i].first, rows.of[i].end);
        }
    }
}

void ask_candidates(const asking & asked, const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens, int nth) {
    const candidates chosen(f, result, n_tokens);
    if (n_tokens == 1) {
        for (int i = 0; i < nth; i++) {
            const part & found = chosen.of(i);
            for (int64_t k = 0; k < found.n; k++) {
                asked.row(chosen.list()[found.start + k]);
            }
        }
        return;
    }
    for (int64_t r = 0; r < f.n_ff; r++) {
        bool wanted = false;
        for (int64_t t = 0; t < n_tokens && !wanted; t += MASK_TOKENS) {
            wanted = chosen.masks(t)[r] != 0;
        }
        if (wanted) {
            asked.row(r);
        }
    }
}

void ask_fired(const asking & asked, const lzn_ffn & f, const ggml_tensor * result, int64_t n_tokens, int nth) {
    const gate_result gates{static_cast<char *>(result->data), f, n_tokens};
    for (int64_t t = 0; t < n_tokens; t++) {
        const gate_result::token token = gates.of(t);
        for (int i = 0; i < nth; i++) {
            const part & found = token.of(i);
            for (int64_t k = 0; k < found.n; k++) {
                asked.row(token.list()[found.start + k].row);
            }
        }
    }
}

}  // namespace

void * lzn_pager_new(const char * const * paths, int32_t n_files, int32_t n_readers, int32_t * error) {
    try {
        pager * made = new pager(paths, n_files, n_readers);
        if (made->works()) {
            return made;
        }
        *error = made->take_error();
        delete made;
    } catch (const std::bad_alloc &) {
        *error = ENOMEM;
    }
    return nullptr;
}

void lzn_pager_free(void * it) { delete static_cast<pager *>(it); }

void * lzn_pager_address(const void * it, int32_t file) {
    const pager & from = *static_cast<const pager *>(it);
    return from.base() + from.first_page(file) * PAGE;
}

void lzn_pager_limit(void * it, int64_t pages) { static_cast<pager *>(it)->set_limit(pages); }
int32_t lzn_pager_error(void * it) { return static_cast<pager *>(it)->take_error(); }
void lzn_pager_stats_of(const void * it, lzn_pager_stats * stats) { *stats = static_cast<const pager *>(it)->stats(); }

void lzn_pager_load(void * it, const int64_t * ranges, int64_t n) {
    pager & from = *static_cast<pager *>(it);
    from.begin();
    for (int64_t i = 0; i < n; i++) {
        from.want(reinterpret_cast<const char *>(ranges[2 * i]), ranges[2 * i + 1]);
    }
    from.fetch(HOT);
    from.start_counting();
}

void lzn_fetch_rows(ggml_tensor *, const ggml_tensor * a, const ggml_tensor * b, int ith, int nth, void * userdata) {
    if (ith) {
        return;
    }
    const lzn_fetch & what = *static_cast<const lzn_fetch *>(userdata);
    pager & from = *static_cast<pager *>(what.pager);
    const asking asked(from, what);
    from.begin();
    switch (what.what) {
        case LZN_WHOLE: asked.rows(0, 1); break;
        case LZN_ALL: ask_all(asked, *what.ffn, b, b->ne[1]); break;
        case LZN_CANDIDATES: ask_candidates(asked, *what.ffn, a, b->ne[1], nth); break;
        default: ask_fired(asked, *what.ffn, a, b->ne[1], nth);
    }
    from.fetch(COLD + 1);
}
