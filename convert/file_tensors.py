"""Tensors that are taken from other files than a checkpoint's weights: rows of a GGUF file as they are, its numbers,
and pickled tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from convert import pytorch
from convert.rewrites import Array, Sliceable
from predictors.matrices import block_size, row_bytes, unpack
from runtime.model_file.reader import TensorInfo

_PIECE = 1 << 24  # bytes read at a time
Bytes = npt.NDArray[np.uint8]


class Readable(Protocol):
    """A tensor to be read in slices and encoded; name: for people; rewrite: what changes it on the way."""

    @property
    def name(self) -> str: ...  # noqa: D102 - said above
    @property
    def rewrite(self) -> str: ...  # noqa: D102
    def open(self) -> AbstractContextManager[Sliceable]: ...  # noqa: D102


@dataclass(frozen=True)
class KeptRows:
    """Rows of a tensor in another GGUF file that are kept byte for byte.

    first: the first of them; a vector's elements are rows.
    """

    file: Path
    info: TensorInfo
    first: int = 0
    rewrite: str = "kept"

    @property
    def name(self) -> str:
        """The tensor's name in that file."""
        return self.info.name

    def pieces(self, rows: int, row_length: int, order: npt.NDArray[np.int32] | None) -> Iterator[Bytes]:
        """`rows` rows of `row_length` bytes, in the stored order or another."""
        if self.info.stride:
            stored = self.info.rows_in(self.file)[self.first : self.first + rows]
        else:
            start = self.info.offset + self.first * row_length
            stored = np.memmap(self.file, np.uint8, "r", start, (rows, row_length))
        step = max(1, _PIECE // row_length)
        for at in range(0, rows, step):
            which: Any = slice(at, at + step) if order is None else order[at : at + step]
            yield np.ascontiguousarray(stored[which]).reshape(-1)


@dataclass(frozen=True)
class DecodedMatrix:
    """The numbers of a matrix in another GGUF file, to be encoded anew."""

    file: Path
    info: TensorInfo
    rewrite: str = "identity"

    @property
    def name(self) -> str:
        """The tensor's name in that file."""
        return self.info.name

    @contextmanager
    def open(self) -> Iterator[Sliceable]:
        """The matrix for slicing by rows, or by rows and columns."""
        yield _Matrix(self.file, self.info)


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in a file that torch saved."""

    file: Path
    key: str
    rewrite: str = "identity"

    @property
    def name(self) -> str:
        """The file's name, and the tensor's in it."""
        return f"{self.file.name}: {self.key}"

    def open(self) -> AbstractContextManager[Sliceable]:
        """The tensor for slicing."""
        return pytorch.open_tensor(self.file, self.key)


class _Matrix:
    """Rows of a GGUF matrix; slices are float32, and read no more than the blocks that they touch."""

    def __init__(self, file: Path, info: TensorInfo) -> None:
        self.type, self.width = info.type, info.ne[0]
        self.block = block_size(info.type)
        shape = (info.ne[1], self.width // self.block, row_bytes(info.type, self.block))
        self.blocks = np.memmap(file, np.uint8, "r", info.offset, shape)

    def __getitem__(self, key: Any) -> Array:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        start, stop, _ = columns.indices(self.width)
        first, end = start // self.block, -(-stop // self.block)
        data = np.ascontiguousarray(self.blocks[rows, first:end])
        numbers = unpack(data.reshape(-1), self.type, (end - first) * self.block)
        return numbers[:, start - first * self.block : stop - first * self.block]
