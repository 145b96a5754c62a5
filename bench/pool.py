"""Random matrices as encoded bytes, cheaply: a pool of rows is drawn and quantised once, and each tensor strings groups
of them together.

Every tensor still gets bytes of its own in the file, so page cache and memory traffic are those of a real model. Knows
nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from convert.formats import NUMBERS, encode, row_bytes
from runtime.bindings.rows import unpack

GROUP = 256  # rows that stay together; a multiple of every type's block
_STEP = 256  # rows encoded or delivered at a time

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Groups = npt.NDArray[np.int64]


def choose_groups(rng: np.random.Generator, pool_rows: int, rows: int, group: int = GROUP) -> Groups:
    """Which groups of a pool a tensor of `rows` rows consists of."""
    return rng.integers(0, pool_rows // group, -(-rows // group))


def row_ids(groups: Groups, rows: int, group: int = GROUP) -> npt.NDArray[np.int64]:
    """The pool's row behind each of the tensor's rows."""
    ids: npt.NDArray[np.int64] = (groups[:, None] * group + np.arange(group)).reshape(-1)[:rows]
    return ids


def decode(data: Bytes, type_name: str, row_length: int) -> Floats:
    """The numbers that encoded rows stand for, float32 [rows, row_length]."""
    return unpack(data, NUMBERS[type_name], row_length)


def encode_rows(rows: Floats, type_name: str) -> Bytes:
    """The bytes of `rows` [n, length], encoded by several threads."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        parts = threads.map(lambda at: encode(rows[at : at + _STEP], type_name), range(0, len(rows), _STEP))
        return np.concatenate(list(parts))


class RowPool:
    """Encoded rows [n, length]; n is a multiple of `group`."""

    def __init__(self, rows: Floats, type_name: str, group: int = GROUP) -> None:
        self.type, self.length, self.rows, self.group = type_name, rows.shape[1], len(rows), group
        self._groups = encode_rows(rows, type_name).reshape(self.rows // group, -1)

    def pieces(self, groups: Groups, rows: int, zeros: int = 0) -> Iterator[Bytes]:
        """The bytes of `rows` rows, of which the first `zeros` hold only zeros."""
        size = row_bytes(self.type, self.length)
        if zeros:
            yield encode(np.zeros((zeros, self.length), np.float32), self.type)
        for at in range(zeros, rows, self.group):
            yield self._groups[groups[at // self.group]][: min(self.group, rows - at) * size]

    def floats(self) -> Floats:
        """The numbers that the pool's bytes stand for, float32 [n, length]."""
        return np.concatenate([decode(group, self.type, self.length) for group in self._groups])


class ColumnPool:
    """The same rows as columns: encoded along the other dimension, in groups of `group` columns."""

    def __init__(self, rows: Floats, type_name: str, group: int = GROUP) -> None:
        self.type, self.group, (self.columns, self.height) = type_name, group, rows.shape
        self._groups = encode_rows(rows.T, type_name).reshape(self.height, self.columns // group, -1)

    def pieces(self, groups: Groups) -> Iterator[Bytes]:
        """The bytes of the matrix [len(groups) * group, height] (ggml's order) whose columns are the chosen groups."""
        for at in range(0, self.height, _STEP):
            yield self._groups[at : at + _STEP, groups].reshape(-1)
