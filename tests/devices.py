"""One product on a device of ggml. As a command: prints the devices, and fails unless one is a GPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml, logs
from runtime.bindings import ggml_devices as gd
from runtime.cli.program import run_command
from runtime.compute.weights import new_context
from runtime.errors import UserError
from runtime.hybrid.devices import DeviceInfo, devices

Array = npt.NDArray[Any]


def gpu() -> DeviceInfo:
    """The first device of type GPU.

    Raises UserError where there is none.
    """
    listed = devices()
    for info in listed:
        if info.kind == "GPU":
            return info
    found = ", ".join(f"{d.name} ({d.kind})" for d in listed)
    raise UserError(
        f"devices of ggml: found {found or 'none'}, expected one of type GPU",
        "`make test-vulkan` sets up software Vulkan as one",
    )


def product(device: DeviceInfo, weights: Array, x: Array) -> Array:
    """x @ weights.T, computed on the device in F32: weights [n_out, n_in], x [n_tokens, n_in] -> [n_tokens, n_out]."""
    weights, x = np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(x, np.float32)
    y = np.empty((len(x), len(weights)), np.float32)
    ctx = new_context(3, ggml.ggml_graph_overhead_custom(8, False))
    tensors = [ggml.ggml_new_tensor_2d(ctx, ggml.F32, *a.shape[::-1]) for a in (weights, x)]
    result = ggml.ggml_mul_mat(ctx, *tensors)
    graph = ggml.ggml_new_graph_custom(ctx, 8, False)
    ggml.ggml_build_forward_expand(graph, result)
    backend = gd.ggml_backend_dev_init(device.handle, None)
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
    for info in devices():
        print(f"{info.name}: {info.kind}, {info.description}")


if __name__ == "__main__":
    sys.exit(run_command(_list_devices))
