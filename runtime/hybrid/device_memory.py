"""Tensors of a model file, or some of their neurons, in a device's memory; and views of some of their neurons in the
mapped file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.base import worker
from runtime.base.closing import Handles
from runtime.base.figures import memory
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.compute.weights import Tensors, Weights, new_context
from runtime.errors import UserError
from runtime.hybrid.memory import SMALLER
from runtime.hybrid.queues import Queue
from runtime.hybrid.tensor_map import Slice


@dataclass(frozen=True)
class Made:
    """A small matrix that is in no file. values: F32, in numpy's order of dimensions."""

    name: str
    values: npt.NDArray[np.float32]


def copied(
    handles: Handles, weights: Weights, queue: Queue, groups: Sequence[Sequence[Slice | Made]]
) -> tuple[list[Tensors], int]:
    """Copies of groups of slices and made matrices on a device, one `Tensors` for each group, and their bytes; freed
    with `handles`.

    Raises UserError where memory does not suffice.
    """
    context = handles.add(new_context(sum(map(len, groups))), ggml.ggml_free)
    made = [[(part, _like(context, weights, part)) for part in group] for group in groups]
    size = _allocated(handles, context, queue) if any(made) else 0
    for part, tensor in (pair for group in made for pair in group):
        worker.stop_if_unwanted()
        ggml.ggml_set_name(tensor, part.name.encode())
        if isinstance(part, Made):
            values = np.ascontiguousarray(part.values, np.float32)
            ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        else:
            _upload(weights, part, tensor)
    return [Tensors({part.name: tensor for part, tensor in group}) for group in made], size


def _like(context: ggml.ContextP, weights: Weights, part: Slice | Made) -> ggml.TensorP:
    if isinstance(part, Made):
        return ggml.ggml_new_tensor_2d(context, ggml.F32, *part.values.shape[::-1])
    source = weights[part.name]
    return ggml.ggml_new_tensor_3d(context, source.type, *_shape(source, part), len(_experts(source, part)))


def _experts(source: ggml.TensorP, part: Slice) -> Sequence[int]:
    """The experts of a slice; one where there are none."""
    return range(source.ne[2]) if part.experts is None else part.experts


def _shape(source: ggml.TensorP, part: Slice) -> tuple[int, int]:
    """Of a slice, or of its part of each expert."""
    ne = source.ne[:2]
    if part.axis is None:
        return ne[0], ne[1]
    if part.axis == 0 or ne[1] == 1:
        return part.end - part.first, ne[1]
    return ne[0], part.end - part.first


def _allocated(handles: Handles, context: ggml.ContextP, queue: Queue) -> int:
    """Give all tensors of a context memory on a device: its bytes."""
    kind = gd.ggml_backend_dev_buffer_type(queue.device)
    asked = _bytes_of(context)
    buffer = handles.add(ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind), ggml.ggml_backend_buffer_free)
    if not buffer:
        raise UserError(f"{queue.where}: not enough memory for {memory(asked)} of weights", SMALLER)
    gd.ggml_backend_buffer_set_usage(buffer, gd.BUFFER_USAGE_WEIGHTS)
    return ggml.ggml_backend_buffer_get_size(buffer)


def _bytes_of(context: ggml.ContextP) -> int:
    total, tensor = 0, ggml.ggml_get_first_tensor(context)
    while tensor:
        total += ggml.ggml_nbytes(ggml.ConstTensorP(tensor.value))
        tensor = ggml.ggml_get_next_tensor(context, tensor)
    return total


def _upload(weights: Weights, part: Slice, target: ggml.TensorP) -> None:
    source, size = weights[part.name], ggml.ggml_nbytes(ggml.ConstTensorP(target.value))
    data = weights.in_file(part.name)  # what is held in memory has only the CPU's part
    experts = _experts(source, part)
    if part.axis == 0:
        row = source.nb[1]
        first, end = (ggml.ggml_row_size(source.type, n) for n in (part.first, part.end))
        mapped = np.ctypeslib.as_array((ctypes.c_uint8 * (row * source.ne[1] * source.ne[2])).from_address(data))
        columns = np.ascontiguousarray(mapped.reshape(source.ne[2], -1, row)[list(experts), :, first:end])
        ggml.ggml_backend_tensor_set(target, columns.ctypes.data, 0, size)
    else:
        offset = 0 if part.axis is None else part.first * (source.nb[1] if source.ne[1] > 1 else source.nb[0])
        each = size // len(experts)
        for at, e in enumerate(experts):
            ggml.ggml_backend_tensor_set(target, data + offset + e * source.nb[2], at * each, each)
    # What is on the device need not stay in main memory; the CPU reads its rows again when it needs them.
    weights.release(part.name)


def viewed(context: ggml.ContextP, weights: Weights, parts: Sequence[Slice]) -> Tensors:
    """Slices as views of the mapped file. They must not outlive the context, nor the weights."""
    return Tensors({part.name: _view(context, weights[part.name], part) for part in parts})


def _view(context: ggml.ContextP, source: ggml.TensorP, part: Slice) -> ggml.TensorP:
    elements = part.axis == 0 or source.ne[1] == 1
    step = ggml.ggml_row_size(source.type, part.first) if elements else part.first * source.nb[1]
    return ggml.ggml_view_2d(context, source, *_shape(source, part), source.nb[1], step)
