"""One side's memory for subgraphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.errors import UserError

_ALIGNMENT = 64
SHORTER = "use a smaller --n-ctx"
SMALLER = "use a smaller --vram-budget or --n-ctx"


class Memory(Closing):
    """A buffer for tensors that cross between subgraphs, and a compute buffer that the subgraphs use in turn.

    It grows with what is asked of it and is never given back before `close`: freeing and asking again at every change
    from prompt to token costs time, and some drivers do not survive it (docs/log.md). Whenever `growths` has changed,
    everything that was placed before has lost its place.
    kinds: types of memory for the crossing tensors, the first that can be had; the compute buffer is of the last one.
    hint: for the error where memory does not suffice.
    """

    def __init__(self, where: str, kinds: Sequence[ggml.BufferTypeP], hint: str) -> None:
        self.where, self.growths = where, 0
        self._kinds, self._hint = kinds, hint
        self._handles, self._buffer = Handles(), ggml.BufferP()
        self._allocator = self._handles.add(ggml.ggml_gallocr_new(kinds[-1]), ggml.ggml_gallocr_free)

    def place(self, regions: Sequence[Sequence[ggml.TensorP]]) -> None:
        """Put crossing tensors into the buffer, those of one region at one address. Raises UserError where memory does
        not suffice.
        """
        if not regions:
            return
        sizes = [max(self._size(tensor) for tensor in region) for region in regions]
        alignment = max(_ALIGNMENT, *(gd.ggml_backend_buft_get_alignment(kind) for kind in self._kinds))
        ends = np.cumsum([-(-size // alignment) * alignment for size in sizes])
        self._make_room(int(ends[-1]) + alignment)
        base = gd.ggml_backend_buffer_get_base(self._buffer) or 0
        start = -(-base // alignment) * alignment
        for region, offset in zip(regions, (0, *ends[:-1].tolist()), strict=True):
            for tensor in region:
                status = ggml.ggml_backend_tensor_alloc(self._buffer, tensor, start + offset)
                assert status == ggml.STATUS_SUCCESS

    def _size(self, tensor: ggml.TensorP) -> int:
        given = ggml.ConstTensorP(tensor.value)
        return max(gd.ggml_backend_buft_get_alloc_size(kind, given) for kind in self._kinds)

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

    def allocate(self, graphs: Sequence[ggml.GraphP]) -> None:
        """Give the inner results of graphs their place in the compute buffer. Raises UserError where memory does not
        suffice.
        """
        before = self._compute_size
        # Once the buffer is large enough for the largest, it stays where it is.
        reserved = all(ggml.ggml_gallocr_reserve(self._allocator, graph) for graph in graphs)
        self.growths += self._compute_size != before
        if not reserved or not all(ggml.ggml_gallocr_alloc_graph(self._allocator, graph) for graph in graphs):
            self.growths += 1
            raise self._full("compute buffers")

    @property
    def _compute_size(self) -> int:
        return ggml.ggml_gallocr_get_buffer_size(self._allocator, 0)

    def _full(self, what: str) -> UserError:
        return UserError(f"{self.where}: not enough memory for {what}", self._hint)

    @property
    def size(self) -> int:
        """Bytes of both buffers."""
        return (ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0) + self._compute_size

    def close(self) -> None:
        """Free both buffers."""
        self._free_buffer()
        self._handles.close()


def device_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """A device's own memory."""
    return [gd.ggml_backend_dev_buffer_type(device)]


def host_kinds(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """Main memory that a device copies from and to by itself, where its driver offers such; else plain main memory."""
    pinned = gd.ggml_backend_dev_host_buffer_type(device)
    return [*([pinned] if pinned else []), *plain_kinds()]


def plain_kinds() -> list[ggml.BufferTypeP]:
    """Plain main memory."""
    return [ggml.ggml_backend_cpu_buffer_type()]
