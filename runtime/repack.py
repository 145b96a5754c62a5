"""Matrices in the layout that this CPU multiplies fastest: ggml's extra buffer types store weights otherwise than a file does ("repacked").

Knows which formats gain by it; knows nothing of what a matrix is for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping
from typing import Any

from runtime import ggml
from runtime.errors import UserError
from runtime.weights import Weights, new_context

# Formats whose repacked product was measured to be faster, whatever the number of tokens. On x86 with AVX-512 (docs/log.md, 2026-11-23) Q4_0 gains a factor of 2.2 with one token
# and 1.6 with many, IQ4_NL 1.7 and 1.6. ggml also repacks q4_K and q2_K: 1.1 with one token, but 0.5 and 0.3 with many.
GAINING = frozenset({ggml.TYPES["q4_0"], ggml.TYPES["iq4_nl"]})


def extra_buffer_types(device: ggml.DeviceP) -> list[ggml.BufferTypeP]:
    """The device's buffer types in which weights are stored otherwise than in a file, the preferred one first."""
    registry = ggml.ggml_backend_dev_backend_reg(device)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    found: Any = ggml.GET_EXTRA_BUFTS(address)(ctypes.c_void_p(device.value))
    kinds: list[ggml.BufferTypeP] = []
    while found and found[len(kinds)]:
        kinds.append(ggml.BufferTypeP(found[len(kinds)]))
    return kinds


def holds(device: ggml.DeviceP, kind: ggml.BufferTypeP, type_id: int, ne: tuple[int, ...]) -> bool:
    """Whether a buffer type can hold a matrix [ne0, ne1] and the device multiply with it from there."""
    context = new_context(4)
    matrix = ggml.ggml_new_tensor_2d(context, type_id, *ne[:2])
    buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
    vector = ggml.ggml_new_tensor_1d(context, ggml.F32, ne[0])
    product = ggml.ggml_mul_mat(context, matrix, vector)
    # `extra` is what the buffer type does with the matrix: without it, `ggml_backend_tensor_set` would follow a null pointer.
    answer = (
        bool(buffer)
        and bool(matrix.struct.extra)
        and ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(product.value))
    )
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_free(context)
    return answer


class Repacked:
    """Tensors shaped like `like`, by name, in the buffer types where they multiply faster; those that gain nothing are left out.

    They hold nothing until `fill`. Call `close`. Raises UserError where memory does not suffice.
    """

    def __init__(self, backend: ggml.BackendP, like: Mapping[str, ggml.TensorP]) -> None:
        self.tensors: dict[str, ggml.TensorP] = {}
        self._owned: list[tuple[ggml.ContextP, ggml.BufferP]] = []
        device = ggml.ggml_backend_get_device(backend)
        left = {name: tensor for name, tensor in like.items() if tensor.type in GAINING}
        for kind in extra_buffer_types(device):
            held = {key: holds(device, kind, *key) for key in {_format(t) for t in left.values()}}
            self._allocate(kind, {name: tensor for name, tensor in left.items() if held[_format(tensor)]})
            left = {name: tensor for name, tensor in left.items() if name not in self.tensors}

    def _allocate(self, kind: ggml.BufferTypeP, like: Mapping[str, ggml.TensorP]) -> None:
        if not like:
            return
        context = new_context(len(like))
        made = {name: ggml.ggml_new_tensor_2d(context, t.type, *t.ne[:2]) for name, t in like.items()}
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            ggml.ggml_free(context)
            self.close()
            size = sum(ggml.ggml_nbytes(ggml.ConstTensorP(t.value)) for t in like.values())
            raise UserError(f"not enough memory for {size / 1e9:.1f} GB of repacked weights")
        self._owned.append((context, buffer))
        self.tensors |= made

    def fill(self, name: str, address: int) -> None:
        """Repack the matrix `name` from its bytes at `address`, laid out as in a file. Different matrices may be filled by different threads."""
        tensor = self.tensors[name]
        ggml.ggml_backend_tensor_set(tensor, address, 0, ggml.ggml_nbytes(ggml.ConstTensorP(tensor.value)))

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(ggml.ggml_backend_buffer_get_size(buffer) for _, buffer in self._owned)

    def close(self) -> None:
        """Release the memory."""
        for context, buffer in self._owned:
            ggml.ggml_backend_buffer_free(buffer)
            ggml.ggml_free(context)
        self._owned, self.tensors = [], {}


def _format(tensor: ggml.TensorP) -> tuple[int, tuple[int, ...]]:
    return tensor.type, tensor.ne[:2]


def repack(weights: Weights, backend: ggml.BackendP, names: Collection[str]) -> Repacked:
    """Copy those of the matrices that gain by it, and let `weights.matrix` give the copies; what they take in the file's mapping is released.

    The copies must outlive the weights' use. Raises UserError where memory does not suffice.
    """
    copies = Repacked(backend, {name: weights[name] for name in names})
    for name in copies.tensors:
        copies.fill(name, weights[name].data)
        weights.release(name)
    weights.copies = copies.tensors
    return copies
