"""Matrices in the layout that this CPU multiplies fastest: ggml's extra buffer types store weights otherwise than a
file does ("repacked").
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.base import worker
from runtime.base.closing import Closing, Handles
from runtime.base.figures import size as size_text
from runtime.bindings import ggml
from runtime.compute.weights import Weights, check_status, new_context
from runtime.errors import UserError

_AT_ONCE = 64  # matrices repacked before the load can be stopped

# Formats whose repacked product was measured to be faster, whatever the number of tokens. On x86 with AVX-512
# (docs/log.md, 2026-11-23) Q4_0 gains a factor of 2.2 with one token and 1.6 with many, IQ4_NL 1.7 and 1.6. ggml also
# repacks q4_K and q2_K: 1.1 with one token, but 0.5 and 0.3 with many.
GAINING = frozenset({ggml.TYPES["q4_0"], ggml.TYPES["iq4_nl"]})


def gains(type_id: int) -> bool:
    """Whether products with matrices of a format are worth repacking them for, where a buffer type can hold them."""
    return type_id in GAINING


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
    with Handles() as handles:
        context = handles.add(new_context(4), ggml.ggml_free)
        matrix = ggml.ggml_new_tensor_2d(context, type_id, *ne[:2])
        buffer = handles.add(
            ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind), ggml.ggml_backend_buffer_free
        )
        vector = ggml.ggml_new_tensor_1d(context, ggml.F32, ne[0])
        product = ggml.ggml_mul_mat(context, matrix, vector)
        # `extra` is what the buffer type does with the matrix: without it, `ggml_backend_tensor_set` would follow a
        # null pointer.
        return (
            bool(buffer)
            and bool(matrix.struct.extra)
            and ggml.ggml_backend_dev_supports_op(device, ggml.ConstTensorP(product.value))
        )


@dataclass(frozen=True)
class Fill:
    """One matrix to repack: the copy's name, and the mapped tensor that it comes from. release: whose file pages are
    not needed afterwards.
    """

    name: str
    source: str
    release: bool


class Repacked(Closing):
    """Copies of matrices in the buffer types where they multiply faster: `tensors`, by name. They hold nothing until an
    operation of `add_fill` has run.

    like: a tensor of the weights for each name; those that gain nothing are left out. Call `close`. Raises UserError
    where memory does not suffice.
    """

    def __init__(self, weights: Weights, backend: ggml.BackendP, like: Mapping[str, str]) -> None:
        self.tensors: dict[str, ggml.TensorP] = {}
        self._weights = weights
        self._buffers: list[ggml.BufferP] = []
        self._fills: list[tuple[Fill, ...]] = []  # an operation's userdata is its place here
        self._failed: Exception | None = None
        self._operator: Any = ggml.CUSTOM1_OP(self._run)
        device = ggml.ggml_backend_get_device(backend)
        left = {name: weights[source] for name, source in like.items() if gains(weights[source].type)}
        with Handles() as handles:
            for kind in extra_buffer_types(device):
                held = {key: holds(device, kind, *key) for key in {_format(t) for t in left.values()}}
                self._allocate(handles, kind, {name: t for name, t in left.items() if held[_format(t)]})
                left = {name: tensor for name, tensor in left.items() if name not in self.tensors}
            self._handles = handles.pop_all()

    def _allocate(self, handles: Handles, kind: ggml.BufferTypeP, like: Mapping[str, ggml.TensorP]) -> None:
        if not like:
            return
        context = handles.add(new_context(len(like)), ggml.ggml_free)
        made = {name: ggml.ggml_new_tensor_2d(context, t.type, *t.ne[:2]) for name, t in like.items()}
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            size = sum(ggml.ggml_nbytes(ggml.ConstTensorP(t.value)) for t in like.values())
            raise UserError(f"not enough memory for {size_text(size)} of repacked weights")
        self._buffers.append(handles.add(buffer, ggml.ggml_backend_buffer_free))
        self.tensors |= made

    def add_fill(self, ctx: ggml.ContextP, x: ggml.TensorP, fills: Sequence[Fill]) -> ggml.TensorP:
        """Add an operation that fills matrices, each by one thread; names that are not in `tensors` are passed over.

        Returns x, to be used by whatever must come after.
        """
        wanted = tuple(fill for fill in fills if fill.name in self.tensors)
        if wanted not in self._fills:
            self._fills.append(wanted)
        key = self._fills.index(wanted)
        address = ctypes.cast(self._operator, ctypes.c_void_p).value
        return ggml.ggml_map_custom1_inplace(ctx, x, address, ggml.N_TASKS_MAX, key)

    def _run(self, _dst: int, _x: int, ith: int, nth: int, key: int | None) -> None:
        try:
            for fill in self._fills[key or 0][ith::nth]:
                tensor = ggml.ConstTensorP(self.tensors[fill.name].value)
                ggml.ggml_backend_tensor_set(tensor, self._weights[fill.source].data, 0, ggml.ggml_nbytes(tensor))
                if fill.release:
                    self._weights.release(fill.source)
        except Exception as error:  # which cannot pass through native code
            self._failed = error

    def check(self) -> None:
        """After a graph with our operations: raise what went wrong in them."""
        error, self._failed = self._failed, None
        if error:
            raise error

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(ggml.ggml_backend_buffer_get_size(buffer) for buffer in self._buffers)

    def close(self) -> None:
        """Release the memory."""
        self._handles.close()
        self._buffers, self.tensors = [], {}
        self._operator = None  # it refers to this: Python would have to look for the circle


def _format(tensor: ggml.TensorP) -> tuple[int, tuple[int, ...]]:
    return tensor.type, tensor.ne[:2]


def repack(weights: Weights, backend: ggml.BackendP, names: Collection[str]) -> Repacked:
    """Copy those of the matrices that gain by it, and let `weights.matrix` give the copies; what they take in the
    file's mapping is released.

    The copies must outlive the weights' use. Raises UserError where memory does not suffice.
    """
    with Handles() as handles:
        copies = handles.enter_context(Repacked(weights, backend, {name: name for name in names}))
        _fill_now(copies, backend)
        handles.pop_all()
    weights.copies = copies.tensors
    return copies


def _fill_now(copies: Repacked, backend: ggml.BackendP) -> None:
    fills = [Fill(name, name, release=True) for name in copies.tensors]
    for at in range(0, len(fills), _AT_ONCE):
        worker.stop_if_unwanted()
        _fill(copies, backend, fills[at : at + _AT_ONCE])


def _fill(copies: Repacked, backend: ggml.BackendP, fills: Sequence[Fill]) -> None:
    # A graph of one operation, so that all of ggml's threads take part: fresh memory costs more time than the
    # repacking.
    with Handles() as handles:
        context = handles.add(new_context(4, ggml.ggml_graph_overhead_custom(4, False)), ggml.ggml_free)
        graph = ggml.ggml_new_graph_custom(context, 4, False)
        x = ggml.ggml_new_tensor_1d(context, ggml.F32, 1)
        ggml.ggml_build_forward_expand(graph, copies.add_fill(context, x, fills))
        handles.add(ggml.ggml_backend_alloc_ctx_tensors(context, backend), ggml.ggml_backend_buffer_free)
        check_status(ggml.ggml_backend_graph_compute(backend, graph), "the CPU")
        copies.check()
