"""Writes GGUF files: into a workspace, or into their places, all of them whole or none at all.

The layout of the file is the `gguf` package's work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from runtime.base.atomic import writing
from runtime.base.workspace import naming
from runtime.model_file import shards
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE

ALIGNMENT = 64  # of every tensor in the file, at least: a cache line, and AVX-512's load
_PIECE = 1 << 24  # bytes copied at a time
_WRITER_ADDS = ("general.architecture", "general.alignment")
_TYPES = {bool: GGUFValueType.BOOL, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
_LARGEST_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written: its bytes arrive in pieces while it is written.

    shape: in ggml's order, the contiguous dimension first. type: a number of enum ggml_type.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    pieces: Iterable[npt.NDArray[np.uint8]]
    alignment: int = ALIGNMENT  # that it wants in the file; all tensors of a file have the largest

    def tofile(self, file: IO[bytes]) -> None:
        """Write all pieces to `file`; what GGUFWriter calls, as on a numpy array."""
        written = sum(file.write(piece.data) for piece in self.pieces)
        if written != self.nbytes:
            raise AssertionError(f"{self.name}: {written} bytes written, {self.nbytes} announced")


@dataclass(frozen=True)
class Hole(NewTensor):
    """A tensor whose bytes are not written: its place is skipped, and takes no room on file systems that know holes.
    It reads as zeros.
    """

    def tofile(self, file: IO[bytes]) -> None:
        """Go to the tensor's end, and be there: the file may end with it."""
        if self.nbytes:
            file.seek(self.nbytes - 1, os.SEEK_CUR)
            file.write(b"\0")


@dataclass(frozen=True)
class Key:
    """A key's value in the types it is stored in; strings as bytes, which need not be UTF-8. items: type of an array's
    elements.
    """

    value: Any
    type: GGUFValueType
    items: GGUFValueType | None = None


def copied(file: GgufFile, name: str, new_name: str | None = None) -> NewTensor:
    """A tensor of another file, byte for byte."""
    info = file.tensors[name]

    def rows() -> Iterator[npt.NDArray[np.uint8]]:
        with naming(file.path_of(name)):
            stored = info.rows_in(file.path_of(name))
            for at in range(0, len(stored), step := max(1, _PIECE // stored.shape[1])):
                yield stored[at : at + step].copy().reshape(-1)

    def pieces() -> Iterator[npt.NDArray[np.uint8]]:
        with file.path_of(name).open("rb") as stored, naming(file.path_of(name)):
            stored.seek(info.offset)
            for at in range(0, info.nbytes, _PIECE):
                yield np.frombuffer(stored.read(min(_PIECE, info.nbytes - at)), np.uint8)

    return NewTensor(new_name or name, info.ne, info.type_id, info.nbytes, rows() if info.stride else pieces())


def copied_keys(path: Path) -> dict[str, Key]:
    """All keys of a file but empty arrays, which the `gguf` package cannot write, what it adds by itself, and what says
    how a model is split.
    """
    left = (*_WRITER_ADDS, *shards.KEYS)
    fields = {key: f for key, f in GGUFReader(path).fields.items() if key not in left and len(f.data)}
    return {key: _key(field) for key, field in fields.items() if not key.startswith("GGUF.")}


def _key(field: Any) -> Key:
    kind, items = field.types[0], field.types[-1]
    array = kind == GGUFValueType.ARRAY
    if items == GGUFValueType.STRING:
        texts = [field.parts[i].tobytes() for i in field.data]
        return Key(texts if array else texts[0], kind, items if array else None)
    return Key(field.contents(), kind, items if array else None)


@dataclass(frozen=True)
class NewFile:
    """A file to be written. metadata: plain values (whole numbers as UINT32, in lists as INT32; empty lists are left
    out), or `Key`s as they are.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[NewTensor]


def write_gguf(
    out: Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor], architecture: str = ARCHITECTURE
) -> int:
    """Write the one file `out` as `write_files` does; returns its size in bytes."""
    return write_files([NewFile(out, metadata, tensors)], architecture)


def write_files(files: Sequence[NewFile], architecture: str = ARCHITECTURE) -> int:
    """Write all files, which belong into one folder, replacing those that exist, and return their size in bytes
    together.

    After any exception, an interrupt included, every file is as it was before and nothing else is left behind; an
    OSError names the file.
    """
    with writing(files[0].path) as work:
        # The first may be a link to another name.
        names = [work.target.name, *(file.path.name for file in files[1:])]
        inside = [replace(file, path=work.folder / name) for file, name in zip(files, names, strict=True)]
        size = write_parts(inside, architecture)
        work.publish(names)
    return size


def write_parts(files: Sequence[NewFile], architecture: str = ARCHITECTURE) -> int:
    """Write all files just where they say, and return their size in bytes together. An OSError names the file."""
    for file in files:
        with naming(file.path):
            _write(file, architecture)
    return sum(file.path.stat().st_size for file in files)


def _write(file: NewFile, architecture: str) -> None:
    alignment = max((tensor.alignment for tensor in file.tensors), default=ALIGNMENT)
    with _writer(architecture, alignment) as writer:
        for key, value in file.metadata.items():
            _add_value(writer, key, value)
        for tensor in file.tensors:
            kind = GGMLQuantizationType(tensor.type)
            writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file(file.path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in file.tensors:
            writer.write_tensor_data(tensor)


@contextmanager
def _writer(architecture: str, alignment: int) -> Iterator[Any]:
    writer = GGUFWriter(None, architecture)
    writer.add_custom_alignment(alignment)
    try:
        yield writer
        writer.close()
    finally:
        with suppress(OSError):  # the one that made writing fail, again
            writer.close()


def _add_value(writer: Any, key: str, value: Any) -> None:
    if key in _WRITER_ADDS:
        return
    if isinstance(value, Key):
        writer.add_key_value(key, value.value, value.type, value.items)
    elif isinstance(value, list):
        if value:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, _type_of(value, GGUFValueType.INT32))
    else:
        writer.add_key_value(key, value, _type_of([value], GGUFValueType.UINT32))


def _type_of(values: Sequence[Any], whole: GGUFValueType) -> GGUFValueType:
    """The type in which values are stored. whole: of whole numbers, and floats are FLOAT32, but 64 bits where some need
    them.
    """
    kind = type(values[0])
    if kind is int:
        low, high = (-(1 << 31), 1 << 31) if whole == GGUFValueType.INT32 else (0, 1 << 32)
        if not all(low <= value < high for value in values):
            return GGUFValueType.INT64 if min(values) < 0 else GGUFValueType.UINT64
        return whole
    if kind is float and any(_LARGEST_F32 < abs(value) < math.inf for value in values):
        return GGUFValueType.FLOAT64
    return _TYPES[kind]
