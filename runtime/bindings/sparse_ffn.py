"""The native library: finds it, checks that it fits the installed ggml, and describes one FFN to its operators.

The layouts of `Rows` and `Ffn` are those of runtime/native/lazyneuron.h, which explains their fields.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.bindings.ffn_shape import ACTIVATIONS, FfnShape
from runtime.errors import UserError

MAX_RANGES = 64  # that one token scans: LZN_MAX_RANGES
FEW_TOKENS = 16  # for which `gate` and `down` are, and each token has the same bits as alone: LZN_FEW_TOKENS
_FILE = {"win32": "lazyneuron.dll", "darwin": "liblazyneuron.dylib"}.get(sys.platform, "liblazyneuron.so")
VARIANTS = ("portable", "avx2", "avxvnni", "avx512", "neon", "i8mm")
OPERATORS = ("predict", "predict_sign", "choose", "quantize", "gate", "down", "tokens", "reduce")
PRODUCTS = ("multiply", "tiles_arrange", "tiles_multiply", "attend", "fetch_rows")


_CACHE_LINE = 64
_SIZES = {"lzn_predict_size": (ctypes.c_int64,), "lzn_gate_size": (ctypes.c_int64,), "lzn_down_size": (ctypes.c_int64,)}


class Rows(ctypes.Structure):
    """`struct lzn_rows`: how to read rows of one weight type."""

    _fields_ = [
        ("row_size", ctypes.c_size_t),
        ("stride", ctypes.c_size_t),
        ("x_size", ctypes.c_size_t),
        ("arranged_size", ctypes.c_size_t),
        ("x_offset", ctypes.c_size_t),
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("to_float", ctypes.c_void_p),
        ("kernels", ctypes.c_void_p),
    ]


class Ffn(ctypes.Structure):
    """`struct lzn_ffn`: one FFN, the userdata of its operators. See `count` for what they count."""

    fired: npt.NDArray[np.int32]  # [n_tokens], neurons whose up and down rows the last run read
    gates: npt.NDArray[np.int32]  # [n_tokens], neurons whose gate rows it read
    table: npt.NDArray[np.int32]  # what `ranges` points to
    choices: npt.NDArray[np.int64]  # what `chosen` points to

    _fields_ = [
        ("n_embd", ctypes.c_int32),
        ("n_ff", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("gate_bias", ctypes.c_int32),
        ("up_bias", ctypes.c_int32),
        ("scored", ctypes.c_int32),
        ("predicted", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shift", ctypes.c_float),
        ("threshold", ctypes.c_float),
        ("squares", ctypes.c_int32),
        ("n_ranges", ctypes.c_int32),
        ("x_stride", ctypes.c_size_t),
        ("gate", Rows),
        ("up", Rows),
        ("down", Rows),
        ("predictor", Rows),
        ("ranges", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
    ]


class Product(ctypes.Structure):
    """`struct lzn_product`: one matrix that tokens are multiplied with, the userdata of its operator."""

    _fields_ = [
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("rows", Rows),
    ]


class Tiles(ctypes.Structure):
    """`struct lzn_tiles`: one matrix that many tokens are multiplied with, the userdata of its operators."""

    _fields_ = [
        ("n_in", ctypes.c_int32),
        ("n_out", ctypes.c_int32),
        ("stride", ctypes.c_size_t),
        ("block_size", ctypes.c_size_t),
        ("kernels", ctypes.c_void_p),
    ]


class Attention(ctypes.Structure):
    """`struct lzn_attention`: the attention of a block, the userdata of its operator."""

    _fields_ = [
        ("head_length", ctypes.c_int32),
        ("n_heads", ctypes.c_int32),
        ("n_heads_kv", ctypes.c_int32),
        ("n_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("kernels", ctypes.c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The native library.

    Raises UserError when it is not built, or built against another ggml than the installed one.
    """
    path = _find()
    lib = ctypes.CDLL(str(path))
    lib.lzn_ggml_version.restype = ctypes.c_char_p
    _check(lib, path)
    lib.lzn_kernels.restype = lib.lzn_tile_kernels.restype = lib.lzn_attention_kernels.restype = ctypes.c_void_p
    lib.lzn_has_variant.restype = ctypes.c_bool
    lib.lzn_arranged_size.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.lzn_arranged_size.restype = ctypes.c_size_t
    lib.lzn_product_size.argtypes = [ctypes.POINTER(Product), ctypes.c_int64]
    lib.lzn_product_size.restype = ctypes.c_size_t
    lib.lzn_attention_size.argtypes = [ctypes.POINTER(Attention), ctypes.c_int64]
    lib.lzn_attention_size.restype = ctypes.c_size_t
    lib.lzn_tiles_size.argtypes = [ctypes.POINTER(Tiles), ctypes.c_int64]
    lib.lzn_tiles_size.restype = ctypes.c_size_t
    lib.lzn_tokens_alone.argtypes = [ctypes.POINTER(Ffn), ctypes.c_int64]
    lib.lzn_tokens_alone.restype = ctypes.c_bool
    for name, arguments in _SIZES.items():
        getattr(lib, name).argtypes = [ctypes.POINTER(Ffn), *arguments]
        getattr(lib, name).restype = ctypes.c_size_t
    return lib


def _find() -> Path:
    if override := os.environ.get("LAZYNEURON_LIBRARY"):
        return Path(override)
    beside = Path(__file__).parent.parent / _FILE
    if beside.exists():
        return beside
    # A checkout that was installed with `pip install -e .`: the library lies where pip put it.
    try:
        installed = Path(str(importlib.metadata.distribution("lazyneuron").locate_file(f"runtime/{_FILE}")))
    except importlib.metadata.PackageNotFoundError:
        installed = beside
    if not installed.exists():
        raise UserError(f"`{installed}`: the native library is not built", "make setup, or pip install .")
    return installed


def _check(lib: ctypes.CDLL, path: Path) -> None:
    built, found = lib.lzn_ggml_version().decode(), ggml.ggml_version().decode()
    if built != found:
        raise UserError(
            f"`{path}`: built for ggml {built}, found ggml {found} in llama-cpp-python",
            "reinstall lazyneuron: it pins the version that fits",
        )
    shared = {"tensor": ggml.ggml_tensor, "ffn": Ffn, "product": Product, "tiles": Tiles, "attention": Attention}
    if any(_size_in(lib, name) != ctypes.sizeof(kind) for name, kind in shared.items()):
        raise UserError(
            f"`{path}`: struct sizes differ from those of this version of lazyneuron", "rebuild it: make setup"
        )


def _size_in(lib: ctypes.CDLL, struct: str) -> int:
    """Bytes of a struct in the library; 0 in one that does not know it."""
    function = getattr(lib, f"lzn_sizeof_{struct}", None)
    if function is None:
        return 0
    function.restype = ctypes.c_size_t
    return int(function())


@functools.cache
def operator(name: str) -> int:
    """Address of the operator `name`, one of OPERATORS, or of those of whole matrices."""
    symbol = f"lzn_{name}" if name in PRODUCTS else f"lzn_ffn_{name}"
    address = ctypes.cast(getattr(library(), symbol), ctypes.c_void_p).value
    assert address
    return address


def exit_on_abort() -> None:
    """From now on, the process ends with one line and status 1 when ggml gives up.

    For programs, not for libraries: it changes the whole process.
    """
    gd.ggml_set_abort_callback(ctypes.cast(library().lzn_on_abort, ctypes.c_void_p).value)
    library().lzn_guard()


def variants() -> list[str]:
    """The variants of the kernels that this CPU can run, the fastest last."""
    return [v for i, v in enumerate(VARIANTS) if library().lzn_has_variant(i)]


def variant() -> int:
    """Index in VARIANTS of the kernels to use: the fastest that this CPU has, or the one that LAZYNEURON_KERNELS names.

    Raises UserError for an unknown name, or a variant that this CPU cannot run.
    """
    name = os.environ.get("LAZYNEURON_KERNELS")
    if not name:
        return int(library().lzn_best_variant())
    if name not in (usable := variants()):
        raise UserError(f"LAZYNEURON_KERNELS is `{name}`, expected one of {', '.join(usable)} on this CPU")
    return VARIANTS.index(name)


def describe(
    shape: FfnShape, types: tuple[int, int, int], n_threads: int, strides: tuple[int, int, int] = (0, 0, 0)
) -> Ffn:
    """One FFN whose gate, up and down_t rows have the ggml types `types`. strides: bytes from one row of each to the
    next; 0 where they follow each other.
    """
    gate, up, down = (_rows(t, shape.n_embd, stride) for t, stride in zip(types, strides, strict=True))
    gate_x, up_x = gate.arranged_size + gate.x_size, up.arranged_size + up.x_size
    up.x_offset = 0 if types[0] == types[1] or not shape.gated else _aligned(gate_x)
    return Ffn(
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        n_threads=n_threads,
        activation=ACTIVATIONS.index(shape.activation),
        gated=shape.gated,
        gate_bias=shape.bias,
        up_bias=shape.bias and shape.gated,
        squares=shape.sub_norm,
        threshold=shape.threshold,
        x_stride=_aligned(up.x_offset + max(up_x, gate_x)) + _CACHE_LINE,
        gate=gate,
        up=up,
        down=down,
    )


def count(ffn: Ffn, n_tokens: int) -> None:
    """Make room for what the operators count for each of `n_tokens`: every run writes `ffn.fired` and `ffn.gates`."""
    counts = np.zeros((2, n_tokens), np.int32)
    ffn.fired, ffn.gates = counts
    ffn.counts = counts.ctypes.data


def divide(ffn: Ffn, ranges: npt.ArrayLike, choices: npt.NDArray[np.int64] | None = None) -> None:
    """Let each token scan some ranges of the rows only.

    ranges: int [n, 2], the first row of each and the one behind its last; two equal ones are a range without rows.
    choices: int64 [n], to which every run adds how many tokens chose each.
    Raises ValueError for a range that ends before it begins, or has rows that the FFN does not have.
    """
    table = np.array(ranges, np.int32).reshape(-1, 2)
    if not len(table) or (table[:, 0] < 0).any() or (table[:, 0] > table[:, 1]).any() or table.max() > ffn.n_ff:
        raise ValueError(f"ranges of {ffn.n_ff} rows: {table.tolist()}")
    ffn.table = table
    ffn.n_ranges, ffn.ranges = len(table), table.ctypes.data
    if choices is not None:
        if choices.shape != (len(table),) or choices.dtype != np.int64:
            raise ValueError(f"choices {choices.dtype} {choices.shape} of {len(table)} ranges")
        ffn.choices, ffn.chosen = choices, choices.ctypes.data


def predict(ffn: Ffn, rank: int, type_id: int | None, shift: float) -> None:
    """Add a predictor to the description: rows of `rank` elements of a ggml type, or sign bits where it is None."""
    ffn.predicted, ffn.rank, ffn.shift = True, rank, shift
    if type_id is not None:
        ffn.predictor = _rows(type_id, rank)
    else:
        ffn.predictor.kernels = library().lzn_kernels(ggml.I8, variant())


def choose(ffn: Ffn, shift: float) -> None:
    """Let the description take its candidates from scores that are given."""
    ffn.predicted, ffn.rank, ffn.shift = True, 0, shift


def predict_size(ffn: Ffn, n_tokens: int) -> int:
    """Bytes of the `predict` operators' result."""
    return int(library().lzn_predict_size(ctypes.byref(ffn), n_tokens))


def gate_size(ffn: Ffn, n_tokens: int) -> int:
    """Bytes of the `gate` operator's result, for at most FEW_TOKENS."""
    return int(library().lzn_gate_size(ctypes.byref(ffn), n_tokens))


def down_size(ffn: Ffn, n_tokens: int) -> int:
    """Bytes of the result of `down`, or of `tokens` where there are more than FEW_TOKENS."""
    return int(library().lzn_down_size(ctypes.byref(ffn), n_tokens))


def tokens_alone(ffn: Ffn, n_tokens: int) -> bool:
    """Whether the result of `tokens` begins with the product itself: then nothing is left to `reduce`."""
    return bool(library().lzn_tokens_alone(ctypes.byref(ffn), n_tokens))


def multiplier(type_id: int, n_in: int, n_out: int, n_threads: int) -> Product:
    """The description of a matrix of a ggml type, n_out rows of n_in elements."""
    return Product(n_in=n_in, n_out=n_out, n_threads=n_threads, rows=_rows(type_id, n_in))


def product_size(product: Product, n_tokens: int) -> int:
    """Bytes of the result of `multiply`, with its scratch."""
    return int(library().lzn_product_size(ctypes.byref(product), n_tokens))


def tiles(type_id: int, n_in: int, n_out: int, stride: int = 0) -> Tiles | None:
    """The description of the same for many tokens; None where the kernels have nothing for it. It is never freed.

    stride: bytes from one row to the next; 0 where they follow each other.
    """
    return _tiles(type_id, n_in, n_out, stride, variant())


@functools.cache
def _tiles(type_id: int, n_in: int, n_out: int, stride: int, of_variant: int) -> Tiles | None:
    block = ggml.ggml_blck_size(type_id)
    kernels = None if n_in % 32 or block != 32 else library().lzn_tile_kernels(type_id, of_variant)
    if not kernels:
        return None
    step, part = stride or ggml.ggml_row_size(type_id, n_in), ggml.ggml_row_size(type_id, block)
    return Tiles(n_in=n_in, n_out=n_out, stride=step, block_size=part, kernels=kernels)


def tiles_size(matrix: Tiles, n_tokens: int) -> int:
    """Bytes of the result of `tiles_arrange`."""
    return int(library().lzn_tiles_size(ctypes.byref(matrix), n_tokens))


def attention(heads: tuple[int, int, int], scale: float, n_threads: int) -> Attention | None:
    """The description of an attention over keys and values in F16; None where the kernels have nothing for it.

    heads: their length, the number of queries' heads and of keys' heads. scale: of the scores.
    """
    length, n, n_kv = heads
    kernels = library().lzn_attention_kernels(variant())
    if not kernels or length % 16:
        return None
    return Attention(head_length=length, n_heads=n, n_heads_kv=n_kv, n_threads=n_threads, scale=scale, kernels=kernels)


def attention_size(shape: Attention, n_tokens: int) -> int:
    """Bytes of the result of `attend`, with its scratch."""
    return int(library().lzn_attention_size(ctypes.byref(shape), n_tokens))


def _rows(type_id: int, n_embd: int, stride: int = 0) -> Rows:
    traits, cpu = ggml.ggml_get_type_traits(type_id).contents, ggml.ggml_get_type_traits_cpu(type_id).contents
    x_type = cpu.vec_dot_type
    # F32 rows are read as they are: ggml gives them no to_float.
    to_float = traits.to_float or ggml.ggml_get_type_traits_cpu(ggml.F32).contents.from_float
    # Our loops take rows by 32 elements.
    kernels = None if n_embd % 32 else library().lzn_kernels(type_id, variant())
    size = ggml.ggml_row_size(type_id, n_embd)
    return Rows(
        row_size=size,
        stride=stride or size,
        x_size=ggml.ggml_row_size(x_type, n_embd),
        arranged_size=library().lzn_arranged_size(kernels, n_embd),
        from_float=ggml.ggml_get_type_traits_cpu(x_type).contents.from_float,
        vec_dot=cpu.vec_dot,
        to_float=to_float,
        kernels=kernels,
    )


def _aligned(size: int) -> int:
    return (size + _CACHE_LINE - 1) // _CACHE_LINE * _CACHE_LINE


def address_of(ffn: Ffn | Product | Tiles | Attention) -> int:
    """Where the description lies; valid while `ffn` lives."""
    return ctypes.addressof(ffn)
