"""Several copies of one FFN in memory, and graphs that compute them one after the other, so that no cache holds what
comes next.

Five ways to compute: ggml's products on plain rows (`plain`) and on rows repacked for the CPU (`repacked`), our
products of whole matrices (`whole`), and our operators with every gate (`exact`) and with the list of neurons given
(`listed`); beside them the predictor that makes such a list (`predictor`). Which neurons fire is planted in the gate's
bias, or left to the weights. Everything here is called on the thread that owns ggml.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.case import RANK, Case
from convert.formats import NUMBERS, encode, row_bytes
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import (
    NativeTensors,
    add_choice,
    add_native_ffn,
    add_predictor,
    add_product,
    add_tiled,
    add_tiled_product,
)
from runtime.compute.products import by_rows, tiles_of
from runtime.compute.repack import extra_buffer_types, holds
from runtime.compute.weights import new_context

_NODES = 32  # of one copy, at most
_CERTAIN = 100.0  # a bias that decides whether a neuron fires
_DISTINCT = 1024  # rows of a matrix that differ, where they decide who fires

Bytes = npt.NDArray[np.uint8]


@dataclass
class Prepared:
    """A graph over all copies. `run` computes it and returns the seconds that took."""

    backend: ggml.BackendP
    graph: ggml.GraphP
    ffns: list[sparse_ffn.Ffn] = field(default_factory=list)

    def run(self) -> float:
        """Compute every copy once."""
        begin = time.perf_counter()
        status = ggml.ggml_backend_graph_compute(self.backend, self.graph)
        seconds = time.perf_counter() - begin
        assert status == ggml.STATUS_SUCCESS
        return seconds

    def fired(self, n_ff: int) -> float:
        """Share of neurons whose up and down rows the last run read."""
        seen = sum(len(ffn.fired) for ffn in self.ffns)
        return sum(int(ffn.fired.sum()) for ffn in self.ffns) / (seen * n_ff) if seen else 1.0


class Copies:
    """Weights and graphs of a case; `prepared` maps the variants that this machine and type allow. Call `close`.

    tokens: computed at once. independent: each token fires neurons of its own; else the same ones fire for all.
    """

    def __init__(self, case: Case, tokens: int = 1, independent: bool = False) -> None:
        self.case, self._ffn, self._tokens = case, replace(case.ffn, bias=True), tokens
        self._independent = independent
        self._closing: list[Callable[[], None]] = []
        self.backend = ggml.ggml_backend_cpu_init()
        ggml.ggml_backend_cpu_set_n_threads(self.backend, case.threads)
        self._kept: list[ctypes.Structure] = []  # that graphs read
        self._bytes: dict[tuple[str, int, int], Bytes] = {}
        self.names = ("gate", "up") if self._ffn.gated else ("gate",)  # ungated: the up rows decide who fires
        biases = ("gate_bias", "up_bias", "listed_bias", "predictor_bias")
        plain = self._weights((*self.names, "down", "down_t", *biases, "predictor_in", "predictor_out"))
        assert plain
        self.prepared = {"plain": self._products(plain)}
        if repacked := self._repacked():
            self.prepared["repacked"] = self._products(repacked)
        self.prepared["whole"] = self._products(plain, own=True)
        self.prepared["exact"] = self._native(plain, None)
        predictor, lists = self._predictor(plain)
        self.prepared["listed"] = self._native(plain, lists)
        self.prepared["predictor"] = predictor

    def close(self) -> None:
        """Free everything."""
        for call in reversed(self._closing):
            call()
        ggml.ggml_backend_free(self.backend)

    # --- weights -----------------------------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[str, int, int]:
        """Format, elements of a row, rows."""
        d, ff, kind = self._ffn.n_embd, self._ffn.n_ff, self.case.type
        return {
            "down": (kind, ff, d),
            **dict.fromkeys(("gate_bias", "up_bias", "listed_bias", "predictor_bias"), ("f32", ff, 1)),
            "predictor_in": (self.case.predictor_type, d, RANK),
            "predictor_out": (self.case.predictor_type, RANK, ff),
        }.get(name, (kind, d, ff))

    def _weights(
        self, names: tuple[str, ...], kind: ggml.BufferTypeP | None = None
    ) -> list[dict[str, ggml.TensorP]] | None:
        """The tensors of every copy, filled; kind: an extra buffer type, and then None where it cannot hold these
        tensors.
        """
        shapes = {name: self._shape(name) for name in names}
        device = ggml.ggml_backend_get_device(self.backend)
        if kind and not all(holds(device, kind, NUMBERS[type_name], tuple(ne)) for type_name, *ne in shapes.values()):
            return None
        context = new_context(len(names) * self.case.copies)
        copies = [
            {
                name: ggml.ggml_new_tensor_2d(context, NUMBERS[type_name], *ne)
                for name, (type_name, *ne) in shapes.items()
            }
            for _ in range(self.case.copies)
        ]
        if kind is None:
            buffer = ggml.ggml_backend_alloc_ctx_tensors(context, self.backend)
        else:
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        self._closing += [lambda: ggml.ggml_free(context), lambda: ggml.ggml_backend_buffer_free(buffer)]
        for copy in copies:
            for name, tensor in copy.items():
                data = self._data(name)
                ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        return copies

    def _repacked(self) -> list[dict[str, ggml.TensorP]] | None:
        """The weights as ggml's first fitting buffer type holds them; None where there is none for this type."""
        kinds = extra_buffer_types(ggml.ggml_backend_get_device(self.backend))
        found = (self._weights((*self.names, "down"), kind) for kind in kinds)
        return next((weights for weights in found if weights), None)

    def _data(self, name: str) -> Bytes:
        if name.endswith("_bias"):
            return self._bias(name).astype(np.float32).view(np.uint8)
        kind, length, rows = self._shape(name)
        if (kind, length, rows) not in self._bytes:
            n = min(rows, _DISTINCT if self._independent else 64)
            some = np.random.default_rng(rows).standard_normal((n, length), np.float32) / np.float32(math.sqrt(length))
            self._bytes[kind, length, rows] = np.resize(encode(some, kind), rows * row_bytes(kind, length))
        return self._bytes[kind, length, rows]

    def _bias(self, name: str) -> npt.NDArray[np.floating[Any]]:
        # Products with the inputs are about standard normal: where they decide, a bias says how many are above zero.
        n = self._ffn.n_ff
        if name == "up_bias":
            return np.zeros(n)
        if not self._independent:
            return np.where(self.case.fires, _CERTAIN, -_CERTAIN)
        if name == "listed_bias" or self.case.active == 1:
            return np.full(n, _CERTAIN)
        return np.full(n, -statistics.NormalDist().inv_cdf(1 - self.case.active))

    # --- graphs ------------------------------------------------------------------------------------------------------

    def _graph(
        self, build: Callable[[ggml.ContextP, ggml.TensorP, int], ggml.TensorP]
    ) -> tuple[Prepared, list[ggml.TensorP]]:
        """A graph with `build(context, x, i)` for every copy i; x is F32 [n_embd, tokens].

        Returns the copies' results too.
        """
        size = self.case.copies * _NODES
        context = new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False))
        graph = ggml.ggml_new_graph_custom(context, size, False)
        x = ggml.ggml_new_tensor_2d(context, ggml.F32, self._ffn.n_embd, self._tokens)
        results = [build(context, x, i) for i in range(self.case.copies)]
        for result in results:
            ggml.ggml_build_forward_expand(graph, result)
        buffer = ggml.ggml_backend_alloc_ctx_tensors(context, self.backend)
        self._closing += [lambda: ggml.ggml_free(context), lambda: ggml.ggml_backend_buffer_free(buffer)]
        values = np.random.default_rng(2).standard_normal(self._ffn.n_embd * self._tokens, np.float32)
        ggml.ggml_backend_tensor_set(x, values.ctypes.data, 0, values.nbytes)
        return Prepared(self.backend, graph), results

    def _products(self, weights: list[dict[str, ggml.TensorP]], own: bool = False) -> Prepared:
        """The whole FFN through ggml's products, or our own ones."""

        times = self._times if own else ggml.ggml_mul_mat

        def build(ctx: ggml.ContextP, x: ggml.TensorP, i: int) -> ggml.TensorP:
            w = weights[i]
            h = ggml.ggml_relu(ctx, times(ctx, w["gate"], x))
            if self._ffn.gated:
                h = ggml.ggml_mul(ctx, h, times(ctx, w["up"], x))
            return times(ctx, w["down"], h)

        return self._graph(build)[0]

    def _times(self, ctx: ggml.ContextP, w: ggml.TensorP, x: ggml.TensorP) -> ggml.TensorP:
        """The product of a whole matrix as models that skip neurons compute it."""
        if by_rows(self._tokens):
            product = sparse_ffn.multiplier(w.type, w.ne[0], w.ne[1], self.case.threads)
            self._kept.append(product)
            return add_product(ctx, x, w, product)
        if tiles := tiles_of(w):
            return add_tiled_product(ctx, add_tiled(ctx, x, tiles), w, tiles, self._tokens)
        return ggml.ggml_mul_mat(ctx, w, x)

    def _native(self, weights: list[dict[str, ggml.TensorP]], lists: list[Bytes] | None) -> Prepared:
        """Our operators; lists: the candidates of each copy, or None for every neuron."""
        rows = [self._rows(w, "gate_bias" if lists is None else "listed_bias") for w in weights]
        ffns = [sparse_ffn.describe(self._ffn, t.types, self.case.threads) for t in rows]
        given: list[ggml.TensorP] = []

        def build(ctx: ggml.ContextP, x: ggml.TensorP, i: int) -> ggml.TensorP:
            if lists is None:
                tiled = not by_rows(self._tokens) and tiles_of(rows[i].gate)
                gates = self._times(ctx, rows[i].gate, x) if tiled else None
                return add_native_ffn(ctx, x, ffns[i], rows[i], gates=gates)
            sparse_ffn.predict(ffns[i], RANK, NUMBERS[self.case.predictor_type], 0.0)
            given.append(ggml.ggml_new_tensor_2d(ctx, ggml.I8, lists[i].nbytes, 1))
            return add_native_ffn(ctx, x, ffns[i], rows[i], given[i])

        prepared, _ = self._graph(build)
        for tensor, data in zip(given, lists or [], strict=True):
            ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        prepared.ffns = ffns
        return prepared

    def _rows(self, w: dict[str, ggml.TensorP], bias: str = "gate_bias") -> NativeTensors:
        gated = self._ffn.gated
        return NativeTensors(
            gate=w["gate"],
            down=w["down_t"],
            up=w["up"] if gated else None,
            gate_bias=w[bias],
            up_bias=w["up_bias"] if gated else None,
        )

    def _predictor(self, weights: list[dict[str, ggml.TensorP]]) -> tuple[Prepared, list[Bytes]]:
        """The low-rank predictor, and the lists that it makes: the planted ones."""
        ffns = [sparse_ffn.describe(self._ffn, self._rows(w).types, self.case.threads) for w in weights]

        def build(ctx: ggml.ContextP, x: ggml.TensorP, i: int) -> ggml.TensorP:
            z, rows, bias = (
                self._times(ctx, weights[i]["predictor_in"], x),
                weights[i]["predictor_out"],
                weights[i]["predictor_bias"],
            )
            if not by_rows(self._tokens) and tiles_of(rows):
                return add_choice(ctx, self._times(ctx, rows, z), ffns[i], bias, 0.0)
            return add_predictor(ctx, z, ffns[i], rows, bias, 0.0)

        prepared, results = self._graph(build)
        prepared.run()
        lists = [np.empty(int(np.prod(r.ne)), np.uint8) for r in results]
        for result, data in zip(results, lists, strict=True):
            ggml.ggml_backend_tensor_get(ggml.ConstTensorP(result.value), data.ctypes.data, 0, data.nbytes)
        self._kept += ffns
        return prepared, lists
