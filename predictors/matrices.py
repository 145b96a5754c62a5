"""Predictor matrices in the numbers they are stored in: rows of floats to a ggml type and back.

Rows are packed by ggml's own functions, so that what is measured here is what the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml, rows

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

MATRIX_TYPES = ("q4_0", "q8_0", "f16", "f32")
_NUMPY: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i8": np.int8}


@dataclass(frozen=True)
class Tensor:
    """A tensor of one block as it will be stored.

    name: without `blk.N.`; type: ggml's name; shape: in ggml's order, contiguous dimension first.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Bytes

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(self.data.nbytes)

    def floats(self) -> Floats:
        """The numbers that the bytes stand for, float32 [rows, columns] (or [elements])."""
        return unpack(self.data, self.type, self.shape[0]).reshape(self.shape[::-1])

    def reordered(self, order: npt.NDArray[np.int32]) -> Tensor:
        """The same tensor with its rows (elements of a vector) in another order."""
        stored = self.data.reshape(self.shape[-1], -1)
        return Tensor(self.name, self.type, self.shape, stored[order].reshape(-1))


def block_size(type_name: str) -> int:
    """Elements of a type that are packed together: rows are multiples of it."""
    return ggml.ggml_blck_size(ggml.TYPES[type_name])


def row_bytes(type_name: str, length: int) -> int:
    """Bytes of a row of `length` elements."""
    return ggml.ggml_row_size(ggml.TYPES[type_name], length)


def matrix(name: str, type_name: str, values: Floats, importance: Floats | None = None) -> Tensor:
    """Pack rows [n, length] of floats.

    importance: float32 [length], how much an error in each column matters (mean square of what it is multiplied with).
    """
    if type_name in _NUMPY:
        return plain(name, type_name, values)
    return Tensor(name, type_name, values.shape[::-1], rows.pack(values, ggml.TYPES[type_name], importance))


def plain(name: str, type_name: str, values: npt.NDArray[Any]) -> Tensor:
    """A tensor of plain numbers: f32, f16, i32 or i8."""
    data = np.ascontiguousarray(values, _NUMPY[type_name])
    return Tensor(name, type_name, data.shape[::-1], data.reshape(-1).view(np.uint8))


def unpack(data: Bytes, type_name: str, row_length: int) -> Floats:
    """Numbers of packed rows, float32 [n_rows, row_length]."""
    if type_name in _NUMPY:
        return np.asarray(data.view(_NUMPY[type_name]).astype(np.float32).reshape(-1, row_length))
    return rows.unpack(data, ggml.TYPES[type_name], row_length)
