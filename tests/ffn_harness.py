"""One FFN in memory, run through our operators and through float64 numpy: the harness of the kernel tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import Chosen, NativeTensors, add_native_ffn
from runtime.compute.weights import new_context
from runtime.model_file.structure import Structure

Array = npt.NDArray[Any]
FLOATS = {"f32": np.float32, "f16": np.float16}


def structure(
    n_embd: int,
    n_ff: int,
    gated: bool,
    activation: str,
    threshold: float = 0.0,
    bias: bool = False,
    sub_norm: bool = False,
) -> Structure:
    return Structure(
        source_architecture="test", vocab_size=1, context_length=1, embedding_length=n_embd, block_count=1, feed_forward_length=n_ff, head_count=1, head_count_kv=1, head_length=2,
        norm="rms", norm_epsilon=1e-5, position="rope_neox", ffn_gate="gated" if gated else "none", ffn_activation=activation, activation_threshold=threshold, ffn_bias=bias, rope_dimension_count=2, ffn_sub_norm=sub_norm,
    )  # fmt: skip


def quantize(rows: Array, type_name: str) -> tuple[Array, Array]:
    """Bytes of the rows in a ggml type, and the float64 numbers that these bytes stand for (by the gguf package)."""
    rows = np.ascontiguousarray(rows, np.float32)
    type_id = ggml.TYPES[type_name]
    packed = np.empty((len(rows), ggml.ggml_row_size(type_id, rows.shape[1])), np.uint8)
    on_worker(lambda: ggml.ggml_quantize_chunk(type_id, rows.ctypes.data, packed.ctypes.data, 0, *rows.shape, None))
    if type_name in FLOATS:
        return packed, packed.view(FLOATS[type_name]).astype(np.float64)
    return packed, gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(type_id)).astype(np.float64)


def as_rounded(x: Array, type_name: str) -> Array:
    """float64 of the activations x as ggml rounds them before a dot product with rows of `type_name`."""
    x = np.ascontiguousarray(x, np.float32)
    x_type = ggml.ggml_get_type_traits_cpu(ggml.TYPES[type_name]).contents.vec_dot_type
    name = next(n for n, i in ggml.TYPES.items() if i == x_type)
    packed = np.empty((len(x), ggml.ggml_row_size(x_type, x.shape[1])), np.uint8)
    convert = _FROM_FLOAT(ggml.ggml_get_type_traits_cpu(x_type).contents.from_float)
    for row, out in zip(x, packed, strict=True):
        on_worker(lambda row=row, out=out: convert(row.ctypes.data, out.ctypes.data, row.size))
    if name in FLOATS:
        return packed.view(FLOATS[name]).astype(np.float64)
    if name in _ACTIVATION_BLOCKS:
        return _dequantize_activations(packed, *_ACTIVATION_BLOCKS[name])
    return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(x_type)).astype(np.float64)


_FROM_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


# Types for activations only: scale type, where the int8 values start, how many, and the block's size in bytes.
_ACTIVATION_BLOCKS = {"q8_K": (np.float32, 4, 256, 292), "q8_1": (np.float16, 4, 32, 36)}


def _dequantize_activations(packed: Array, scale_type: type, start: int, n: int, size: int) -> Array:
    blocks = packed.reshape(len(packed), -1, size)
    scale = blocks[:, :, : np.dtype(scale_type).itemsize].copy().view(scale_type).astype(np.float64)
    return (scale * blocks[:, :, start : start + n].copy().view(np.int8)).reshape(len(packed), -1)


@dataclass
class Ffn:
    """Weights as bytes and as the numbers they stand for."""

    s: Structure
    type_name: str
    packed: dict[str, Array]
    exact: dict[str, Array]


def make(s: Structure, type_name: str, active: float, rng: np.random.Generator) -> Ffn:
    """Random weights; with biases, the gate's is set so that about `active` of the neurons fire."""
    names = ["up", "down"] + (["gate"] if s.ffns[0].gated else [])
    pairs = {n: quantize(rng.normal(0, 0.5, (s.feed_forward_length, s.embedding_length)), type_name) for n in names}
    packed, exact = {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}
    if s.ffn_bias:
        spread = 0.5 * np.sqrt(s.embedding_length)
        first = rng.normal(0, 0.1, s.feed_forward_length) + {0: -1e3, 1: 1e3}.get(
            active, -spread * _normal_quantile(1 - active)
        )
        biases = {"gate_bias": first, "up_bias": rng.normal(0, 1, s.feed_forward_length)}
        exact |= {n: b.astype(np.float32).astype(np.float64) for n, b in biases.items()}
        packed |= {n: np.ascontiguousarray(b, np.float32).view(np.uint8) for n, b in biases.items()}
    return Ffn(s, type_name, packed, exact)


def _normal_quantile(p: float) -> float:
    return float(np.quantile(np.random.default_rng(0).normal(size=100_000), p))


@dataclass
class Ranges:
    """Ranges of rows, and which of them each token scans. table: [n, 2]; chosen and weights: [n_tokens, k]."""

    table: Array
    chosen: Array
    weights: Array

    def per_row(self, n_ff: int) -> Array:
        """What each row's strength is multiplied by, float64 [n_tokens, n_ff]; NaN for rows that a token does not scan."""
        rows = np.full((len(self.chosen), n_ff), np.nan)
        for t, (chosen, weights) in enumerate(zip(self.chosen, self.weights, strict=True)):
            for i, weight in zip(chosen, weights, strict=True):
                if 0 <= i < len(self.table):
                    rows[t, slice(*self.table[i])] = weight
        return rows


def reference(f: Ffn, x: Array, ranges: Ranges | None = None) -> tuple[Array, Array]:
    """float64: the product [n_tokens, product_length] and which neurons fire [n_tokens, n_ff]."""
    w, s = f.exact, f.s
    first = x @ w["gate" if s.ffns[0].gated else "up"].T + w.get("gate_bias", 0.0)
    fires = first > s.activation_threshold
    if ranges:
        weights = ranges.per_row(s.feed_forward_length)
        fires &= ~np.isnan(weights)
    h = np.where(fires, first**2 if s.ffn_activation == "relu2" else first, 0.0)
    if s.ffns[0].gated:
        up = x @ w["up"].T + w.get("up_bias", 0.0)
        h = h * (np.maximum(up, 0) if s.ffn_activation == "drelu" else up)
    if ranges:
        h = h * np.nan_to_num(weights)
    y = h @ w["down"]
    return np.concatenate([y, (h**2).sum(1, keepdims=True)], 1) if s.ffn_sub_norm else y, fires


def run_native(
    f: Ffn,
    x: Array,
    threads: int,
    room: int | None = None,
    ranges: Ranges | None = None,
    gates: Array | None = None,
) -> tuple[Array, sparse_ffn.Ffn]:
    """Our operators: the product, float32 [n_tokens, product_length], and the description with what they counted.

    room: threads that the description has room for, if not just as many. gates: of all neurons, without bias, where they
    are given, [n_tokens, n_ff].
    """
    given = None if gates is None else np.ascontiguousarray(gates, np.float32)
    return on_worker(
        lambda: _run_native(f, np.ascontiguousarray(x, np.float32), threads, room or threads, ranges, given)
    )


def _run_native(
    f: Ffn, x: Array, threads: int, room: int, ranges: Ranges | None, gates: Array | None
) -> tuple[Array, sparse_ffn.Ffn]:
    s, type_id = f.s, ggml.TYPES[f.type_name]
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ctx = new_context(32, ggml.ggml_graph_overhead_custom(64, False))

    def rows(name: str) -> ggml.TensorP:
        return ggml.ggml_new_tensor_2d(ctx, type_id, s.embedding_length, s.feed_forward_length)

    def bias(name: str) -> ggml.TensorP | None:
        return ggml.ggml_new_tensor_1d(ctx, ggml.F32, s.feed_forward_length) if name in f.packed else None

    first = "gate" if s.ffns[0].gated else "up"
    tensors = NativeTensors(
        gate=rows(first),
        down=rows("down"),
        up=rows("up") if s.ffns[0].gated else None,
        gate_bias=bias("gate_bias"),
        up_bias=bias("up_bias") if s.ffns[0].gated else None,
    )
    data = {first: tensors.gate, "down": tensors.down, "gate_bias": tensors.gate_bias} | (
        {"up": tensors.up, "up_bias": tensors.up_bias} if s.ffns[0].gated else {}
    )
    source = ggml.ggml_new_tensor_2d(ctx, ggml.F32, s.embedding_length, len(x))
    ffn = sparse_ffn.describe(s.blocks[0].ffn, tensors.types, room)
    chosen = None
    if ranges:
        sparse_ffn.divide(ffn, ranges.table)
        k, n = ranges.chosen.shape[1], len(x)
        ids, weights = (ggml.ggml_new_tensor_2d(ctx, kind, k, n) for kind in (ggml.I32, ggml.F32))
        chosen = Chosen(ids, weights)
    scores = None if gates is None else ggml.ggml_new_tensor_2d(ctx, ggml.F32, s.feed_forward_length, len(x))
    y = add_native_ffn(ctx, source, ffn, tensors, None, chosen, scores)
    graph = ggml.ggml_new_graph_custom(ctx, 64, False)
    ggml.ggml_build_forward_expand(graph, y)
    memory = ExactMemory(graph)
    if scores is not None and gates is not None:
        del data[first]  # which are not read
        ggml.ggml_backend_tensor_set(scores, gates.ctypes.data, 0, gates.nbytes)
    for name, tensor in data.items():
        if tensor is not None:
            ggml.ggml_backend_tensor_set(tensor, f.packed[name].ctypes.data, 0, f.packed[name].nbytes)
    ggml.ggml_backend_tensor_set(source, x.ctypes.data, 0, x.nbytes)
    if ranges and chosen:
        for tensor, values in (
            (chosen.ranges, np.ascontiguousarray(ranges.chosen, np.int32)),
            (chosen.weights, np.ascontiguousarray(ranges.weights, np.float32)),
        ):
            ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
    assert ggml.ggml_backend_graph_compute(backend, graph) == ggml.STATUS_SUCCESS
    result = np.empty((len(x), s.ffns[0].product_length), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(y.value), result.ctypes.data, 0, result.nbytes)
    memory.close()
    ggml.ggml_free(ctx)
    ggml.ggml_backend_free(backend)
    return result, ffn


def run_product(
    packed: Array,
    type_id: int,
    x: Array,
    threads: int,
    add: Callable[[ggml.ContextP, ggml.TensorP, ggml.TensorP], ggml.TensorP],
) -> Array:
    """A matrix times x [n_tokens, n_in], by what `add` adds to a graph of x and the matrix: float32 [n_tokens, n_out]. On the worker."""
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ctx = new_context(16, ggml.ggml_graph_overhead_custom(16, False))
    weights = ggml.ggml_new_tensor_2d(ctx, type_id, x.shape[1], len(packed))
    source = ggml.ggml_new_tensor_2d(ctx, ggml.F32, x.shape[1], len(x))
    y = add(ctx, source, weights)
    graph = ggml.ggml_new_graph_custom(ctx, 16, False)
    ggml.ggml_build_forward_expand(graph, y)
    memory = ExactMemory(graph)
    for tensor, array in ((weights, packed), (source, np.ascontiguousarray(x))):
        ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
    assert ggml.ggml_backend_graph_compute(backend, graph) == ggml.STATUS_SUCCESS
    result = np.empty((len(x), len(packed)), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(y.value), result.ctypes.data, 0, result.nbytes)
    memory.close()
    ggml.ggml_free(ctx)
    ggml.ggml_backend_free(backend)
    return result


class ExactMemory:
    """Memory for a graph, each tensor in an allocation of just its size: under a sanitizer nothing can be read past the end of any of them."""

    def __init__(self, graph: ggml.GraphP) -> None:
        self._libc = ctypes.CDLL(None)
        self._owned: list[tuple[ggml.BufferP, ctypes.c_void_p]] = []
        tensors = list(_tensors(graph))
        for tensor in tensors:
            if tensor.struct.view_src:
                continue
            size, memory = ggml.ggml_nbytes(ggml.ConstTensorP(tensor.value)), ctypes.c_void_p()
            assert not self._libc.posix_memalign(ctypes.byref(memory), ctypes.c_size_t(64), ctypes.c_size_t(size))
            buffer = ggml.ggml_backend_cpu_buffer_from_ptr(memory, size)
            ggml.ggml_backend_tensor_alloc(buffer, tensor, memory)
            self._owned.append((buffer, memory))
        for view in tensors:
            if source := view.struct.view_src:
                view.struct.data = source.contents.data + view.struct.view_offs
                view.struct.buffer = source.contents.buffer

    def close(self) -> None:
        """Free the memory, and with it the graph's results."""
        for buffer, memory in self._owned:
            ggml.ggml_backend_buffer_free(buffer)
            self._libc.free(memory)


def _tensors(graph: ggml.GraphP) -> Iterator[ggml.TensorP]:
    """The graph's nodes and what they read, each once."""
    seen = set()
    for i in range(ggml.ggml_graph_n_nodes(graph)):
        node = ggml.ggml_graph_node(graph, i)
        sources = [ctypes.cast(s, ctypes.c_void_p).value for s in node.struct.src if s]
        for address in (node.value, *sources):
            if address not in seen:
                seen.add(address)
                yield ggml.TensorP(address)


def relative_error(found: Array, expected: Array) -> float:
    """Norm of the difference over norm of the expected; 0 where both are 0."""
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(found - expected))
    return difference / norm if norm else difference
