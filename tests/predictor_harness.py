"""Predictors run through our operators in a graph of their own, and layers whose weights and inputs are made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ffn_harness import ExactMemory, Ranges, structure

from predictors.calibrate import LayerSamples, TokenSamples
from predictors.matrices import Tensor
from runtime.base.worker import on_worker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import Chosen, NativeTensors, add_native_ffn, add_predictor
from runtime.compute.weights import new_context
from runtime.model_file.structure import Structure

Array = npt.NDArray[Any]


def native_candidates(
    kind: str, tensors: tuple[Tensor, ...], bias: Array, x: Array, threads: int = 2, ranges: Ranges | None = None
) -> Array:
    """Which neurons the runtime's operators choose for inputs x [n_tokens, n_embd]: bool [n_tokens, n_ff], n_ff <= n_embd.

    Every neuron's gate is 1 and its down row a unit vector, so that the FFN's output says who was a candidate.
    """
    return on_worker(
        lambda: _run(kind, tensors, np.float32(bias), np.ascontiguousarray(x, np.float32), threads, ranges)
    )


def _run(kind: str, tensors: tuple[Tensor, ...], bias: Array, x: Array, threads: int, ranges: Ranges | None) -> Array:
    (n_tokens, n_embd), n_ff = x.shape, len(bias)
    s = structure(n_embd, n_ff, False, "relu", bias=True)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ctx = new_context(64, ggml.ggml_graph_overhead_custom(64, False))
    data: list[tuple[ggml.TensorP, Array]] = []

    def tensor(array: Array, type_name: str = "f32", shape: tuple[int, ...] | None = None) -> ggml.TensorP:
        ne = (*(shape or array.shape[::-1]), 1)[:2]
        made = ggml.ggml_new_tensor_2d(ctx, ggml.TYPES[type_name], *ne)
        data.append((made, np.ascontiguousarray(array)))
        return made

    rows = NativeTensors(
        gate=tensor(np.zeros((n_ff, n_embd), np.float32)),
        down=tensor(np.eye(n_ff, n_embd, dtype=np.float32)),
        gate_bias=tensor(np.ones(n_ff, np.float32)),
    )
    ffn = sparse_ffn.describe(s.blocks[0].ffn, rows.types, threads)
    source, offsets = tensor(x), tensor(bias)
    *inner, outer = [tensor(t.data, t.type, t.shape) for t in tensors]
    z = ggml.ggml_mul_mat(ctx, inner[0], source) if inner else source
    z = ggml.ggml_relu(ctx, z) if kind == "mlp" else z
    chosen = None
    if ranges:
        sparse_ffn.divide(ffn, ranges.table)
        ids, weights = np.int32(ranges.chosen), np.ones_like(ranges.weights)
        chosen = Chosen(tensor(ids, "i32"), tensor(weights))
    candidates = add_predictor(ctx, z, ffn, outer, offsets, 0.0, chosen)
    y = add_native_ffn(ctx, source, ffn, rows, candidates, chosen)
    graph = ggml.ggml_new_graph_custom(ctx, 64, False)
    ggml.ggml_build_forward_expand(graph, y)
    memory = ExactMemory(graph)
    for made, array in data:
        ggml.ggml_backend_tensor_set(made, array.ctypes.data, 0, array.nbytes)
    assert ggml.ggml_backend_graph_compute(backend, graph) == ggml.STATUS_SUCCESS
    result = np.empty((n_tokens, n_embd), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(y.value), result.ctypes.data, 0, result.nbytes)
    memory.close()
    ggml.ggml_free(ctx)
    ggml.ggml_backend_free(backend)
    found = result[:, :n_ff] > 0.5
    assert np.array_equal(ffn.gates, found.sum(1))
    return found


@dataclass
class Rows:
    """The weights of one made-up block, read as a BlockRunner's are."""

    structure: Structure
    matrices: dict[str, Array]
    vectors: dict[str, Array] = field(default_factory=dict)

    def rows(self, name: str, first: int, end: int) -> Array:
        return self.matrices[name.split(".")[2]][first:end].astype(np.float32)

    def vector(self, name: str) -> Array | None:
        return self.vectors.get(name.split(".", 2)[2])


def made_up_layer(
    gate: Array, gate_bias: Array, n_tokens: int, rng: np.random.Generator, ungated: str = ""
) -> LayerSamples:
    """A layer on Gaussian inputs, `n_tokens` to fit on and as many to validate and to test. gate: [n_ff, n_embd].

    Gated, with a ReLU; or, `ungated` with this activation, with the rows `gate` as those that decide and are activated.
    """
    n_ff, n_embd = gate.shape
    s = structure(n_embd, n_ff, not ungated, ungated or "relu", bias=True)
    matrices = {"ffn_gate": gate, "ffn_up": rng.normal(size=gate.shape), "ffn_down_t": rng.normal(size=gate.shape)}
    biases = {"ffn_gate.bias": gate_bias.astype(np.float32), "ffn_up.bias": np.zeros(n_ff, np.float32)}
    if ungated:
        matrices["ffn_up"], biases["ffn_up.bias"] = matrices.pop("ffn_gate"), biases.pop("ffn_gate.bias")
    runner: Any = Rows(s, matrices, biases)

    def part() -> TokenSamples:
        x = rng.normal(size=(n_tokens, n_embd)).astype(np.float32)
        return TokenSamples(x, np.full(n_tokens, 1 / (n_embd * n_embd * n_ff), np.float32))

    return LayerSamples(runner, 0, (part(), part(), part()))
