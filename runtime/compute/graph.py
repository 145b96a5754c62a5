"""One ggml graph on the CPU: `n_tokens` new tokens through a model, or through some of its blocks.

Knows how a graph is allocated, filled and run; knows nothing of what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.batch import GraphInputs
from runtime.compute.blocks import Blocks
from runtime.compute.builder import Builder, GraphSpec, Inputs
from runtime.compute.kv_cache import KvCache
from runtime.compute.repack import Repacked
from runtime.compute.weights import Tensors, check_status, new_context
from runtime.errors import UserError
from runtime.model_file.structure import Structure

NODES_PER_BLOCK = 64


@dataclass
class Graph(Closing):
    """A built and allocated graph. Call `run` from the thread that owns ggml; `close` frees it."""

    spec: GraphSpec
    structure: Structure
    weights: Tensors
    kv: KvCache
    backend: ggml.BackendP
    scratch: Repacked | None = None  # see Blocks
    ffns: dict[int, sparse_ffn.Ffn] = field(default_factory=dict)  # by block
    taps: dict[str, ggml.TensorP] = field(default_factory=dict)  # inner results, where the spec asks for them

    def __post_init__(self) -> None:
        size = self.structure.block_count * NODES_PER_BLOCK + 64
        with Handles() as handles:
            self.ctx = handles.add(new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False)), ggml.ggml_free)
            self.graph = ggml.ggml_new_graph_custom(self.ctx, size, False)
            self._add_inputs()
            self.output = self._build()
            ggml.ggml_set_output(self.output)
            ggml.ggml_build_forward_expand(self.graph, self.output)
            check_supported(self.graph, ggml.ggml_backend_get_device(self.backend))
            self._allocator = ggml.ggml_gallocr_new(ggml.ggml_backend_cpu_buffer_type())
            handles.add(self._allocator, ggml.ggml_gallocr_free)
            if not ggml.ggml_gallocr_alloc_graph(self._allocator, self.graph):
                raise UserError(
                    f"not enough memory for the compute buffer of {self.spec.n_tokens} tokens", "use a smaller --n-ctx"
                )
            self._handles = handles.pop_all()

    def _add_inputs(self) -> None:
        n, spec = self.spec.n_tokens, self.spec
        if spec.first is None:
            self.input = self._input(b"tokens", ggml.I32, n)
        else:
            self.input = self._input(b"hidden", ggml.F32, self.structure.embedding_length, n)
        self.inputs = Inputs(
            positions=self._input(b"positions", ggml.I32, n),
            cells=self._input(b"cells", ggml.I64, n),
            outputs=self._input(b"outputs", ggml.I32, spec.n_outputs),
            masks={w: self._input(b"mask %d" % w, ggml.F16, spec.n_kv, n) for w in self.structure.windows},
        )

    def _input(self, name: bytes, type_id: int, ne0: int, ne1: int = 1) -> ggml.TensorP:
        tensor = ggml.ggml_new_tensor_2d(self.ctx, type_id, ne0, ne1)
        ggml.ggml_set_name(tensor, name)
        ggml.ggml_set_input(tensor)
        # Listed even where nothing reads it, so that it always has memory.
        ggml.ggml_build_forward_expand(self.graph, tensor)
        return tensor

    def _build(self) -> ggml.TensorP:
        """Add every operation; returns the logits [n_vocab, n_outputs], or hidden states [n_embd, n_tokens]."""
        device = ggml.ggml_backend_get_device(self.backend)
        builder = Builder(
            self.ctx, self.structure, self.weights, self.kv, self.spec, self.inputs, device, self.scratch, self.ffns
        )
        blocks = Blocks(builder)
        x = blocks.embeddings(self.input) if self.spec.first is None else self.input
        end = self.structure.block_count if self.spec.end is None else self.spec.end
        for i in range(self.spec.first or 0, end):
            x = self._tapped(blocks, x, i) if self.spec.tapped and i in self.structure.ffns else blocks.block(x, i)
        return blocks.head(x) if self.spec.end is None else x

    def _tapped(self, blocks: Blocks, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """Block `i`, with what its FFN sees kept."""
        at = blocks.until_ffn(x, i)
        for name, inner in (("ffn_input", at.x), ("residual", at.stream)):
            ggml.ggml_set_output(inner)
            self.taps[name] = inner
        return blocks.after_ffn(at, blocks.ffn(i).product(at.x, at.stream), i)

    def run(self, inputs: GraphInputs) -> npt.NDArray[np.float32]:
        """Compute the tokens and return logits, float32 [n_outputs, n_vocab]; hidden states where the graph ends before the last block.

        Raises UserError where ggml fails.
        """
        write(self.input, inputs.data)
        for tensor, values in zip(self.inputs.tensors, inputs.arrays, strict=True):
            write(tensor, values)
        check_status(ggml.ggml_backend_graph_compute(self.backend, self.graph), "the CPU")
        if self.scratch:
            self.scratch.check()
        return read(self.output)

    @property
    def buffer_size(self) -> int:
        """Bytes of the compute buffer."""
        return ggml.ggml_gallocr_get_buffer_size(self._allocator, 0)

    def close(self) -> None:
        """Free the graph and its compute buffer."""
        self._handles.close()


def check_supported(graph: ggml.GraphP, device: ggml.DeviceP) -> None:
    """Refuse a graph with an operation that a device cannot compute: raises UserError."""
    for i in range(ggml.ggml_graph_n_nodes(graph)):
        node = ggml.ggml_graph_node(graph, i)
        if not ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(node.value)):
            where, name = ggml.ggml_backend_dev_name(device).decode(), node.struct.name.decode()
            operation = ggml.ggml_op_name(node.struct.op).decode()
            types = [ggml.ggml_type_name(t).decode() for t in (node.type, *source_types(node))]
            raise UserError(
                f"device {where}: cannot compute `{name or operation}` ({operation}: {', '.join(types[1:])} -> {types[0]})"
            )


def source_types(node: ggml.TensorP) -> list[int]:
    """ggml types of what an operation reads."""
    return [int(source.contents.type) for source in node.struct.src if source]


def write(tensor: ggml.TensorP, array: npt.NDArray[np.generic]) -> None:
    """Fill a tensor from an array of the same bytes."""
    ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def read(tensor: ggml.TensorP) -> npt.NDArray[np.float32]:
    """A copy of an F32 matrix, [ne1, ne0]."""
    array = np.empty((tensor.ne[1], tensor.ne[0]), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(tensor.value), array.ctypes.data, 0, array.nbytes)
    return array
