"""Repacked matrices: the same products, the same logits, and file pages that are given back."""

from __future__ import annotations

import gc
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CHECKPOINTS
from oracle import Logits, random_ids, relative

import runtime
from convert.formats import NUMBERS, encode
from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute import products, repack
from runtime.compute.weights import new_context
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
NAMES = {number: name for name, number in NUMBERS.items()}


def product_by_layout(kind: int, weights: np.ndarray[Any, Any], x: np.ndarray[Any, Any]) -> dict[str, Logits]:
    """weights [n_out, n_in] encoded as `kind`, times x [n_tokens, n_in]: plain, and from each extra buffer type that can hold them."""
    backend = ggml.ggml_backend_cpu_init()
    device = ggml.ggml_backend_get_device(backend)
    n_out, n_in = weights.shape
    data = encode(weights.astype(np.float32), NAMES[kind])
    types = [t for t in repack.extra_buffer_types(device) if repack.holds(device, t, kind, (n_in, n_out))]
    found = {}
    for i, buffer_type in enumerate([ggml.ggml_backend_cpu_buffer_type(), *types]):
        weights_context, context = new_context(1), new_context(8, ggml.ggml_graph_overhead_custom(8, False))
        matrix = ggml.ggml_new_tensor_2d(weights_context, kind, n_in, n_out)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(weights_context, buffer_type)
        ggml.ggml_backend_tensor_set(matrix, data.ctypes.data, 0, data.nbytes)
        given = ggml.ggml_new_tensor_2d(context, ggml.F32, n_in, len(x))
        product = ggml.ggml_mul_mat(context, matrix, given)
        graph = ggml.ggml_new_graph_custom(context, 8, False)
        ggml.ggml_build_forward_expand(graph, product)
        inner = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
        ggml.ggml_backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)
        assert ggml.ggml_backend_graph_compute(backend, graph) == ggml.STATUS_SUCCESS
        out = np.empty((len(x), n_out), np.float32)
        ggml.ggml_backend_tensor_get(ggml.ConstTensorP(product.value), out.ctypes.data, 0, out.nbytes)
        found[str(i) if i else "plain"] = out
        for owned in (inner, buffer):
            ggml.ggml_backend_buffer_free(owned)
        for owned_context in (context, weights_context):
            ggml.ggml_free(owned_context)
    ggml.ggml_backend_free(backend)
    return found


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize("shape", [(64, 64), (1024, 256), (256, 1024), (40, 96)], ids=str)
@pytest.mark.parametrize("kind", sorted(repack.GAINING), ids=lambda kind: NAMES[kind])
def test_repacked_products_are_those_of_plain_matrices(kind: int, shape: tuple[int, int], n_tokens: int) -> None:
    rng = np.random.default_rng(0)
    weights, x = rng.standard_normal(shape, np.float32), rng.standard_normal((n_tokens, shape[1]), np.float32)
    found = on_worker(lambda: product_by_layout(kind, weights, x))
    plain = found.pop("plain")
    assert relative(x @ weights.T, plain) < 0.15  # four bits
    for repacked in found.values():
        assert relative(plain, repacked) < 1e-5


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs repack other formats")
def test_what_cannot_be_repacked_is_not_asked_for() -> None:
    def held(kind: str, n_in: int, n_out: int) -> bool:
        backend = ggml.ggml_backend_cpu_init()
        device = ggml.ggml_backend_get_device(backend)
        types = repack.extra_buffer_types(device)
        answer = any(repack.holds(device, t, NUMBERS[kind], (n_in, n_out)) for t in types)
        ggml.ggml_backend_free(backend)
        return answer

    assert on_worker(lambda: held("q4_0", 256, 64))
    assert not on_worker(lambda: held("q4_0", 256, 63))
    assert not any(on_worker(lambda kind=kind: held(kind, 256, 64)) for kind in ("f32", "f16", "q6_k"))


def logits(path: Path, ids: list[int], **options: Any) -> tuple[Logits, int]:
    """Every position's logits, and how many matrices were repacked."""
    with runtime.load(path, kv_type="f32", **options) as model:
        return model.logits(ids), len(model._engine.weights.copies)


@pytest.mark.parametrize("name", ["bundled", *CHECKPOINTS])
def test_repacked_models_compute_the_same(converted: Converted, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, ids = converted(name, "q4_0"), random_ids(40, 4000)
    repacked, n_repacked = logits(path, ids, ffn="dense")
    monkeypatch.setattr(repack, "GAINING", frozenset())
    plain, n_plain = logits(path, ids, ffn="dense")
    assert n_plain == 0
    assert (
        relative(plain, repacked) < 0.02
    )  # sums in another order flip roundings of activations to 8 bits; a wrong layout gives 1
    assert bool(n_repacked) == has_q4_0_attention(path)


@pytest.mark.parametrize("name", ["bundled", *CHECKPOINTS])
def test_attention_that_is_repacked_for_a_batch_computes_the_same(
    converted: Converted, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sparse_ffn, "tiles", lambda *_: None)  # as on a CPU for which there are none
    path, ids, found = converted(name, "q4_0"), random_ids(40, 4000), []
    for n_tokens in (math.inf, 17):
        monkeypatch.setattr(products, "_REPACKED_FROM", n_tokens)
        with runtime.load(path, kv_type="f32", ffn="exact") as model:
            found.append(model.logits(ids))
            used = model._engine._executor.cache._scratch
            assert bool(used and used.tensors) == (n_tokens == 17 and has_q4_0_attention(path))
    plain, repacked = found
    assert relative(plain, repacked) < 0.02


def has_q4_0_attention(path: Path) -> bool:
    with GgufFile(path) as file:
        return any(".attn_q." in n and t.type == "q4_0" for n, t in file.tensors.items())


def test_a_tied_head_is_repacked_beside_the_embeddings(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = [name for name in CHECKPOINTS if structure(converted(name)).tied_output]
    path = converted(tied[0], "q4_0")
    with GgufFile(path) as file:
        head = file.tensors["token_embd.weight"]
    monkeypatch.setattr(repack, "GAINING", frozenset({*repack.GAINING, head.type_id}))
    with runtime.load(path, ffn="dense") as model:
        weights = model._engine.weights
        copied = "token_embd.weight" in weights.copies
        assert copied == (weights.matrix("token_embd.weight").data != weights["token_embd.weight"].data)
        assert np.isfinite(model.logits(random_ids(5, 100))).all()


def structure(path: Path) -> Any:
    with GgufFile(path) as file:
        return file.structure


# --- memory ----------------------------------------------------------------------------------------------------------


def resident_pages(path: Path) -> int:
    """Bytes of a file that lie in this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    total = 0
    for line in lines:
        if line.endswith(str(path)):
            total += next(int(inner.split()[1]) * 1024 for inner in lines if inner.startswith("Rss:"))
    return total


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")


@needs_proc
def test_released_pages_are_given_back_and_can_be_read_again(converted: Converted) -> None:
    path = converted("bundled", "f32")
    with GgufFile(path) as file:
        file.release("blk.0.ffn_up.weight")  # nothing is mapped yet
        address, size = file.mapped("blk.0.ffn_up.weight")
        view = np.ctypeslib.as_array((ggml.ctypes.c_uint8 * size).from_address(address))
        before = view.copy()
        assert resident_pages(path) > 0.9 * size
        for name in file.tensors:
            file.release(name)
        assert resident_pages(path) < 0.3 * size
        assert np.array_equal(view, before)
        del view


@needs_proc
def test_pages_of_repacked_matrices_are_not_resident(converted: Converted) -> None:
    path = converted("bundled", "q4_0")
    with runtime.load(path, ffn="dense") as model:
        model._sequence.logits(random_ids(10, 4000))
        copied = sum(model.tensors[name].nbytes for name in model._engine.weights.copies)
        assert copied > 0.3 * path.stat().st_size
        assert resident_pages(path) < path.stat().st_size - 0.8 * copied


@needs_proc
def test_closing_frees_the_copies(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_ffn, "tiles", lambda *_: None)  # which need no copies
    path, ids = converted("bundled", "q4_0"), random_ids(64, 4000)

    def use() -> None:
        with runtime.load(path, ffn="exact") as model:
            model._engine._dense_from = (2.0,) * 6
            model._sequence.logits(ids)

    use()
    gc.collect()
    before = resident()
    for _ in range(8):
        use()
    gc.collect()
    assert resident() - before < 4e6
