"""Writes a GGUF file whole or not at all: to a temporary name beside the target, then renamed.

The layout of the file is the `gguf` package's work. Knows neither checkpoints nor what the tensors mean.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

from runtime.errors import UserError
from runtime.structure import ARCHITECTURE

ALIGNMENT = 64  # of every tensor in the file: a cache line, and AVX-512's load


@dataclass(frozen=True)
class Stream:
    """A tensor to be written: its bytes arrive in pieces while it is written.

    shape: in ggml's order, the contiguous dimension first. type: a number of enum ggml_type.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    nbytes: int
    pieces: Iterable[npt.NDArray[np.uint8]]

    def tofile(self, file: IO[bytes]) -> None:
        """Write all pieces to `file`; what GGUFWriter calls, as on a numpy array."""
        written = sum(file.write(piece.data) for piece in self.pieces)
        if written != self.nbytes:
            raise AssertionError(f"{self.name}: {written} bytes written, {self.nbytes} announced")


def check_target(out: Path, nbytes: int, force: bool) -> None:
    """Raise UserError unless a file of `nbytes` can be put at `out`."""
    if out.is_dir():
        raise UserError(f"`{out}`: a folder, expected a file name", f"for example {out / 'model.gguf'}")
    if not out.parent.is_dir():
        raise UserError(f"`{out.parent}`: no such folder", "make it first, or write elsewhere")
    if out.exists() and not force:
        raise UserError(f"`{out}`: exists already", "add --force to replace it, or choose another name")
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise UserError(
            f"`{out.parent}`: {free / 1e9:.2f} GB free, expected at least the {nbytes / 1e9:.2f} GB of the file",
            "free some space, write to another disk, or choose a smaller --type",
        )


def write_gguf(out: Path, metadata: Mapping[str, Any], tensors: Sequence[Stream]) -> int:
    """Write the file `out`, replacing one that exists, and return its size in bytes.

    After any exception, an interrupt included, `out` is as it was before and nothing else is left behind.
    """
    with _replacing(out) as partial, _writer(partial, out) as writer:
        for key, value in metadata.items():
            _add_value(writer, key, value)
        for tensor in tensors:
            kind = GGMLQuantizationType(tensor.type)
            writer.add_tensor_info(tensor.name, tensor.shape[::-1], np.dtype(np.float32), tensor.nbytes, kind)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor)
    return out.stat().st_size


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes `out`'s place at the end, or goes away."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(out)
        _sync_folder(out.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writer(partial: Path, out: Path) -> Iterator[Any]:
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_custom_alignment(ALIGNMENT)
    try:
        yield writer
        for file in writer.fout:
            file.flush()
            os.fsync(file.fileno())
        writer.close()
    except OSError as error:
        # A failed write does not say which file it was.
        raise OSError(error.errno, error.strerror, error.filename or str(out)) from error
    finally:
        with suppress(OSError):  # the one that made writing fail, again
            writer.close()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system has folders to sync."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _add_value(writer: Any, key: str, value: Any) -> None:
    if key == "general.architecture":
        return  # the writer adds it by itself
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)
