"""Our attention of few tokens: against float64 numpy, and the same bits in any company."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import pytest

from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import add_attention
from runtime.compute.weights import check_status, new_context

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

Array = npt.NDArray[np.generic]


def there() -> bool:
    return sparse_ffn.VARIANTS[sparse_ffn.variant()] in ("avx2", "avxvnni", "avx512")


def attended(q: Array, keys: Array, values: Array, mask: Array, threads: int) -> Array | None:
    """q [n_tokens, n_heads, d], keys and values [n_cells, n_heads_kv, d], mask [n_tokens, n_cells] -> [n_tokens,
    n_heads * d], None where there is no such kernel.
    """
    return on_worker(lambda: _attended(q, keys, values, mask, threads))


def _attended(q: Array, keys: Array, values: Array, mask: Array, threads: int) -> Array | None:
    (n_tokens, n_heads, d), (n_cells, n_kv, _) = q.shape, keys.shape
    shape = sparse_ffn.attention((d, n_heads, n_kv), 1 / np.sqrt(d), threads)
    if shape is None:
        return None
    given = [q.astype(np.float32), keys.astype(np.float16), values.astype(np.float16), mask.astype(np.float16)]
    ctx = new_context(16, ggml.ggml_graph_overhead_custom(16, False))
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    tensors = [
        ggml.ggml_new_tensor_2d(ctx, ggml.F32, d, n_heads * n_tokens),
        *(ggml.ggml_new_tensor_2d(ctx, ggml.F16, n_kv * d, n_cells) for _ in range(2)),
        ggml.ggml_new_tensor_2d(ctx, ggml.F16, n_cells, n_tokens),
    ]
    views = [ggml.ggml_view_3d(ctx, t, d, n_cells, n_kv, 2 * n_kv * d, 2 * d, 0) for t in tensors[1:3]]
    graph = ggml.ggml_new_graph_custom(ctx, 16, False)
    made = add_attention(ctx, ggml.ggml_reshape_3d(ctx, tensors[0], d, n_heads, n_tokens), *views, tensors[3], shape)
    ggml.ggml_build_forward_expand(graph, made)
    buffer = ggml.ggml_backend_alloc_ctx_tensors(ctx, backend)
    for tensor, array in zip(tensors, given, strict=True):
        packed = np.ascontiguousarray(array)
        ctypes.memmove(tensor.data, packed.ctypes.data, packed.nbytes)
    check_status(ggml.ggml_backend_graph_compute(backend, graph), "the CPU")
    out = np.empty((n_tokens, n_heads * d), np.float32)
    ctypes.memmove(out.ctypes.data, made.data, out.nbytes)
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_backend_free(backend)
    ggml.ggml_free(ctx)
    return out


def expected(q: Array, keys: Array, values: Array, mask: Array) -> Array:
    group = q.shape[1] // keys.shape[1]
    k, v = (np.repeat(x.astype(np.float16).astype(np.float64), group, axis=1) for x in (keys, values))
    scores = np.einsum("thd,chd->thc", q.astype(np.float64), k) / np.sqrt(q.shape[2]) + mask[:, None, :]
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("thc,chd->thd", weights / weights.sum(axis=2, keepdims=True), v).reshape(len(q), -1)


def case(n_tokens: int, heads: tuple[int, int, int], n_cells: int, spread: float = 1.0) -> tuple[Array, ...]:
    """The tokens are the last ones of a sequence; every seventh cell is another sequence's."""
    d, n_heads, n_kv = heads
    rng = np.random.default_rng(n_tokens + d + n_heads + n_cells)
    q = rng.normal(0, spread, (n_tokens, n_heads, d))
    keys, values = rng.normal(0, 1, (2, n_cells, n_kv, d))
    last = max(0, n_cells - n_tokens - 40) + np.arange(n_tokens)[:, None]
    cells = np.arange(n_cells)
    unseen = (cells > last) | (cells % 7 == 3)
    unseen[:, 0] = False
    return q, keys, values, np.where(unseen, -np.inf, 0.0)


SHAPES = [(16, 1, 1), (32, 8, 4), (64, 6, 2), (80, 5, 1), (128, 32, 8), (256, 3, 3)]


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("n_cells", [1, 31, 256, 1100])
def test_against_numpy(heads: tuple[int, int, int], n_cells: int) -> None:
    for n_tokens, threads in ((1, 1), (5, 3), (16, 2)):
        given = case(n_tokens, heads, n_cells)
        found = attended(*given, threads=threads)
        assert (found is not None) == there()
        if found is not None:
            wanted = expected(*given)
            # Sums of up to 1100 weights of 1e-7 relative error each, in another order.
            assert np.abs(found - wanted).max() < 2e-6 * np.abs(given[2]).max()


def test_scores_far_apart() -> None:
    """Weights that are nothing beside the largest, and a largest that comes late."""
    q, keys, values, mask = case(3, (64, 4, 2), 400, spread=60.0)
    found = attended(q, keys, values, mask, threads=2)
    if found is not None:
        assert np.abs(found - expected(q, keys, values, mask)).max() < 1e-4 * np.abs(values).max()


def test_what_is_not_seen_may_be_anything() -> None:
    q, keys, values, mask = case(2, (32, 4, 2), 300)
    wanted = attended(q, keys, values, mask, threads=1)
    unseen = np.isinf(mask).all(axis=0)
    keys[unseen], values[unseen] = np.nan, np.inf
    found = attended(q, keys, values, mask, threads=1)
    assert (found is None) or (np.isfinite(found).all() and np.array_equal(found, wanted))


@pytest.mark.parametrize("heads", SHAPES)
def test_the_same_bits_in_any_company(heads: tuple[int, int, int]) -> None:
    q, keys, values, mask = case(16, heads, 700)
    whole = attended(q, keys, values, mask, threads=1)
    if whole is None:
        return
    for first, n, threads in ((0, 1, 1), (5, 1, 3), (3, 4, 2), (0, 16, 5), (9, 7, 64)):
        part = slice(first, first + n)
        assert np.array_equal(attended(q[part], keys, values, mask[part], threads), whole[part])
    # Cells behind those that are seen change nothing.
    shorter = attended(q[:1], keys[:672], values[:672], mask[:1, :672], 2)
    assert np.array_equal(shorter, whole[:1])


def test_where_cells_lie_does_not_matter() -> None:
    q, keys, values, mask = case(4, (64, 4, 2), 500)
    wanted = attended(q, keys, values, mask, threads=2)
    if wanted is None:
        return
    to = np.sort(np.random.default_rng(7).choice(900, 500, replace=False))  # others' cells lie between
    moved = [np.full((900, *x.shape[1:]), np.nan) for x in (keys, values)]
    moved[0][to], moved[1][to] = keys, values
    there_mask = np.full((4, 900), -np.inf)
    there_mask[:, to] = mask
    assert np.array_equal(attended(q, *moved, there_mask, threads=3), wanted)


def test_heads_of_odd_length_have_no_kernel() -> None:
    assert sparse_ffn.attention((40, 4, 2), 1.0, 1) is None
