"""One file of a GGUF model, opened for reading through ggml's own parser, and distrusted: every offset is checked
against the file's size before anything is mapped.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.base.stand_ins import refuse_stand_in
from runtime.base.worker import on_worker
from runtime.bindings import ggml
from runtime.bindings.logs import captured_log
from runtime.errors import UserError

MAGIC = b"GGUF"
_SCALARS: dict[int, tuple[Any, Callable[[Any], Any]]] = {
    0: (ctypes.c_uint8, int),
    1: (ctypes.c_int8, int),
    2: (ctypes.c_uint16, int),
    3: (ctypes.c_int16, int),
    4: (ctypes.c_uint32, int),
    5: (ctypes.c_int32, int),
    6: (ctypes.c_float, float),
    7: (ctypes.c_int8, bool),
    10: (ctypes.c_uint64, int),
    11: (ctypes.c_int64, int),
    12: (ctypes.c_double, float),
}


def without_ones(ne: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as `TensorInfo` has it: its last dimensions are not 1."""
    while len(ne) > 1 and ne[-1] == 1:
        ne = ne[:-1]
    return ne


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. ne: shape in ggml's order, contiguous dimension first, without trailing ones; offset: bytes
    from the start of the file. nbytes: of its elements. stride: bytes from one row to the next, where rows of others
    lie between them; else 0.
    """

    name: str
    type: str
    type_id: int
    ne: tuple[int, ...]
    offset: int
    nbytes: int
    stride: int = 0

    @property
    def rows(self) -> int:
        """How many rows a matrix has, of all experts together."""
        return math.prod(self.ne[1:])

    @property
    def span(self) -> int:
        """Bytes from its first to its last."""
        return (self.rows - 1) * self.stride + self.nbytes // self.rows if self.stride else self.nbytes

    def rows_in(self, path: Path) -> npt.NDArray[np.uint8]:
        """Its rows in a file, mapped for reading: [rows, bytes of a row]."""
        row = self.nbytes // self.rows
        stored = np.memmap(path, np.uint8, "r", self.offset, (self.span,))
        strides = (self.stride or row, 1)
        return np.lib.stride_tricks.as_strided(stored, (self.rows, row), strides, writeable=False)


class GgufPart:
    """One open file: `metadata` (key -> value; arrays as numpy arrays or lists of str) and `tensors` (name ->
    TensorInfo). stored_bytes: of all tensors.

    magic: its first four bytes, for files that are GGUF in all but these.
    Raises UserError when the file is missing, no GGUF, damaged or shorter than its tensors say.
    """

    def __init__(self, path: Path, magic: bytes = MAGIC) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._view: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self.size = path.stat().st_size
        self._check_magic(magic)
        # Not on the main thread, where Ctrl-C would be lost if it came within a callback from native code.
        self.metadata, self.tensors = on_worker(lambda: _parse(path, magic))
        self._check_extents()
        self.stored_bytes = sum(info.nbytes for info in self.tensors.values())

    def mapped(self) -> tuple[int, int]:
        """Address and size of the whole file's mapping: read-only, made on first use, valid until `close`."""
        if self._view is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._view = np.frombuffer(self._map, np.uint8)
        return int(self._view.ctypes.data), self.size

    def release(self, name: str) -> None:
        """Give back the memory of the pages that hold only this tensor, and those of others between its rows."""
        info = self.tensors[name]
        first = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (info.offset + info.span) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and first < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's raw bytes, copied."""
        info = self.tensors[name]
        if info.stride:
            return info.rows_in(self.path).copy().reshape(-1)
        return np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset)

    def close(self) -> None:
        """Unmap the file."""
        self._view = None
        if self._map is not None:
            self._map.close()
            self._map = None

    def _check_magic(self, magic: bytes) -> None:
        refuse_stand_in(self.path)
        with self.path.open("rb") as file:
            found, version = file.read(len(MAGIC)), file.read(4)
        if found == magic and 0 < int.from_bytes(version, "big") < 1 << 16 <= int.from_bytes(version, "little"):
            raise UserError(
                f"`{self.path}`: a big-endian GGUF file, expected little-endian",
                "convert the checkpoint again, on a machine whose byte order is the usual one",
            )
        if found == magic:
            return
        if found == b"PWRI":
            raise UserError(
                f"`{self.path}`: a PowerInfer file (magic PWRI), expected GGUF",
                f"import it first: python -m convert {self.path} OUT.gguf",
            )
        raise UserError(
            f"`{self.path}`: starts with {found!r}, expected a {magic.decode()} file",
            "convert a checkpoint first: python -m convert REPO OUT.gguf",
        )

    def _check_extents(self) -> None:
        for info in self.tensors.values():
            if info.offset + info.nbytes > self.size:
                raise UserError(
                    f"`{self.path}`: tensor `{info.name}` ends at byte {info.offset + info.nbytes}, "
                    f"but the file has {self.size}",
                    "the file is truncated: download or convert it again",
                )


def _parse(path: Path, magic: bytes) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A file's metadata and tensors."""
    with _Parsed(path, magic) as parsed:
        return parsed.metadata(), {info.name: info for info in parsed.tensors()}


class _Parsed:
    """The gguf_context of a file, with the ggml_context that it fills."""

    def __init__(self, path: Path, magic: bytes) -> None:
        params = ggml.gguf_init_params(no_alloc=True)
        with captured_log() as log:
            context = (
                ggml.gguf_init_from_file(os.fsencode(path), params) if magic == MAGIC else _parse_as_gguf(path, params)
            )
            self._gguf = ggml.ConstGgufP(context.value)
        if not self._gguf:
            found = log[-1] if log else "unreadable"
            raise UserError(
                f"`{path}`: damaged GGUF file ({found})",
                "the file is truncated or corrupt: download or convert it again",
            )

    def __enter__(self) -> _Parsed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ggml.gguf_free(ggml.GgufP(self._gguf.value))

    def metadata(self) -> dict[str, Any]:
        ids = range(ggml.gguf_get_n_kv(self._gguf))
        return {_text(ggml.gguf_get_key(self._gguf, i)): self._value(i) for i in ids}

    def tensors(self) -> list[TensorInfo]:
        data = ggml.gguf_get_data_offset(self._gguf)
        return [self._tensor(i, data) for i in range(ggml.gguf_get_n_tensors(self._gguf))]

    def _tensor(self, i: int, data: int) -> TensorInfo:
        type_id = ggml.gguf_get_tensor_type(self._gguf, i)
        ne = list(ggml.gguf_get_tensor_ne(self._gguf, i)[: ggml.GGML_MAX_DIMS])
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        return TensorInfo(
            name=_text(ggml.gguf_get_tensor_name(self._gguf, i)),
            type=_text(ggml.ggml_type_name(type_id)),
            type_id=type_id,
            ne=tuple(ne),
            offset=data + ggml.gguf_get_tensor_offset(self._gguf, i),
            nbytes=ggml.gguf_get_tensor_size(self._gguf, i),
        )

    def _value(self, i: int) -> Any:
        kind = ggml.gguf_get_kv_type(self._gguf, i)
        if kind == ggml.GGUF_TYPE_STRING:
            return _text(ggml.gguf_get_val_str(self._gguf, i))
        if kind == ggml.GGUF_TYPE_ARRAY:
            return self._array(i)
        ctype, convert = _SCALARS[kind]
        return convert(ctype.from_address(ggml.gguf_get_val_data(self._gguf, i)).value)

    def _array(self, i: int) -> Any:
        kind, n = ggml.gguf_get_arr_type(self._gguf, i), ggml.gguf_get_arr_n(self._gguf, i)
        if kind == ggml.GGUF_TYPE_STRING:
            return [_text(ggml.gguf_get_arr_str(self._gguf, i, j)) for j in range(n)]
        address = ggml.gguf_get_arr_data(self._gguf, i)
        if not n or not address:
            return np.zeros(0)
        ctype, convert = _SCALARS[kind]
        values = np.array((ctype * n).from_address(address))
        return values.astype(np.bool_) if convert is bool else values


def _parse_as_gguf(path: Path, params: ggml.gguf_init_params) -> ggml.GgufP:
    """The gguf_context of a file, read as if it began with GGUF's magic."""
    with path.open("rb") as file:

        def read(_userdata: int | None, output: int, offset: int, length: int) -> int:
            file.seek(offset)
            data = file.read(length)
            if offset < len(MAGIC):
                data = (MAGIC[offset:] + data[len(MAGIC) - offset :])[: len(data)]
            ctypes.memmove(output, data, len(data))
            return len(data)

        return ggml.gguf_init_from_callback(ggml.GGUF_READER(read), None, 0, path.stat().st_size, params)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
