"""Subgraphs on one side of a split model, and the memory that they share there.

Knows ggml's graphs and buffers; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.compute.graph import NODES_PER_BLOCK
from runtime.compute.weights import new_context
from runtime.errors import UserError

_ALIGNMENT = 64


class Part:
    """A subgraph. Inner results lie in the side's compute buffer; what other subgraphs read lies where `keep` puts it.

    handles: those of the side, to which it belongs.
    """

    def __init__(self, handles: Handles, name: str, n_blocks: int = 1) -> None:
        size = n_blocks * NODES_PER_BLOCK + 64
        self.name = name
        self.ctx = handles.add(new_context(2 * size, ggml.ggml_graph_overhead_custom(size, False)), ggml.ggml_free)
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


class Memory(Closing):
    """One side's memory for subgraphs: a buffer for tensors that cross between them, and a compute buffer that they use in turn.

    It grows with what is asked of it and is never given back before `close`: freeing and asking again at every change from prompt to token costs time, and
    some drivers do not survive it (docs/log.md). Whenever `growths` has changed, everything that was placed before has lost its place.
    kinds: types of memory for the crossing tensors, the first that can be had; the compute buffer is of the last one.
    """

    def __init__(self, where: str, kinds: Sequence[ggml.BufferTypeP]) -> None:
        self.where, self._kinds, self.growths = where, kinds, 0
        self._handles, self._buffer = Handles(), ggml.BufferP()
        self._allocator = self._handles.add(ggml.ggml_gallocr_new(kinds[-1]), ggml.ggml_gallocr_free)

    def place(self, tensors: Sequence[ggml.TensorP]) -> None:
        """Put crossing tensors into the buffer, from its start. Raises UserError where memory does not suffice."""
        sizes = [
            max(gd.ggml_backend_buft_get_alloc_size(kind, ggml.ConstTensorP(t.value)) for kind in self._kinds)
            for t in tensors
        ]
        alignment = max(_ALIGNMENT, *(gd.ggml_backend_buft_get_alignment(kind) for kind in self._kinds))
        ends = np.cumsum([-(-size // alignment) * alignment for size in sizes])
        if len(tensors):
            self._make_room(int(ends[-1]) + alignment)
        base = gd.ggml_backend_buffer_get_base(self._buffer) if self._buffer else 0
        start = -(-(base or 0) // alignment) * alignment
        for tensor, offset in zip(tensors, (0, *ends[:-1].tolist()), strict=False):
            status = ggml.ggml_backend_tensor_alloc(self._buffer, tensor, start + offset)
            assert status == ggml.STATUS_SUCCESS

    def _make_room(self, size: int) -> None:
        if self._buffer and ggml.ggml_backend_buffer_get_size(self._buffer) >= size:
            return
        self.growths += 1
        self._free_buffer()
        for kind in self._kinds:
            self._buffer = gd.ggml_backend_buft_alloc_buffer(kind, size)
            if self._buffer:
                return
        raise self._full("hidden states")

    def _free_buffer(self) -> None:
        buffer, self._buffer = self._buffer, ggml.BufferP()
        if buffer:
            ggml.ggml_backend_buffer_free(buffer)

    def fill(self, value: int) -> None:
        """Set every byte of the crossing tensors."""
        ggml.ggml_backend_buffer_clear(self._buffer, value)

    def allocate(self, parts: Sequence[Part]) -> None:
        """Give all inner results of subgraphs their place. Raises UserError where memory does not suffice."""
        before = self._compute_size
        # Once the buffer is large enough for the largest, it stays where it is.
        reserved = all(ggml.ggml_gallocr_reserve(self._allocator, p.graph) for p in parts)
        self.growths += self._compute_size != before
        if not reserved or not all(ggml.ggml_gallocr_alloc_graph(self._allocator, p.graph) for p in parts):
            self.growths += 1
            raise self._full("compute buffers")

    @property
    def _compute_size(self) -> int:
        return ggml.ggml_gallocr_get_buffer_size(self._allocator, 0)

    def _full(self, what: str) -> UserError:
        return UserError(f"{self.where}: not enough memory for {what}", "use a smaller --vram-budget or --n-ctx")

    @property
    def size(self) -> int:
        """Bytes of both buffers."""
        return (ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0) + self._compute_size

    def close(self) -> None:
        """Free both buffers."""
        self._free_buffer()
        self._handles.close()


class Side(Closing):
    """Subgraphs in one side's memory, and the tensors that cross between them. Descriptions only: `close` frees these."""

    def __init__(self, memory: Memory, max_tensors: int) -> None:
        self.memory, self._handles = memory, Handles()
        self._context = self._handles.add(new_context(max_tensors), ggml.ggml_free)
        self._tensors: list[ggml.TensorP] = []
        self.parts: list[Part] = []

    def tensor(self, ne0: int, ne1: int = 1, type_id: int = ggml.F32) -> ggml.TensorP:
        """A tensor that crosses; without memory until `allocate_tensors`."""
        self._tensors.append(ggml.ggml_new_tensor_2d(self._context, type_id, ne0, ne1))
        return self._tensors[-1]

    def reshaped(self, place: ggml.TensorP, ne0: int, ne1: int) -> ggml.TensorP:
        """A tensor of another, not larger, shape at the same place."""
        tensor = ggml.ggml_new_tensor_2d(self._context, place.type, ne0, ne1)
        put(tensor, place)
        return tensor

    def allocate_tensors(self) -> None:
        """Give the tensors so far their memory. Raises UserError where it does not suffice."""
        self.memory.place(self._tensors)

    def part(self, name: str, n_blocks: int = 1) -> Part:
        """A new subgraph on this side."""
        self.parts.append(Part(self._handles, name, n_blocks))
        return self.parts[-1]

    def allocate_parts(self) -> None:
        """Give all subgraphs their memory. Raises UserError where it does not suffice."""
        self.memory.allocate(self.parts)

    def close(self) -> None:
        """Free the subgraphs' descriptions."""
        self._handles.close()


def device_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """A device's own memory."""
    return [gd.ggml_backend_dev_buffer_type(device)]


def host_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """Main memory that a device copies from and to by itself, where its driver offers such; else plain main memory."""
    pinned = gd.ggml_backend_dev_host_buffer_type(device)
    return [*([pinned] if pinned else []), ggml.ggml_backend_cpu_buffer_type()]
