"""The product of a whole matrix with many tokens, tile by tile: against float64 numpy on its own dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_harness import Array, as_rounded, quantize, relative_error, run_product
from test_kernels import TOLERANCE

from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import add_tiled, add_tiled_product

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

TYPES = ("q4_0", "q8_0")
# What there are tiles for.
THERE = {("avx2", "q4_0"), ("avxvnni", "q4_0"), ("avx512", "q4_0"), ("avx512", "q8_0")}
THERE |= {(variant, type_name) for variant in ("neon", "i8mm") for type_name in TYPES}


def there(type_name: str) -> bool:
    """Whether this variant has tiles for the type, which is as it should be."""
    found = sparse_ffn.tiles(ggml.TYPES[type_name], 64, 8) is not None
    assert found == ((sparse_ffn.VARIANTS[sparse_ffn.variant()], type_name) in THERE)
    return found


def multiplied(packed: Array, type_name: str, x: Array, threads: int) -> Array:
    """float32 [n_tokens, n_out]."""
    matrix = sparse_ffn.tiles(ggml.TYPES[type_name], x.shape[1], len(packed))
    assert matrix
    return on_worker(lambda: _multiplied(packed, ggml.TYPES[type_name], np.float32(x), threads, matrix))


def _multiplied(packed: Array, type_id: int, x: Array, threads: int, matrix: sparse_ffn.Tiles) -> Array:
    def add(ctx: ggml.ContextP, given: ggml.TensorP, weights: ggml.TensorP) -> ggml.TensorP:
        return add_tiled_product(ctx, add_tiled(ctx, given, matrix), weights, matrix, len(x))

    return run_product(packed, type_id, x, threads, add)


def case(type_name: str, n_in: int, n_out: int, n_tokens: int) -> tuple[Array, Array, Array]:
    """Packed weights, x and the product, float64."""
    rng = np.random.default_rng(n_in + n_out + n_tokens)
    packed, exact = quantize(rng.normal(0, 0.5, (n_out, n_in)), type_name)
    x = rng.normal(0, 1, (n_tokens, n_in)) * rng.lognormal(0, 2, n_in)
    return packed, x, as_rounded(x, type_name) @ exact.T


@pytest.mark.parametrize(
    ("n_in", "n_out", "n_tokens"),
    [(32, 1, 1), (96, 7, 15), (256, 16, 16), (512, 203, 37), (2048, 40, 257), (2080, 33, 70), (6144, 17, 32)],
)
@pytest.mark.parametrize("type_name", TYPES)
def test_products(type_name: str, n_in: int, n_out: int, n_tokens: int) -> None:
    """Parts of a tile in every direction, several packs of columns, more tokens than are taken together."""
    if not there(type_name):
        return
    packed, x, expected = case(type_name, n_in, n_out, n_tokens)
    for threads in (1, 3):
        assert relative_error(multiplied(packed, type_name, x, threads), expected) <= TOLERANCE


@pytest.mark.parametrize("type_name", TYPES)
def test_largest_numbers(type_name: str) -> None:
    """Sums in few bits hold the largest weights times the largest x, of either sign."""
    if not there(type_name):
        return
    packed, exact = quantize(np.where(np.arange(16 * 64).reshape(16, 64) % 3, -8.0, 7.0), type_name)
    x = np.where(np.arange(18 * 64).reshape(18, 64) % 5, 127.0, -127.0)
    x[3] = 0
    assert relative_error(multiplied(packed, type_name, x, 2), x @ exact.T) <= TOLERANCE


@pytest.mark.parametrize("type_name", TYPES)
def test_each_token_has_the_same_bits_in_any_batch(type_name: str) -> None:
    if not there(type_name):
        return
    packed, x, _ = case(type_name, 2112, 50, 300)
    whole = multiplied(packed, type_name, x, 2)
    for first, n_tokens, threads in ((0, 1, 1), (7, 16, 1), (3, 41, 3), (20, 280, 1)):
        part = multiplied(packed, type_name, x[first : first + n_tokens], threads)
        assert np.array_equal(part, whole[first : first + n_tokens])


def test_what_there_is_none_for() -> None:
    assert sparse_ffn.tiles(ggml.TYPES["q4_0"], 48, 8) is None
    assert sparse_ffn.tiles(ggml.TYPES["f16"], 64, 8) is None
    assert sparse_ffn.tiles(ggml.TYPES["q4_K"], 256, 8) is None
