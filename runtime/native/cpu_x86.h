// What compilers' own questions about the CPU do not cover.
#pragma once

namespace lzn {

bool has_avx_vnni();

}  // namespace lzn
