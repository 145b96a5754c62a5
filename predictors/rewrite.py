"""A model file written again with other predictors: every other tensor and key byte for byte as it was.

The layout of the file is the `gguf` package's work. Knows names that begin with `predictor_`, and nothing of how predictors are made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from predictors.quantized import Tensor
from runtime import ggml
from runtime.errors import UserError
from runtime.gguf_file import GgufFile, TensorInfo
from runtime.structure import ARCHITECTURE

ALIGNMENT = 64
_REPLACED = (f"{ARCHITECTURE}.predictor.", f"{ARCHITECTURE}.calibration.")
_WRITTEN_ANYWAY = ("general.architecture", "general.alignment")
_PIECE = 1 << 24
_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
_ITEMS = _TYPES | {int: GGUFValueType.INT32}


def check_target(source: Path, out: Path, force: bool) -> None:
    """Raise UserError unless a file of about `source`'s size can be put at `out`."""
    if out.is_dir():
        raise UserError(f"`{out}`: a folder, expected a file name", f"for example {out / 'model.gguf'}")
    if not out.parent.is_dir():
        raise UserError(f"`{out.parent}`: no such folder", "make it first, or write elsewhere")
    if out.exists() and not force:
        raise UserError(f"`{out}`: exists already", "add --force to replace it, or choose another name")
    free, size = shutil.disk_usage(out.parent).free, source.stat().st_size
    if size > free:
        raise UserError(f"`{out.parent}`: {free / 1e9:.2f} GB free, expected the {size / 1e9:.2f} GB of the file")


def rewrite(source: Path, out: Path, blocks: Sequence[Sequence[Tensor]], metadata: Mapping[str, Any]) -> int:
    """Write `source` to `out` with new predictor tensors for each block and new keys; returns the size in bytes.

    After any exception, an interrupt included, `out` is as it was before and nothing else is left behind.
    """
    with GgufFile(source) as file, _replacing(out) as partial, _writer(partial, out) as writer:
        _add_keys(writer, source, metadata)
        pieces = list(_pieces(file, blocks))
        for piece in pieces:
            kind = GGMLQuantizationType(piece.type_id)
            writer.add_tensor_info(piece.name, piece.ne[::-1], np.dtype(np.float32), piece.nbytes, kind)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in pieces:
            writer.write_tensor_data(piece)
    return out.stat().st_size


@dataclass(frozen=True)
class _Piece:
    """One tensor of the new file: new data, or a stretch of the old file."""

    name: str
    ne: tuple[int, ...]
    type_id: int
    nbytes: int
    new: Tensor | None
    file: Path
    offset: int

    def tofile(self, out: IO[bytes]) -> None:
        """What GGUFWriter calls, as on a numpy array."""
        if self.new is not None:
            out.write(self.new.data.data)
            return
        with self.file.open("rb") as stored:
            stored.seek(self.offset)
            for at in range(0, self.nbytes, _PIECE):
                out.write(stored.read(min(_PIECE, self.nbytes - at)))


def _pieces(file: GgufFile, blocks: Sequence[Sequence[Tensor]]) -> Iterator[_Piece]:
    """Old tensors in their order, each block followed by its new ones."""
    kept = [t for t in file.tensors.values() if ".predictor_" not in t.name]
    for t, following in zip(kept, [*kept[1:], None], strict=True):
        yield _Piece(t.name, t.ne, t.type_id, t.nbytes, None, file.path, t.offset)
        block = _block_of(t)
        if block is not None and (following is None or _block_of(following) != block):
            for new in blocks[block]:
                type_id = ggml.TYPES[new.type]
                yield _Piece(f"blk.{block}.{new.name}", new.shape, type_id, new.nbytes, new, file.path, 0)


def _block_of(tensor: TensorInfo) -> int | None:
    return int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else None


def _add_keys(writer: GGUFWriter, source: Path, metadata: Mapping[str, Any]) -> None:
    reader = GGUFReader(source)
    for key, field in reader.fields.items():
        ours = key.startswith(_REPLACED) or key in metadata
        if not ours and key not in _WRITTEN_ANYWAY and not key.startswith("GGUF."):
            items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, _raw(field), field.types[0], items)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, _ITEMS[type(value[0])])
        else:
            writer.add_key_value(key, value, _TYPES[type(value)])


def _raw(field: Any) -> Any:
    """A key's value; strings as bytes, which need not be UTF-8."""
    if field.types[-1] != GGUFValueType.STRING:
        return field.contents()
    values = [field.parts[i].tobytes() for i in field.data]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes `out`'s place at the end, or goes away."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(out)
        if os.name != "nt":
            descriptor = os.open(out.parent, os.O_RDONLY)  # make the rename last through a power cut
            os.fsync(descriptor)
            os.close(descriptor)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writer(partial: Path, out: Path) -> Iterator[GGUFWriter]:
    writer = GGUFWriter(None, ARCHITECTURE)
    writer.add_custom_alignment(ALIGNMENT)
    try:
        yield writer
        for file in writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # A failed write does not say which file it was.
        raise OSError(error.errno, error.strerror, error.filename or str(out)) from error
    finally:
        with suppress(OSError):  # the one that made writing fail, again
            writer.close()
