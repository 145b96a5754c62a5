"""The devices that ggml lists, and one product on one of them.

Declares the few functions for this that the runtime does not. As a command: prints the devices, and fails unless one is a GPU.
No `from __future__ import annotations` here: the annotations are read when a stub is first called.
"""

import ctypes
import sys
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

from runtime import ggml, logs
from runtime.errors import UserError, run_command
from runtime.ffi import GGML, GGML_BASE, C, CharP, SizeT, stub
from runtime.weights import new_context

Array = npt.NDArray[Any]

TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")  # enum ggml_backend_dev_type


class ggml_backend_dev_caps(ctypes.Structure):  # noqa: N801
    _fields_ = [
        ("async", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    ]


class ggml_backend_dev_props(ctypes.Structure):  # noqa: N801
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ggml_backend_dev_caps),
    ]


DevPropsP = Annotated[
    "ctypes._Pointer[ggml_backend_dev_props]",
    C(ctypes.POINTER(ggml_backend_dev_props), "struct ggml_backend_dev_props *"),
]


@stub(GGML)
def ggml_backend_dev_count() -> SizeT: ...
@stub(GGML)
def ggml_backend_dev_get(index: SizeT) -> ggml.DeviceP: ...
@stub(GGML)
def ggml_backend_init_by_name(name: CharP, params: CharP) -> ggml.BackendP: ...
@stub(GGML_BASE)
def ggml_backend_dev_get_props(device: ggml.DeviceP, props: DevPropsP) -> None: ...


def devices() -> list[ggml_backend_dev_props]:
    """The properties of all devices, in ggml's order."""
    listed = []
    for i in range(ggml_backend_dev_count()):
        props = ggml_backend_dev_props()
        ggml_backend_dev_get_props(ggml_backend_dev_get(i), ctypes.pointer(props))
        listed.append(props)
    return listed


def gpu() -> ggml_backend_dev_props:
    """The first device of type GPU.

    Raises UserError where there is none.
    """
    listed = devices()
    for props in listed:
        if TYPES[props.type] == "GPU":
            return props
    found = ", ".join(f"{p.name.decode()} ({TYPES[p.type]})" for p in listed)
    raise UserError(
        f"devices of ggml: found {found or 'none'}, expected one of type GPU",
        "`make test-vulkan` sets up software Vulkan as one",
    )


def product(device: str, weights: Array, x: Array) -> Array:
    """x @ weights.T, computed on the device in F32: weights [n_out, n_in], x [n_tokens, n_in] -> [n_tokens, n_out]."""
    weights, x = np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(x, np.float32)
    y = np.empty((len(x), len(weights)), np.float32)
    ctx = new_context(3, ggml.ggml_graph_overhead_custom(8, False))
    tensors = [ggml.ggml_new_tensor_2d(ctx, ggml.F32, *a.shape[::-1]) for a in (weights, x)]
    result = ggml.ggml_mul_mat(ctx, *tensors)
    graph = ggml.ggml_new_graph_custom(ctx, 8, False)
    ggml.ggml_build_forward_expand(graph, result)
    backend = ggml_backend_init_by_name(device.encode(), None)
    buffer = ggml.ggml_backend_alloc_ctx_tensors(ctx, backend)
    for tensor, array in zip(tensors, (weights, x), strict=True):
        ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
    assert ggml.ggml_backend_graph_compute(backend, graph) == ggml.STATUS_SUCCESS
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(result.value), y.ctypes.data, 0, y.nbytes)
    ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_backend_free(backend)
    ggml.ggml_free(ctx)
    return y


def _list_devices() -> None:
    logs.silence()
    gpu()
    for props in devices():
        print(f"{props.name.decode()}: {TYPES[props.type]}, {props.description.decode()}")


if __name__ == "__main__":
    sys.exit(run_command(_list_devices))
