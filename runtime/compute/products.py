"""How the CPU multiplies whole matrices in the modes that skip neurons.

Up to FEW_TOKENS tokens go through the row kernels, which give each token the same bits in any batch. What a token's
logits are then does not depend on how many are computed with it, and a batch can check what was decoded one by one.
More tokens go through tiles, where the kernels have them for a format, else through ggml's products.
"""

from __future__ import annotations

import math

from runtime.bindings import ggml, sparse_ffn
from runtime.compute.repack import gains

_ANY_LENGTH = 256  # of a row that all formats allow
_REPACKED_FROM = 32  # tokens from which on repacking a matrix for one batch pays, where there are no tiles


def by_rows(n_tokens: int) -> bool:
    """Whether the row kernels multiply so many tokens."""
    return n_tokens <= sparse_ffn.FEW_TOKENS


def tiles_of(matrix: ggml.TensorP) -> sparse_ffn.Tiles | None:
    """The tiles of a matrix [n_in, n_out]; None where there are none."""
    return sparse_ffn.tiles(matrix.type, matrix.ne[0], matrix.ne[1], matrix.nb[1])


def tiles_of_type(type_id: int) -> bool:
    """Whether there are tiles for a ggml type."""
    return sparse_ffn.tiles(type_id, _ANY_LENGTH, 1) is not None


def repacked_from(matrix: ggml.TensorP) -> float:
    """The number of tokens at once from which on a matrix [n_in, n_out] is repacked first; infinity: never."""
    return _REPACKED_FROM if gains(matrix.type) and tiles_of(matrix) is None else math.inf


def repacked_for_a_batch(type_id: int) -> bool:
    """Whether matrices of a ggml type are repacked for every batch that is multiplied with all of them."""
    return gains(type_id) and not tiles_of_type(type_id)
