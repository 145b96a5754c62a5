"""Subgraphs of one side, and the tensors through which they hand their results on."""

from __future__ import annotations

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.compute.weights import new_context
from runtime.errors import UserError
from runtime.hybrid.memory import Memory

_NODES_PER_BLOCK = 64


class Subgraph:
    """Operations that a side computes at one go. Inner results lie in the side's compute buffer."""

    def __init__(self, handles: Handles, n_blocks: int) -> None:
        size = n_blocks * _NODES_PER_BLOCK + 64
        self.name = ""
        self.ctx = handles.add(new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False)), ggml.ggml_free)
        self.graph = ggml.ggml_new_graph_custom(self.ctx, size, False)
        self._kept: set[int | None] = set()

    def keep(self, tensor: ggml.TensorP) -> ggml.TensorP:
        """Compute a tensor that is to have a place of its own: returns it, or a copy where it cannot have one."""
        # A view has no memory of its own, what is only read here has its place already, and one tensor has one place.
        if tensor.struct.view_src or not tensor.struct.src[0] or tensor.value in self._kept:
            tensor = ggml.ggml_cont(self.ctx, tensor)
        self._kept.add(tensor.value)
        ggml.ggml_set_output(tensor)
        ggml.ggml_build_forward_expand(self.graph, tensor)
        return tensor


class Subgraphs(Closing):
    """All subgraphs of one schedule on one side, and their crossing tensors. Descriptions only: `close` frees these.

    A crossing tensor has a role, such as "hidden" or "scores". All tensors of a role lie at one address, whatever their
    shapes: a later one is written when the earlier one has been read. They have memory from `allocate` on.
    """

    def __init__(self, memory: Memory, max_tensors: int) -> None:
        self._memory, self._handles = memory, Handles()
        self._context = self._handles.add(new_context(max_tensors), ggml.ggml_free)
        self._roles: dict[str, list[ggml.TensorP]] = {}
        self.all: list[Subgraph] = []

    def at(self, role: str, ne0: int, ne1: int = 1, type_id: int = ggml.F32) -> ggml.TensorP:
        """A tensor to be read by subgraphs, or copied."""
        return self._with(role, ggml.ggml_new_tensor_2d(self._context, type_id, ne0, ne1))

    def like(self, role: str, tensor: ggml.TensorP) -> ggml.TensorP:
        """The same, as large as another tensor."""
        return self.at(role, tensor.ne[0], tensor.ne[1], tensor.type)

    def keep(self, subgraph: Subgraph, tensor: ggml.TensorP, role: str) -> ggml.TensorP:
        """Let a subgraph compute a tensor to where the role lies; returns what is computed there."""
        return self._with(role, subgraph.keep(tensor))

    def _with(self, role: str, tensor: ggml.TensorP) -> ggml.TensorP:
        self._roles.setdefault(role, []).append(tensor)
        return tensor

    def new(self, n_blocks: int = 1) -> Subgraph:
        """A new subgraph, with room for the operations of so many blocks."""
        self.all.append(Subgraph(self._handles, n_blocks))
        return self.all[-1]

    def allocate(self) -> None:
        """Give everything its memory. Raises UserError where it does not suffice."""
        self._memory.place(list(self._roles.values()))
        self._memory.allocate([subgraph.graph for subgraph in self.all])

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that they lie in, which other schedules may share."""
        return self._memory.size

    def close(self) -> None:
        """Free the descriptions."""
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
                f"device {where}: cannot compute `{name or operation}` "
                f"({operation}: {', '.join(types[1:])} -> {types[0]})"
            )


def source_types(node: ggml.TensorP) -> list[int]:
    """ggml types of what an operation reads."""
    return [int(source.contents.type) for source in node.struct.src if source]
