"""The product of a whole matrix with few tokens, through our row kernels: against float64 numpy on its own dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
from ffn_harness import Array, as_rounded, quantize, relative_error, run_product
from test_kernels import TOLERANCE, TYPES, dot_bound

from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import add_product

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

N_IN, N_OUT = 512, 203


def multiplied(packed: Array, type_name: str, x: Array, threads: int, room: int | None = None) -> Array:
    """float32 [n_tokens, n_out]."""
    return on_worker(lambda: _multiplied(packed, ggml.TYPES[type_name], np.float32(x), threads, room or threads))


def _multiplied(packed: Array, type_id: int, x: Array, threads: int, room: int) -> Array:
    product = sparse_ffn.multiplier(type_id, x.shape[1], len(packed), room)
    return run_product(packed, type_id, x, threads, lambda ctx, given, w: add_product(ctx, given, w, product))


def weights_of(type_name: str, n_in: int = N_IN, n_out: int = N_OUT) -> tuple[Array, Array]:
    return quantize(np.random.default_rng(1).normal(0, 0.5, (n_out, n_in)), type_name)


@pytest.mark.parametrize("n_tokens", [1, 3, 16, 37])
@pytest.mark.parametrize("type_name", TYPES)
def test_products(type_name: str, n_tokens: int) -> None:
    packed, exact = weights_of(type_name)
    x = np.random.default_rng(2).normal(0, 1, (n_tokens, N_IN))
    expected = as_rounded(x, type_name) @ exact.T
    assert relative_error(multiplied(packed, type_name, x, 2), expected) <= dot_bound(type_name)


@pytest.mark.parametrize("shape", [(32, 1), (64, 2), (50, 7), (4096, 65)])
def test_shapes_and_threads(shape: tuple[int, int]) -> None:
    """Fewer rows than threads; rows that our loops do not take; fewer threads than there is room for."""
    packed, exact = weights_of("f16", *shape)
    x = np.random.default_rng(3).normal(0, 1, (5, shape[0]))
    expected = as_rounded(x, "f16") @ exact.T
    for threads, room in ((1, 1), (3, 3), (2, 5)):
        assert relative_error(multiplied(packed, "f16", x, threads, room), expected) <= TOLERANCE


@pytest.mark.parametrize("type_name", TYPES)
def test_each_token_has_the_same_bits_as_alone(type_name: str) -> None:
    packed, _ = weights_of(type_name)
    x = np.random.default_rng(4).normal(0, 1, (37, N_IN))
    alone = [multiplied(packed, type_name, x[t : t + 1], 1)[0] for t in range(len(x))]
    for n_tokens, threads in ((2, 1), (4, 2), (7, 3), (16, 2), (37, 3)):
        assert np.array_equal(multiplied(packed, type_name, x[:n_tokens], threads), alone[:n_tokens])
