"""A model's memory on devices: weights, keys and values, and where the CPU finds the rows that are left to it.

Knows ggml's buffers and a `Residence`; runtime/hybrid/schedule.py computes with what is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.base import worker
from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.compute.kv_cache import KvCache
from runtime.compute.weights import Tensors, Weights, new_context
from runtime.errors import UserError
from runtime.hybrid.device_queue import Stream
from runtime.hybrid.sides import Memory, device_kinds, host_kinds
from runtime.hybrid.tensor_map import Part, Residence
from runtime.model_file.structure import Structure

Sized = tuple[int, ...]


@dataclass(frozen=True)
class Cold:
    """The part of one block that the CPU computes: its rows, as a model of their own."""

    structure: Structure
    tensors: Tensors


class Hybrid(Closing):
    """What lies on devices, and views of the cold rows; `close` frees it, when the streams have ended what they do.

    Raises UserError where a device's memory does not suffice.
    """

    def __init__(
        self, weights: Weights, residence: Residence, streams: Sequence[Stream], n_cells: int, kv_type: int
    ) -> None:
        self.weights, self.residence, self.streams = weights, residence, streams
        self.tensors: list[Tensors] = []
        self._sizes: list[int] = []
        s = residence.structure
        with Handles() as handles:
            for d in range(len(streams)):
                self._place(handles, d)
            lengths = {i: a.kv_length for i, a in s.attentions.items() if i >= residence.first}
            self.kv = handles.enter_context(KvCache(streams[0].backend, kv_type, lengths, n_cells))
            self.memories = [
                handles.enter_context(Memory(f"device {t.info.name}", device_kinds(t.info.handle))) for t in streams
            ]
            self.main_memory = handles.enter_context(Memory("main memory", host_kinds(streams[0].info.handle)))
            self._views = handles.add(new_context(16 * s.block_count), ggml.ggml_free)
            self.cold = {i: self._cold(i) for i in range(residence.first, s.block_count) if residence.cold(i)}
            for stream in streams:
                handles.callback(stream.settle)
            self._handles = handles.pop_all()

    def _place(self, handles: Handles, d: int) -> None:
        parts, stream = self.residence.parts(d), self.streams[d]
        context = handles.add(new_context(len(parts)), ggml.ggml_free)
        made = {p.name: ggml.ggml_new_tensor_2d(context, self.weights[p.name].type, *self._shape(p)) for p in parts}
        if parts:
            buffer = handles.add(allocate(context, stream, "weights"), ggml.ggml_backend_buffer_free)
            gd.ggml_backend_buffer_set_usage(buffer, gd.BUFFER_USAGE_WEIGHTS)
            self._sizes.append(ggml.ggml_backend_buffer_get_size(buffer))
        else:
            self._sizes.append(0)
        for part in parts:
            worker.stop_if_unwanted()
            ggml.ggml_set_name(made[part.name], part.name.encode())
            self._upload(part, made[part.name])
        self.tensors.append(Tensors(made))

    def _shape(self, p: Part) -> tuple[int, int]:
        ne = self.weights[p.name].ne[:2]
        if p.axis is None:
            return ne[0], ne[1]
        if p.axis == 0 or ne[1] == 1:
            return p.end - p.first, ne[1]
        return ne[0], p.end - p.first

    def _upload(self, p: Part, target: ggml.TensorP) -> None:
        source, size = self.weights[p.name], ggml.ggml_nbytes(ggml.ConstTensorP(target.value))
        if p.axis == 0:
            row = source.nb[1]
            first, end = (ggml.ggml_row_size(source.type, n) for n in (p.first, p.end))
            mapped = np.ctypeslib.as_array((ctypes.c_uint8 * (row * source.ne[1])).from_address(source.data))
            columns = np.ascontiguousarray(mapped.reshape(-1, row)[:, first:end])
            ggml.ggml_backend_tensor_set(target, columns.ctypes.data, 0, size)
        else:
            offset = 0 if p.axis is None else p.first * (source.nb[1] if source.ne[1] > 1 else source.nb[0])
            ggml.ggml_backend_tensor_set(target, source.data + offset, 0, size)
        # What is on the device need not stay in main memory; the CPU reads its rows again when it needs them.
        self.weights.release(p.name)

    def _cold(self, i: int) -> Cold:
        views = {p.name: self._view(p) for p in self.residence.cold_parts(i)}
        return Cold(self.residence.cold_structure(i), Tensors(views))

    def _view(self, p: Part) -> ggml.TensorP:
        source = self.weights[p.name]
        vector = source.ne[1] == 1
        step = ggml.ggml_row_size(source.type, p.first) if p.axis == 0 or vector else p.first * source.nb[1]
        return ggml.ggml_view_2d(self._views, source, *self._shape(p), source.nb[1], step)

    @property
    def sizes(self) -> Sized:
        """Bytes on each device: weights, keys and values, hidden states, compute buffers."""
        kept = (self._sizes[0] + self.kv.nbytes, *self._sizes[1:])
        return tuple(n + memory.size for n, memory in zip(kept, self.memories, strict=True))

    @property
    def growths(self) -> int:
        """Changes whenever subgraphs that were made before have lost their memory."""
        return sum(memory.growths for memory in (*self.memories, self.main_memory))

    def close(self) -> None:
        """Free everything but the mapped weights."""
        self._handles.close()


def allocate(context: ggml.ContextP, stream: Stream, what: str) -> ggml.BufferP:
    """Memory on a device for all tensors of a context. Raises UserError where it does not suffice."""
    kind = gd.ggml_backend_dev_buffer_type(stream.info.handle)
    size = _size(context)
    buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
    if not buffer:
        raise out_of_memory(stream, f"{size / 2**20:.1f} MiB of {what}")
    return buffer


def out_of_memory(stream: Stream, what: str) -> UserError:
    """The error of a device whose memory does not suffice for something."""
    return UserError(
        f"device {stream.info.name}: not enough memory for {what}", "use a smaller --vram-budget or --n-ctx"
    )


def _size(context: ggml.ContextP) -> int:
    total, tensor = 0, ggml.ggml_get_first_tensor(context)
    while tensor:
        total += ggml.ggml_nbytes(ggml.ConstTensorP(tensor.value))
        tensor = ggml.ggml_get_next_tensor(context, tensor)
    return total
