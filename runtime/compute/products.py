"""How the CPU multiplies whole matrices in the modes that skip neurons: through our row kernels, or through ggml's
products.

Up to FEW_TOKENS tokens go through the row kernels, which give each token the same bits in any batch. What a token's
logits are then does not depend on how many are computed with it, and a batch can check what was decoded one by one.
"""

from __future__ import annotations

import math

from runtime.bindings import ggml, sparse_ffn
from runtime.compute.repack import gains

# Tokens from which on repacking a matrix for one batch pays, by variant of the row kernels; never, where these are as
# fast as ggml's repacked product (docs/log.md).
_REPACKED_FROM = {"avx2": math.inf, "avxvnni": math.inf, "avx512": 128}
_OTHERS_FROM = 32  # where a row is unpacked for every token


def by_rows(matrix: ggml.TensorP, n_tokens: int) -> bool:
    """Whether the row kernels multiply a matrix [n_in, n_out] with so many tokens."""
    if n_tokens <= sparse_ffn.FEW_TOKENS:
        return True
    # ggml's plain product of these formats is slower; in others it is faster.
    return gains(matrix.type) and sparse_ffn.unpacks_once(matrix.type, matrix.ne[0])


def repacked_from(matrix: ggml.TensorP) -> float:
    """The number of tokens at once for which a matrix [n_in, n_out] is repacked first; infinity: never."""
    if not gains(matrix.type):
        return math.inf
    if not sparse_ffn.unpacks_once(matrix.type, matrix.ne[0]):
        return _OTHERS_FROM
    return _REPACKED_FROM.get(sparse_ffn.VARIANTS[sparse_ffn.variant()], _OTHERS_FROM)
