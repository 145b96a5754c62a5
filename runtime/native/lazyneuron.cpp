// What the library says about itself.
#include "lazyneuron.h"

#include "kernels.h"

const char * lzn_ggml_version(void) { return LZN_GGML_VERSION; }
size_t lzn_sizeof_tensor(void) { return sizeof(ggml_tensor); }
size_t lzn_sizeof_ffn(void) { return sizeof(lzn_ffn); }
size_t lzn_sizeof_product(void) { return sizeof(lzn_product); }
size_t lzn_sizeof_tiles(void) { return sizeof(lzn_tiles); }
size_t lzn_sizeof_attention(void) { return sizeof(lzn_attention); }
size_t lzn_sizeof_fetch(void) { return sizeof(lzn_fetch); }
size_t lzn_sizeof_pager_stats(void) { return sizeof(lzn_pager_stats); }

size_t lzn_arranged_size(const void * kernels, int64_t n) {
    const lzn::row_kernels * k = static_cast<const lzn::row_kernels *>(kernels);
    return k && k->arranged_size ? k->arranged_size(n) : 0;
}
