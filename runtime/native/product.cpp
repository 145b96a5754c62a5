// Products of whole matrices with few tokens: W x, row by row as the file has them.
#include "rows.h"

using namespace lzn;

namespace {

constexpr int64_t TILE = LZN_FEW_TOKENS;  // tokens whose x stays in L2 while the rows pass

int64_t tile(int64_t n_tokens) { return std::min(TILE, n_tokens); }

size_t x_size(const lzn_product & p) { return aligned(p.rows.arranged_size + p.rows.x_size); }

}  // namespace

size_t lzn_product_size(const lzn_product * product, int64_t n_tokens) {
    const size_t result = product->n_out * n_tokens * sizeof(float);
    return aligned(result) + CACHE_LINE + product->n_threads * tile(n_tokens) * x_size(*product);
}

// Every thread makes its own copy of x: it is short, and a barrier costs more.
void lzn_multiply(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const lzn_product & p = *static_cast<const lzn_product *>(userdata);
    const ggml_tensor *x = dst->src[0], *weights = dst->src[1];
    const int64_t n_tokens = x->ne[1], first = split(p.n_out, ith, nth), last = split(p.n_out, ith + 1, nth);
    float * result = static_cast<float *>(dst->data);
    char * own = aligned(result + p.n_out * n_tokens) + ith * tile(n_tokens) * x_size(p);
    for (int64_t t0 = 0; t0 < n_tokens; t0 += TILE) {
        const int n = static_cast<int>(std::min(TILE, n_tokens - t0));
        const char * xs[TILE];
        for (int t = 0; t < n; t++) {
            char * to = own + t * x_size(p);
            const char * from = static_cast<const char *>(x->data) + (t0 + t) * x->nb[1];
            prepare(p.rows, p.n_in, reinterpret_cast<const float *>(from), to);
            xs[t] = to;
        }
        for (int64_t block = first; block < last; block += ROW_BLOCK) {
            for (int t = 0; t < n; t += DOT_TOKENS) {
                const int some = std::min(DOT_TOKENS, n - t);
                const int64_t end = std::min(block + ROW_BLOCK, last);
                for (int64_t r = block; r < end;) {
                    const int n_rows = static_cast<int>(std::min<int64_t>(rows_together(some), end - r));
                    const bool fetch = t == 0 && r + ROWS_AHEAD + n_rows <= last;
                    const char *rows[DOT_ROWS], *next[DOT_ROWS];
                    consecutive(weights, p.rows, r, n_rows, rows);
                    if (fetch) {
                        consecutive(weights, p.rows, r + ROWS_AHEAD, n_rows, next);
                    }
                    float out[DOT_ROWS * DOT_TOKENS];
                    dots_tokens(p.rows, p.n_in, n_rows, rows, fetch ? next : nullptr, some, xs + t, out);
                    for (int k = 0; k < n_rows; k++) {
                        for (int i = 0; i < some; i++) {
                            result[(t0 + t + i) * p.n_out + r + k] = out[k * some + i];
                        }
                    }
                    r += n_rows;
                }
            }
        }
    }
}
