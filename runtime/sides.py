"""Subgraphs on one side of a split model, and the memory that they share there.

Knows ggml's graphs and buffers; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime import ggml
from runtime import ggml_devices as gd
from runtime.errors import UserError
from runtime.graph import NODES_PER_BLOCK
from runtime.weights import new_context


class Part:
    """A subgraph. Inner results lie in the side's compute buffer; what other subgraphs read lies where `keep` puts it."""

    def __init__(self, name: str, n_blocks: int = 1) -> None:
        size = n_blocks * NODES_PER_BLOCK + 64
        self.name = name
        self.ctx = new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False))
        self.graph = ggml.ggml_new_graph_custom(self.ctx, size, False)

    def keep(self, tensor: ggml.TensorP, place: ggml.TensorP) -> None:
        """Compute a tensor to where `place` lies; its shape may be smaller."""
        if tensor.struct.view_src:
            tensor = ggml.ggml_cont(self.ctx, tensor)
        put(tensor, place)
        ggml.ggml_set_output(tensor)
        ggml.ggml_build_forward_expand(self.graph, tensor)


def put(tensor: ggml.TensorP, place: ggml.TensorP) -> None:
    """Let a tensor without memory lie where another one does."""
    status = ggml.ggml_backend_tensor_alloc(ggml.BufferP(place.struct.buffer), tensor, place.data)
    assert status == ggml.STATUS_SUCCESS


class Side:
    """What the subgraphs of one side need: tensors that cross between them, and one compute buffer that they use in turn.

    kinds: types of memory for the crossing tensors, the first that can be had; the compute buffer is of the last one.
    """

    def __init__(self, where: str, kinds: Sequence[ggml.BufferTypeP], max_tensors: int) -> None:
        self._where, self._kinds = where, kinds
        self._context = new_context(max_tensors)
        self._allocator = ggml.ggml_gallocr_new(kinds[-1])
        self._buffer = ggml.BufferP()
        self.parts: list[Part] = []

    def tensor(self, ne0: int, ne1: int = 1, type_id: int = ggml.F32) -> ggml.TensorP:
        """A tensor that crosses; without memory until `allocate_tensors`."""
        return ggml.ggml_new_tensor_2d(self._context, type_id, ne0, ne1)

    def reshaped(self, place: ggml.TensorP, ne0: int, ne1: int) -> ggml.TensorP:
        """A tensor of another, not larger, shape at the same place."""
        tensor = ggml.ggml_new_tensor_2d(self._context, place.type, ne0, ne1)
        put(tensor, place)
        return tensor

    def allocate_tensors(self) -> None:
        """Give the tensors so far their memory. Raises UserError where it does not suffice."""
        if not ggml.ggml_get_first_tensor(self._context):
            return
        for kind in self._kinds:
            self._buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._context, kind)
            if self._buffer:
                return
        raise self._full("hidden states")

    def fill(self, value: int) -> None:
        """Set every byte of the tensors."""
        ggml.ggml_backend_buffer_clear(self._buffer, value)

    def part(self, name: str, n_blocks: int = 1) -> Part:
        """A new subgraph on this side."""
        self.parts.append(Part(name, n_blocks))
        return self.parts[-1]

    def allocate_parts(self) -> None:
        """Give all subgraphs their memory. Raises UserError where it does not suffice."""
        # Once the buffer is large enough for the largest, it stays where it is.
        reserved = all(ggml.ggml_gallocr_reserve(self._allocator, p.graph) for p in self.parts)
        if not reserved or not all(ggml.ggml_gallocr_alloc_graph(self._allocator, p.graph) for p in self.parts):
            raise self._full("compute buffers")

    def _full(self, what: str) -> UserError:
        return UserError(f"{self._where}: not enough memory for {what}", "use a smaller --vram-budget or --n-ctx")

    @property
    def size(self) -> int:
        """Bytes of buffers."""
        crossing = ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0
        return crossing + ggml.ggml_gallocr_get_buffer_size(self._allocator, 0)

    def close(self) -> None:
        """Free the subgraphs and the memory."""
        for part in self.parts:
            ggml.ggml_free(part.ctx)
        ggml.ggml_gallocr_free(self._allocator)
        if self._buffer:
            ggml.ggml_backend_buffer_free(self._buffer)
        ggml.ggml_free(self._context)


def device_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """A device's own memory."""
    return [gd.ggml_backend_dev_buffer_type(device)]


def host_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """Main memory that a device copies from and to by itself, where its driver offers such; else plain main memory."""
    pinned = gd.ggml_backend_dev_host_buffer_type(device)
    return [*([pinned] if pinned else []), ggml.ggml_backend_cpu_buffer_type()]
