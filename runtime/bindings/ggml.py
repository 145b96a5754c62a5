"""ggml's C functions and structs as used here, each declared once: names, types and order as in the headers of the
pinned llama-cpp-python (a test compares them).

No `from __future__ import annotations` here: the annotations are read when a stub is first called.
"""

import ctypes
from typing import Annotated

from runtime.bindings.ffi import (
    GGML_BASE,
    GGML_CPU,
    Bool,
    C,
    CharP,
    ConstVoidP,
    Float,
    Handle,
    Int,
    Int64,
    SizeT,
    VoidP,
    stub,
)

GGML_MAX_DIMS = 4
GGML_MAX_SRC = 10
GGML_MAX_OP_PARAMS = 64
GGML_MAX_NAME = 64
GGML_MAX_N_THREADS = 512

# enum ggml_type
TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q8_1": 9,
    "q2_K": 10,
    "q3_K": 11,
    "q4_K": 12,
    "q5_K": 13,
    "q6_K": 14,
    "q8_K": 15,
    "iq4_nl": 20,
    "iq4_xs": 23,
    "i8": 24,
    "i32": 26,
    "i64": 27,
    "bf16": 30,
}
F32, F16, BF16 = TYPES["f32"], TYPES["f16"], TYPES["bf16"]
I8, I32, I64 = TYPES["i8"], TYPES["i32"], TYPES["i64"]
TYPE_COUNT = 43

N_TASKS_MAX = -1  # of a custom operation: as many as there are threads

# enum ggml_status
STATUS_SUCCESS = 0

# enum gguf_type -> (getter suffix); strings and arrays are read apart
GGUF_TYPE_STRING = 8
GGUF_TYPE_ARRAY = 9

# rope modes
ROPE_TYPE_NORMAL = 0
ROPE_TYPE_NEOX = 2

Type = Annotated[int, C(ctypes.c_int, "enum ggml_type")]
Status = Annotated[int, C(ctypes.c_int, "enum ggml_status")]
GgufType = Annotated[int, C(ctypes.c_int, "enum gguf_type")]
ConstFloatP = Annotated[int | None, C(ctypes.c_void_p, "const float *")]
ConstInt64P = Annotated["ctypes._Pointer[ctypes.c_int64]", C(ctypes.POINTER(ctypes.c_int64), "const int64_t *")]
Custom1Op = Annotated[int | None, C(ctypes.c_void_p, "ggml_custom1_op_t")]
Custom2Op = Annotated[int | None, C(ctypes.c_void_p, "ggml_custom2_op_t")]
CustomOp = Annotated[int | None, C(ctypes.c_void_p, "ggml_custom_op_t")]
TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)  # ggml_to_float_t
GET_EXTRA_BUFTS = ctypes.CFUNCTYPE(
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p
)  # ggml_backend_dev_get_extra_bufts_t
CUSTOM1_OP = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)  # ggml_custom1_op_t
LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
LogCallback = Annotated[object, C(LOG_CALLBACK, "ggml_log_callback")]
GGUF_READER = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
)  # userdata, output, offset, len
GgufReader = Annotated[object, C(GGUF_READER, "gguf_reader_callback_t")]


class ContextP(Handle):
    spelling = "struct ggml_context *"


class ThreadpoolP(Handle):
    spelling = "struct ggml_threadpool *"


class GraphP(Handle):
    spelling = "struct ggml_cgraph *"


class GgufP(Handle):
    spelling = "struct gguf_context *"


class ConstGgufP(Handle):
    spelling = "const struct gguf_context *"


class BackendP(Handle):
    spelling = "ggml_backend_t"


class DeviceP(Handle):
    spelling = "ggml_backend_dev_t"


class RegP(Handle):
    spelling = "ggml_backend_reg_t"


class BufferP(Handle):
    spelling = "ggml_backend_buffer_t"


class BufferTypeP(Handle):
    spelling = "ggml_backend_buffer_type_t"


class GallocrP(Handle):
    spelling = "ggml_gallocr_t"


class ggml_tensor(ctypes.Structure):
    pass


ggml_tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * GGML_MAX_DIMS),
    ("nb", ctypes.c_size_t * GGML_MAX_DIMS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * (GGML_MAX_OP_PARAMS // 4)),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(ggml_tensor) * GGML_MAX_SRC),
    ("view_src", ctypes.POINTER(ggml_tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * GGML_MAX_NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


class ggml_init_params(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


class gguf_init_params(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


class ggml_type_traits(ctypes.Structure):
    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


class ggml_type_traits_cpu(ctypes.Structure):
    _fields_ = [
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


class ggml_threadpool_params(ctypes.Structure):
    _fields_ = [
        ("cpumask", ctypes.c_bool * GGML_MAX_N_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


STRUCTS = (
    ggml_tensor,
    ggml_init_params,
    gguf_init_params,
    ggml_type_traits,
    ggml_type_traits_cpu,
    ggml_threadpool_params,
)

ThreadpoolParamsP = Annotated[
    ggml_threadpool_params, C(ctypes.POINTER(ggml_threadpool_params), "struct ggml_threadpool_params *")
]
TypeTraitsP = Annotated[
    "ctypes._Pointer[ggml_type_traits]", C(ctypes.POINTER(ggml_type_traits), "const struct ggml_type_traits *")
]
TypeTraitsCpuP = Annotated[
    "ctypes._Pointer[ggml_type_traits_cpu]",
    C(ctypes.POINTER(ggml_type_traits_cpu), "const struct ggml_type_traits_cpu *"),
]
InitParams = Annotated[ggml_init_params, C(ggml_init_params, "struct ggml_init_params")]
GgufInitParams = Annotated[gguf_init_params, C(gguf_init_params, "struct gguf_init_params")]


class TensorP(Handle):
    """A tensor; shapes are given in ggml's order, the contiguous dimension first."""

    spelling = "struct ggml_tensor *"

    @property
    def struct(self) -> ggml_tensor:
        assert self.value
        return ggml_tensor.from_address(self.value)

    @property
    def ne(self) -> tuple[int, ...]:
        """All four dimensions; unused ones are 1."""
        return tuple(self.struct.ne)

    @property
    def nb(self) -> tuple[int, ...]:
        """Strides in bytes."""
        return tuple(self.struct.nb)

    @property
    def type(self) -> int:
        return int(self.struct.type)

    @property
    def data(self) -> int:
        """Address of the data; 0 while unallocated."""
        return self.struct.data or 0


class ConstTensorP(TensorP):
    spelling = "const struct ggml_tensor *"


TensorPP = Annotated["ctypes.Array[TensorP]", C(ctypes.POINTER(TensorP), "struct ggml_tensor **")]


# --- library ---------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_version() -> CharP: ...
@stub(GGML_BASE)
def ggml_log_set(log_callback: LogCallback, user_data: VoidP) -> None: ...


# --- types -----------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_type_name(type: Type) -> CharP: ...
@stub(GGML_BASE)
def ggml_op_name(op: Annotated[int, C(ctypes.c_int, "enum ggml_op")]) -> CharP: ...
@stub(GGML_BASE)
def ggml_blck_size(type: Type) -> Int64: ...
@stub(GGML_BASE)
def ggml_row_size(type: Type, ne: Int64) -> SizeT: ...
@stub(GGML_BASE)
def ggml_get_type_traits(type: Type) -> TypeTraitsP: ...
@stub(GGML_CPU)
def ggml_get_type_traits_cpu(type: Type) -> TypeTraitsCpuP: ...
@stub(GGML_BASE)
def ggml_quantize_chunk(
    type: Type, src: ConstFloatP, dst: VoidP, start: Int64, nrows: Int64, n_per_row: Int64, imatrix: ConstFloatP
) -> SizeT: ...


# --- contexts and tensors --------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_init(params: InitParams) -> ContextP: ...
@stub(GGML_BASE)
def ggml_free(ctx: ContextP) -> None: ...
@stub(GGML_BASE)
def ggml_tensor_overhead() -> SizeT: ...
@stub(GGML_BASE)
def ggml_new_tensor_1d(ctx: ContextP, type: Type, ne0: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_new_tensor_3d(ctx: ContextP, type: Type, ne0: Int64, ne1: Int64, ne2: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_new_tensor_2d(ctx: ContextP, type: Type, ne0: Int64, ne1: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_set_name(tensor: TensorP, name: CharP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_set_input(tensor: TensorP) -> None: ...
@stub(GGML_BASE)
def ggml_set_output(tensor: TensorP) -> None: ...
@stub(GGML_BASE)
def ggml_nbytes(tensor: ConstTensorP) -> SizeT: ...
@stub(GGML_BASE)
def ggml_get_first_tensor(ctx: Annotated[ContextP, C(ContextP, "const struct ggml_context *")]) -> TensorP: ...
@stub(GGML_BASE)
def ggml_get_next_tensor(
    ctx: Annotated[ContextP, C(ContextP, "const struct ggml_context *")], tensor: TensorP
) -> TensorP: ...


# --- operators -------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_get_rows(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_set_rows(ctx: ContextP, a: TensorP, b: TensorP, c: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_mul_mat(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_mul_mat_id(ctx: ContextP, a: TensorP, b: TensorP, ids: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_add(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_mul(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_rms_norm(ctx: ContextP, a: TensorP, eps: Float) -> TensorP: ...
@stub(GGML_BASE)
def ggml_norm(ctx: ContextP, a: TensorP, eps: Float) -> TensorP: ...
@stub(GGML_BASE)
def ggml_relu(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_silu(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_ssm_conv(ctx: ContextP, sx: TensorP, c: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_ssm_scan(
    ctx: ContextP, s: TensorP, x: TensorP, dt: TensorP, a: TensorP, b: TensorP, c: TensorP, ids: TensorP, k: Int64
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_sqr(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_sqrt(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_tanh(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_sum_rows(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_div(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_clamp(ctx: ContextP, a: TensorP, min: Float, max: Float) -> TensorP: ...
@stub(GGML_BASE)
def ggml_sigmoid(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_soft_max(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_argsort_top_k(ctx: ContextP, a: TensorP, k: Int) -> TensorP: ...
@stub(GGML_BASE)
def ggml_concat(ctx: ContextP, a: TensorP, b: TensorP, dim: Int) -> TensorP: ...
@stub(GGML_BASE)
def ggml_step(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_scale_bias(ctx: ContextP, a: TensorP, s: Float, b: Float) -> TensorP: ...
@stub(GGML_BASE)
def ggml_reshape_2d(ctx: ContextP, a: TensorP, ne0: Int64, ne1: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_reshape_3d(ctx: ContextP, a: TensorP, ne0: Int64, ne1: Int64, ne2: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_reshape_4d(ctx: ContextP, a: TensorP, ne0: Int64, ne1: Int64, ne2: Int64, ne3: Int64) -> TensorP: ...
@stub(GGML_BASE)
def ggml_view_1d(ctx: ContextP, a: TensorP, ne0: Int64, offset: SizeT) -> TensorP: ...
@stub(GGML_BASE)
def ggml_view_4d(
    ctx: ContextP,
    a: TensorP,
    ne0: Int64,
    ne1: Int64,
    ne2: Int64,
    ne3: Int64,
    nb1: SizeT,
    nb2: SizeT,
    nb3: SizeT,
    offset: SizeT,
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_view_2d(ctx: ContextP, a: TensorP, ne0: Int64, ne1: Int64, nb1: SizeT, offset: SizeT) -> TensorP: ...
@stub(GGML_BASE)
def ggml_view_3d(
    ctx: ContextP, a: TensorP, ne0: Int64, ne1: Int64, ne2: Int64, nb1: SizeT, nb2: SizeT, offset: SizeT
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_permute(ctx: ContextP, a: TensorP, axis0: Int, axis1: Int, axis2: Int, axis3: Int) -> TensorP: ...
@stub(GGML_BASE)
def ggml_cont(ctx: ContextP, a: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_cpy(ctx: ContextP, a: TensorP, b: TensorP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_rope_ext(
    ctx: ContextP,
    a: TensorP,
    b: TensorP,
    c: TensorP,
    n_dims: Int,
    mode: Int,
    n_ctx_orig: Int,
    freq_base: Float,
    freq_scale: Float,
    ext_factor: Float,
    attn_factor: Float,
    beta_fast: Float,
    beta_slow: Float,
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_soft_max_ext(ctx: ContextP, a: TensorP, mask: TensorP, scale: Float, max_bias: Float) -> TensorP: ...
@stub(GGML_BASE)
def ggml_flash_attn_ext(
    ctx: ContextP,
    q: TensorP,
    k: TensorP,
    v: TensorP,
    mask: TensorP,
    scale: Float,
    max_bias: Float,
    logit_softcap: Float,
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_map_custom1_inplace(ctx: ContextP, a: TensorP, fun: Custom1Op, n_tasks: Int, userdata: VoidP) -> TensorP: ...
@stub(GGML_BASE)
def ggml_map_custom2_inplace(
    ctx: ContextP, a: TensorP, b: TensorP, fun: Custom2Op, n_tasks: Int, userdata: VoidP
) -> TensorP: ...
@stub(GGML_BASE)
def ggml_custom_4d(
    ctx: ContextP,
    type: Type,
    ne0: Int64,
    ne1: Int64,
    ne2: Int64,
    ne3: Int64,
    args: TensorPP,
    n_args: Int,
    fun: CustomOp,
    n_tasks: Int,
    userdata: VoidP,
) -> TensorP: ...


# --- graphs ----------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def ggml_graph_overhead_custom(size: SizeT, grads: Bool) -> SizeT: ...
@stub(GGML_BASE)
def ggml_new_graph_custom(ctx: ContextP, size: SizeT, grads: Bool) -> GraphP: ...
@stub(GGML_BASE)
def ggml_build_forward_expand(cgraph: GraphP, tensor: TensorP) -> None: ...
@stub(GGML_BASE)
def ggml_graph_n_nodes(cgraph: GraphP) -> Int: ...
@stub(GGML_BASE)
def ggml_graph_node(cgraph: GraphP, i: Int) -> TensorP: ...
@stub(GGML_BASE)
def ggml_gallocr_new(buft: BufferTypeP) -> GallocrP: ...
@stub(GGML_BASE)
def ggml_gallocr_free(galloc: GallocrP) -> None: ...
@stub(GGML_BASE)
def ggml_gallocr_reserve(galloc: GallocrP, graph: GraphP) -> Bool: ...
@stub(GGML_BASE)
def ggml_gallocr_alloc_graph(galloc: GallocrP, graph: GraphP) -> Bool: ...
@stub(GGML_BASE)
def ggml_gallocr_get_buffer_size(galloc: GallocrP, buffer_id: Int) -> SizeT: ...


# --- backends --------------------------------------------------------------------------------------------------------


@stub(GGML_CPU)
def ggml_backend_cpu_init() -> BackendP: ...
@stub(GGML_CPU)
def ggml_backend_cpu_set_n_threads(backend_cpu: BackendP, n_threads: Int) -> None: ...
@stub(GGML_CPU)
def ggml_backend_cpu_set_use_ref(backend_cpu: BackendP, use_ref: Bool) -> None: ...
@stub(GGML_CPU)
def ggml_backend_cpu_set_threadpool(backend_cpu: BackendP, threadpool: ThreadpoolP) -> None: ...
@stub(GGML_BASE)
def ggml_threadpool_params_default(n_threads: Int) -> ggml_threadpool_params: ...
@stub(GGML_CPU)
def ggml_threadpool_new(params: ThreadpoolParamsP) -> ThreadpoolP: ...
@stub(GGML_CPU)
def ggml_threadpool_free(threadpool: ThreadpoolP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_free(backend: BackendP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_get_device(backend: BackendP) -> DeviceP: ...
@stub(GGML_BASE)
def ggml_backend_dev_name(device: DeviceP) -> CharP: ...
@stub(GGML_BASE)
def ggml_backend_dev_backend_reg(device: DeviceP) -> RegP: ...
@stub(GGML_BASE)
def ggml_backend_reg_get_proc_address(reg: RegP, name: CharP) -> VoidP: ...
@stub(GGML_BASE)
def ggml_backend_dev_supports_op(device: DeviceP, op: ConstTensorP) -> Bool: ...
@stub(GGML_BASE)
def ggml_backend_graph_compute(backend: BackendP, cgraph: GraphP) -> Status: ...
@stub(GGML_BASE)
def ggml_backend_cpu_buffer_type() -> BufferTypeP: ...
@stub(GGML_BASE)
def ggml_backend_cpu_buffer_from_ptr(ptr: VoidP, size: SizeT) -> BufferP: ...
@stub(GGML_BASE)
def ggml_backend_buffer_free(buffer: BufferP) -> None: ...
@stub(GGML_BASE)
def ggml_backend_buffer_clear(buffer: BufferP, value: Annotated[int, C(ctypes.c_uint8, "uint8_t")]) -> None: ...
@stub(GGML_BASE)
def ggml_backend_buffer_get_size(buffer: BufferP) -> SizeT: ...
@stub(GGML_BASE)
def ggml_backend_alloc_ctx_tensors(ctx: ContextP, backend: BackendP) -> BufferP: ...
@stub(GGML_BASE)
def ggml_backend_alloc_ctx_tensors_from_buft(ctx: ContextP, buft: BufferTypeP) -> BufferP: ...
@stub(GGML_BASE)
def ggml_backend_tensor_alloc(buffer: BufferP, tensor: TensorP, addr: VoidP) -> Status: ...
@stub(GGML_BASE)
def ggml_backend_tensor_set(tensor: TensorP, data: ConstVoidP, offset: SizeT, size: SizeT) -> None: ...
@stub(GGML_BASE)
def ggml_backend_tensor_get(tensor: ConstTensorP, data: VoidP, offset: SizeT, size: SizeT) -> None: ...


# --- GGUF ------------------------------------------------------------------------------------------------------------


@stub(GGML_BASE)
def gguf_init_from_file(fname: CharP, params: GgufInitParams) -> GgufP: ...
@stub(GGML_BASE)
def gguf_init_from_callback(
    callback: GgufReader,
    userdata: VoidP,
    max_chunk_read: SizeT,
    max_expected_size: Annotated[int, C(ctypes.c_uint64, "uint64_t")],
    params: GgufInitParams,
) -> GgufP: ...
@stub(GGML_BASE)
def gguf_free(ctx: GgufP) -> None: ...
@stub(GGML_BASE)
def gguf_get_data_offset(ctx: ConstGgufP) -> SizeT: ...
@stub(GGML_BASE)
def gguf_get_n_kv(ctx: ConstGgufP) -> Int64: ...
@stub(GGML_BASE)
def gguf_get_key(ctx: ConstGgufP, key_id: Int64) -> CharP: ...
@stub(GGML_BASE)
def gguf_get_kv_type(ctx: ConstGgufP, key_id: Int64) -> GgufType: ...
@stub(GGML_BASE)
def gguf_get_arr_type(ctx: ConstGgufP, key_id: Int64) -> GgufType: ...
@stub(GGML_BASE)
def gguf_get_val_data(ctx: ConstGgufP, key_id: Int64) -> ConstVoidP: ...
@stub(GGML_BASE)
def gguf_get_val_str(ctx: ConstGgufP, key_id: Int64) -> CharP: ...
@stub(GGML_BASE)
def gguf_get_arr_n(ctx: ConstGgufP, key_id: Int64) -> SizeT: ...
@stub(GGML_BASE)
def gguf_get_arr_data(ctx: ConstGgufP, key_id: Int64) -> ConstVoidP: ...
@stub(GGML_BASE)
def gguf_get_arr_str(ctx: ConstGgufP, key_id: Int64, i: SizeT) -> CharP: ...
@stub(GGML_BASE)
def gguf_get_n_tensors(ctx: ConstGgufP) -> Int64: ...
@stub(GGML_BASE)
def gguf_get_tensor_name(ctx: ConstGgufP, tensor_id: Int64) -> CharP: ...
@stub(GGML_BASE)
def gguf_get_tensor_type(ctx: ConstGgufP, tensor_id: Int64) -> Type: ...
@stub(GGML_BASE)
def gguf_get_tensor_offset(ctx: ConstGgufP, tensor_id: Int64) -> SizeT: ...
@stub(GGML_BASE)
def gguf_get_tensor_size(ctx: ConstGgufP, tensor_id: Int64) -> SizeT: ...
@stub(GGML_BASE)
def gguf_get_tensor_ne(ctx: ConstGgufP, tensor_id: Int64) -> ConstInt64P: ...
