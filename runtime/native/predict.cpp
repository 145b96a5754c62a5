// Operators that choose the neurons that may fire: by a predictor, by signs, or by scores that are given.
#include "ffn.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

using namespace lzn;

namespace {

// Scores a few rows at a time and keeps those that are high enough. Prepare is (first token, last token) of a tile;
// Scores is (first row, how many, token, token within the tile, out).
template <typename Prepare, typename Scores> class chooser {
  public:
    chooser(const lzn_ffn & f, ggml_tensor * dst, int64_t n_tokens, const ggml_tensor * bias, sources & from,
            Prepare prepare_tile, Scores scores)
        : f_(f), out_(f, dst, n_tokens), n_tokens_(n_tokens), bias_(bias),
          ranges_(f, from.next_if(f.n_ranges > 0), nullptr), prepare_(prepare_tile), scores_(scores) {}

    void run(int ith, int nth) const {
        if (n_tokens_ == 1) {
            one_token(ith, nth);
        } else {
            several(ith, nth);
        }
    }

  private:
    // All threads share the token's rows evenly.
    void one_token(int ith, int nth) const {
        const few_ranges rows(ranges_, 1);
        prepare_(0, 1);
        const int64_t from = rows.start(f_.n_ff, ith, nth), to = rows.start(f_.n_ff, ith + 1, nth);
        const int64_t start = rows.of[0].before(from);
        int32_t * list = out_.list() + start;
        int64_t n = 0;
        for (int64_t first = from; first < to;) {
            const few_ranges::company who = rows.at(first, to);
            for (int64_t r = first; who.n && r < who.end; r += DOT_ROWS) {
                bool chosen[DOT_ROWS];
                const int n_rows = choose(r, who.end, 0, 0, chosen);
                for (int k = 0; k < n_rows; k++) {
                    list[n] = static_cast<int32_t>(r + k);  // overwritten by the next one if not chosen
                    n += chosen[k];
                }
            }
            first = who.end;
        }
        out_.of(ith) = {n, start};
    }

    // Each thread has some blocks of rows, and every token's ranges in them.
    void several(int ith, int nth) const {
        const int64_t n_blocks = candidates::blocks(f_.n_ff);
        for (int64_t t0 = 0; t0 < n_tokens_; t0 += MASK_TOKENS) {
            const int64_t t1 = std::min(t0 + MASK_TOKENS, n_tokens_);
            prepare_(t0, t1);
            token_rows ranges[MASK_TOKENS];
            for (int64_t t = t0; t < t1; t++) {
                ranges_.of(t, ranges[t - t0]);
            }
            for (int64_t b = split(n_blocks, ith, nth); b < split(n_blocks, ith + 1, nth); b++) {
                const int64_t first = b * ROW_BLOCK, last = std::min<int64_t>(first + ROW_BLOCK, f_.n_ff);
                const int32_t wanted = block(ranges, first, last, t0, t1);
                if (t0 == 0) {
                    out_.wanted_of_blocks()[b] = wanted;
                }
            }
        }
    }

    // The masks of rows first to last - 1 for a tile of tokens; returns how many bits are set.
    int32_t block(const token_rows * ranges, int64_t first, int64_t last, int64_t t0, int64_t t1) const {
        uint64_t * masks = out_.masks(t0);
        std::fill(masks + first, masks + last, 0);
        int32_t wanted = 0;
        for (int64_t t = t0; t < t1; t++) {  // given scores of a token lie together
            for (int64_t r = first; r < last; r += DOT_ROWS) {
                wanted += in_rows(ranges[t - t0], r, std::min<int64_t>(r + DOT_ROWS, last), t, t - t0, masks);
            }
        }
        return wanted;
    }

    // at: of token t, within the tile
    int32_t in_rows(const token_rows & rows, int64_t first, int64_t end, int64_t t, int64_t at,
                    uint64_t * masks) const {
        int32_t wanted = 0;
        for (int i = 0; i < rows.n; i++) {
            const int64_t r = std::max<int64_t>(first, rows.of[i].first), to = std::min<int64_t>(end, rows.of[i].end);
            bool chosen[DOT_ROWS];
            const int n_rows = r < to ? choose(r, to, t, at, chosen) : 0;
            for (int k = 0; k < n_rows; k++) {
                masks[r + k] |= static_cast<uint64_t>(chosen[k]) << at;
                wanted += chosen[k];
            }
        }
        return wanted;
    }

    // Up to DOT_ROWS rows from r on; returns how many.
    int choose(int64_t r, int64_t end, int64_t t, int64_t at, bool * chosen) const {
        const int n_rows = static_cast<int>(std::min<int64_t>(DOT_ROWS, end - r));
        float score[DOT_ROWS];
        scores_(r, n_rows, t, at, score);
        for (int k = 0; k < n_rows; k++) {
            chosen[k] = score[k] + bias_of(bias_, r + k) + f_.shift > 0.0f;
        }
        return n_rows;
    }

    const lzn_ffn & f_;
    const candidates out_;
    const int64_t n_tokens_;
    const ggml_tensor * bias_;
    const token_ranges ranges_;
    const Prepare prepare_;
    const Scores scores_;
};

// The signs of eight numbers, the first one's in the lowest bit; 1 is negative, and zero is not, whatever its sign.
uint8_t eight_signs(const float * x) {
#if defined(__SSE2__)
    const __m128 zero = _mm_setzero_ps();
    const int low = _mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(x), zero));
    const int high = _mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(x + 4), zero));
    return static_cast<uint8_t>(low | high << 4);
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

}  // namespace

size_t lzn_predict_size(const lzn_ffn * ffn, int64_t n_tokens) {
    const size_t body = candidates::body_size(ffn->n_ff, n_tokens);
    return CACHE_LINE + ffn->n_threads * (CACHE_LINE + candidates::thread_input(*ffn, n_tokens)) + body;
}

// Every thread makes its own copy of the input: it is short, and a barrier costs more.
void lzn_ffn_predict(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    sources from(dst);
    const ggml_tensor *z = from.next(), *rows = from.next(), *bias = from.next();
    char * input = candidates(f, dst, z->ne[1]).input(ith);
    const size_t x_size = predictor_x_size(f);
    const auto prepare_tile = [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++) {
            prepare(f.predictor, f.rank, static_cast<const float *>(z->data) + t * f.rank, input + (t - t0) * x_size);
        }
    };
    const auto scores = [&](int64_t r, int n, int64_t, int64_t at, float * out) {
        const char * row[DOT_ROWS];
        for (int k = 0; k < n; k++) {
            row[k] = row_of(rows, f.predictor, r + k);
        }
        dots(f.predictor, f.rank, n, row, nullptr, input + at * x_size, out);
    };
    chooser(f, dst, z->ne[1], bias, from, prepare_tile, scores).run(ith, nth);
}

void lzn_ffn_predict_sign(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    sources from(dst);
    const ggml_tensor *x = from.next(), *matrix = from.next(), *bias = from.next();
    const int64_t n_bytes = f.n_embd / 8;
    uint8_t * signs = reinterpret_cast<uint8_t *>(candidates(f, dst, x->ne[1]).input(ith));
    const auto prepare_tile = [&](int64_t t0, int64_t t1) {
        for (int64_t t = t0; t < t1; t++) {
            pack_signs(f.n_embd, static_cast<const float *>(x->data) + t * f.n_embd, signs + (t - t0) * n_bytes);
        }
    };
    const uint8_t * rows = static_cast<const uint8_t *>(matrix->data);
    const row_kernels * kernels = kernels_of(f.predictor);
    const auto scores = [&](int64_t r, int n, int64_t, int64_t at, float * out) {
        const uint8_t * x_signs = signs + at * n_bytes;
        if (kernels) {
            const char * row[DOT_ROWS];
            for (int k = 0; k < n; k++) {
                row[k] = reinterpret_cast<const char *>(rows + (r + k) * n_bytes);
            }
            return kernels->dots(f.n_embd, n, row, nullptr, x_signs, out);
        }
        for (int k = 0; k < n; k++) {
            out[k] = -static_cast<float>(count_differing(n_bytes, rows + (r + k) * n_bytes, x_signs));
        }
    };
    chooser(f, dst, x->ne[1], bias, from, prepare_tile, scores).run(ith, nth);
}

void lzn_ffn_choose(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_ffn & f = *static_cast<const lzn_ffn *>(userdata);
    sources from(dst);
    const ggml_tensor *given = from.next(), *bias = from.next();
    const auto nothing = [](int64_t, int64_t) {};
    const auto scores = [&](int64_t r, int n, int64_t t, int64_t, float * out) {
        const char * token = static_cast<const char *>(given->data) + t * given->nb[1];
        std::memcpy(out, token + r * sizeof(float), n * sizeof(float));
    };
    chooser(f, dst, given->ne[1], bias, from, nothing, scores).run(ith, nth);
}
