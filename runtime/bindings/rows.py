"""Rows of floats in ggml's number formats, and back: by ggml's own functions, so bit for bit what llama.cpp makes.

type_id: a number of enum ggml_type.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def pack(rows: Floats, type_id: int, importance: Floats | None = None) -> Bytes:
    """The bytes of rows [n, length] in a quantised format. `length` must be a whole number of blocks.

    importance: float32 [length], how much an error in each column matters.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    n, length = rows.shape
    packed = np.empty(n * ggml.ggml_row_size(type_id, length), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    address = None if weights is None else weights.ctypes.data
    ggml.ggml_quantize_chunk(type_id, rows.ctypes.data, packed.ctypes.data, 0, n, length, address)
    return packed


def unpack(data: Bytes, type_id: int, length: int) -> Floats:
    """The numbers of packed rows, float32 [n, length]."""
    data = np.ascontiguousarray(data)
    out = np.empty((data.nbytes // ggml.ggml_row_size(type_id, length), length), np.float32)
    to_floats(data.ctypes.data, type_id, out)
    return out


def to_floats(address: int, type_id: int, out: Floats) -> None:
    """Fill `out`, which is contiguous, with the numbers of the packed rows at `address`."""
    if type_id == ggml.F32:  # ggml has no function for it
        ctypes.memmove(out.ctypes.data, address, out.nbytes)
        return
    convert: Any = ggml.TO_FLOAT(ggml.ggml_get_type_traits(type_id).contents.to_float)
    convert(address, out.ctypes.data, out.size)
