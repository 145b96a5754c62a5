"""A model's GGUF file, or the shards that it is split into, opened as one and checked against the model's own
description.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from runtime.base.closing import Closing
from runtime.bindings import ggml
from runtime.bindings.ffn_shape import FfnShape
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.bundles import unbundled
from runtime.model_file.container import MAGIC, GgufPart, TensorInfo, without_ones
from runtime.model_file.provenance import check_figures
from runtime.model_file.shards import open_shards
from runtime.model_file.structure import Structure
from runtime.model_file.structure_reading import read_structure
from runtime.model_file.tensor_shapes import required_tensors

__all__ = ["MAGIC", "GgufFile", "TensorInfo"]

# Of what has more dimensions than one and is no matrix, or none that may be quantised.
_SPECIAL = {
    **dict.fromkeys((*names.NEURON_NOTES, *names.ROUTERS, *names.PREDICTOR_BIASES, *names.MAMBA_NUMBERS), ggml.F32),
    **dict.fromkeys(names.INDICES, ggml.I32),
    **dict.fromkeys(names.SIGNS, ggml.I8),
}
_AGAIN = "the file is damaged: download or convert it again"


class GgufFile(Closing):
    """An open model: `metadata` (key -> value; arrays as numpy arrays or lists of str) and `tensors` (name ->
    TensorInfo; matrices that are stored in bundles under their own names).

    path: the file, or the first of its shards; `parts` are all of them, and `size` their bytes together.
    magic: its first four bytes, for files that are GGUF in all but these.
    Raises UserError when a file is missing, no GGUF, damaged, shorter than its tensors say, or a shard of something
    else.
    """

    def __init__(self, path: str | Path, magic: bytes = MAGIC) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise UserError(
                f"`{path}` is a folder, expected a GGUF file", "convert it first: python -m convert FOLDER OUT.gguf"
            )
        self.parts = open_shards(GgufPart(self.path, magic))
        self.size = sum(part.size for part in self.parts)
        self.metadata = self.parts[0].metadata
        stored = {name: info for part in self.parts for name, info in part.tensors.items()}
        divided, bundles = unbundled(stored, self.metadata, f"`{path}`")
        for part in self.parts if bundles else ():
            held = part.tensors
            part.tensors = {name: info for name, info in divided.items() if bundles.get(name, name) in held}
        self.tensors = {name: info for part in self.parts for name, info in part.tensors.items()}
        self._part_of = {name: part for part in self.parts for name in part.tensors}

    @functools.cached_property
    def structure(self) -> Structure:
        """The model's description, checked against the tensors: each required one present with its shape, neurons in
        the order it says; figures of its making in their range.
        """
        structure = read_structure(self.metadata, f"`{self.path}`")
        self._check_tensors(structure)
        check_figures(self.metadata, structure.block_count, f"`{self.path}`")
        for i, ffn in structure.ffns.items():
            if structure.neuron_order == "hot":
                self._check_order(i, ffn)
            self._check_router(i, ffn, structure)
        return structure

    def path_of(self, name: str) -> Path:
        """The file that the tensor lies in: its offset counts from there."""
        return self._part_of[name].path

    def address(self, name: str) -> int:
        """Where the tensor's bytes lie in this process: its file is mapped read-only on first use. Valid until
        `close`.
        """
        return self.mapped(name)[0] + self.tensors[name].offset

    def mapped(self, name: str) -> tuple[int, int]:
        """Address and size of the mapping of the whole file that the tensor lies in."""
        return self._part_of[name].mapped()

    def release(self, name: str) -> None:
        """Give back the memory that the tensor's pages take in this process; touched again, they are read again.

        Pages shared with a neighbour stay. Does nothing where the system has no `madvise`.
        """
        self._part_of[name].release(name)

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The tensor's raw bytes, copied."""
        return self._part_of[name].read(name)

    def close(self) -> None:
        """Unmap the files."""
        for part in self.parts:
            part.close()

    def _check_tensors(self, structure: Structure) -> None:
        required = required_tensors(structure)
        missing = [name for name in required if name not in self.tensors]
        if missing:
            raise UserError(
                f"`{self.path}`: {len(missing)} tensors missing, the first is `{missing[0]}`",
                "the file is incomplete: convert the checkpoint again",
            )
        for name, ne in required.items():
            if self.tensors[name].ne != without_ones(ne):
                raise UserError(
                    f"`{self.path}`: tensor `{name}` has shape {list(self.tensors[name].ne)}, "
                    f"expected {list(ne)} from the file's own description"
                )
            wanted = _wanted_type(self.tensors[name])
            if wanted:
                raise UserError(f"`{self.path}`: tensor `{name}` has type {self.tensors[name].type}, expected {wanted}")

    def _check_order(self, i: int, ffn: FfnShape) -> None:
        """That each expert's neurons, or all, are there once, hottest first."""
        stems, length = names.stems(ffn), ffn.expert_length
        index = self.read(names.in_block(i, stems.index)).view(np.int32).reshape(-1, length)
        each = " in each expert" if ffn.experts else ""
        if not np.array_equal(np.sort(index), np.broadcast_to(np.arange(length), index.shape)):
            raise UserError(
                f"`{self.path}`: `{names.in_block(i, stems.index)}` is no permutation of 0 to {length - 1}{each}",
                _AGAIN,
            )
        freq = self.read(names.in_block(i, stems.freq)).view(np.float32).reshape(-1, length)
        if not (np.all(freq[:, :-1] >= freq[:, 1:]) and np.all((freq >= 0) & (freq <= 1))):
            raise UserError(
                f"`{self.path}`: `{names.in_block(i, stems.freq)}` is not sorted from hot to cold{each} within 0 to 1",
                _AGAIN,
            )

    def _check_router(self, i: int, ffn: FfnShape, structure: Structure) -> None:
        """That a router's numbers are finite, and its experts' frequencies shares of the tokens."""
        if not ffn.experts:
            return
        for short in names.ROUTERS:
            name = names.in_block(i, short)
            if name in self.tensors and not np.isfinite(self.read(name).view(np.float32)).all():
                raise UserError(f"`{self.path}`: `{name}` has numbers that are not finite", _AGAIN)
        if structure.neuron_order == "hot":
            freq = self.read(names.in_block(i, names.EXPERT_FREQ)).view(np.float32)
            if not np.all((freq >= 0) & (freq <= 1)):
                raise UserError(f"`{self.path}`: `{names.in_block(i, names.EXPERT_FREQ)}` is not within 0 to 1", _AGAIN)


def _wanted_type(info: TensorInfo) -> str:
    """What the tensor's type should be, "" if it is that: vectors are F32, and ggml can multiply with matrices."""
    short = (names.parsed(info.name) or (0, ""))[1]
    special = _SPECIAL.get(short)
    if special is not None or len(info.ne) == 1:
        wanted = ggml.F32 if special is None else special
        return "" if info.type_id == wanted else ggml.ggml_type_name(wanted).decode()
    usable = ggml.ggml_get_type_traits_cpu(info.type_id).contents.vec_dot
    return "" if usable else "a float or quantised type"
