"""ggml's devices, their streams and events, as declared in ggml-backend.h (like `runtime.bindings.ggml`; a test
compares them with the headers).
"""

import ctypes
from typing import Annotated

from runtime.bindings.ffi import GGML, GGML_BASE, C, CharP, ConstVoidP, Handle, SizeT, VoidP, stub
from runtime.bindings.ggml import BackendP, BufferP, BufferTypeP, ConstTensorP, DeviceP, GraphP, RegP, Status, TensorP

# enum ggml_backend_dev_type
DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")
BUFFER_USAGE_WEIGHTS = 1

DevType = Annotated[int, C(ctypes.c_int, "enum ggml_backend_dev_type")]
Usage = Annotated[int, C(ctypes.c_int, "enum ggml_backend_buffer_usage")]
AbortCallback = Annotated[int | None, C(ctypes.c_void_p, "ggml_abort_callback_t")]


class EventP(Handle):
    spelling = "ggml_backend_event_t"


class ggml_backend_dev_caps(ctypes.Structure):
    _fields_ = [
        ("async", ctypes.c_bool),
        ("host_buffer", ctypes.c_bool),
        ("buffer_from_host_ptr", ctypes.c_bool),
        ("events", ctypes.c_bool),
        ("mmap_support", ctypes.c_bool),
    ]


class ggml_backend_dev_props(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("description", ctypes.c_char_p),
        ("memory_free", ctypes.c_size_t),
        ("memory_total", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("device_id", ctypes.c_char_p),
        ("caps", ggml_backend_dev_caps),
    ]


STRUCTS = (ggml_backend_dev_caps, ggml_backend_dev_props)

PropsP = Annotated[
    "ctypes._Pointer[ggml_backend_dev_props]",
    C(ctypes.POINTER(ggml_backend_dev_props), "struct ggml_backend_dev_props *"),
]


# --- devices ---------------------------------------------------------------------------------------------------------


@stub(GGML)
def ggml_backend_dev_count() -> SizeT: ...
@stub(GGML)
def ggml_backend_dev_get(index: SizeT) -> DeviceP: ...
@stub(GGML_BASE)
def ggml_backend_dev_get_props(device: DeviceP, props: PropsP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_reg_name(reg: RegP) -> CharP: ...
@stub(GGML_BASE)
def ggml_backend_dev_init(
    device: DeviceP, params: Annotated[bytes | None, C(ctypes.c_char_p, "const char *")]
) -> BackendP: ...
@stub(GGML_BASE)
def ggml_backend_dev_buffer_type(device: DeviceP) -> BufferTypeP: ...
@stub(GGML_BASE)
def ggml_backend_dev_host_buffer_type(device: DeviceP) -> BufferTypeP: ...
@stub(GGML_BASE)
def ggml_backend_buft_alloc_buffer(buft: BufferTypeP, size: SizeT) -> BufferP: ...
@stub(GGML_BASE)
def ggml_backend_buft_get_alignment(buft: BufferTypeP) -> SizeT: ...
@stub(GGML_BASE)
def ggml_backend_buft_get_alloc_size(buft: BufferTypeP, tensor: ConstTensorP) -> SizeT: ...
@stub(GGML_BASE)
def ggml_backend_buffer_get_base(buffer: BufferP) -> VoidP: ...
@stub(GGML_BASE)
def ggml_backend_buffer_set_usage(buffer: BufferP, usage: Usage) -> None: ...


# --- streams and events ----------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_backend_tensor_set_async(
    backend: BackendP, tensor: TensorP, data: ConstVoidP, offset: SizeT, size: SizeT
) -> None: ...
@stub(GGML_BASE)
def ggml_backend_tensor_get_async(
    backend: BackendP, tensor: ConstTensorP, data: VoidP, offset: SizeT, size: SizeT
) -> None: ...
@stub(GGML_BASE)
def ggml_backend_graph_compute_async(backend: BackendP, cgraph: GraphP) -> Status: ...
@stub(GGML_BASE)
def ggml_backend_synchronize(backend: BackendP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_event_new(device: DeviceP) -> EventP: ...
@stub(GGML_BASE)
def ggml_backend_event_free(event: EventP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_event_record(event: EventP, backend: BackendP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_event_synchronize(event: EventP) -> None: ...


# --- failure ---------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_set_abort_callback(callback: AbortCallback) -> AbortCallback: ...
