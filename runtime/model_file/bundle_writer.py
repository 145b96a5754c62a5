"""Writes the layout `paged`: matrices that arrive one after the other, their rows side by side in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.model_file import tensor_names as n
from runtime.model_file.bundles import NO_TYPES, PAGE, TYPES_KEY, Bundle, bundle_of, types_text
from runtime.model_file.structure import ARCHITECTURE, PAGED, Structure
from runtime.model_file.writer import NewTensor

LAYOUT_KEYS = (f"{ARCHITECTURE}.schema_version", f"{ARCHITECTURE}.layout")  # what another layout changes in a file


@dataclass(frozen=True)
class BundledTensor(NewTensor):
    """The bundles of one block. matrices: those of its columns."""

    bundle: Bundle | None = None
    matrices: tuple[NewTensor, ...] = ()

    def tofile(self, file: IO[bytes]) -> None:
        """Write each matrix, row by row where it belongs: no more of it is in memory than one piece."""
        assert self.bundle
        start = file.tell()
        file.truncate(start + self.nbytes)  # what lies between rows is zeros
        with Path(file.name).open("r+b", buffering=0) as target:
            for column, matrix in zip(self.bundle.columns, self.matrices, strict=True):
                at = start + column.first
                for row in _rows(matrix, column.row):
                    target.seek(at)
                    if target.write(row) != len(row):
                        raise OSError(f"a row of {matrix.name} was not written whole")
                    at += self.bundle.stride
                if at != start + column.first + self.nbytes:
                    raise AssertionError(f"{matrix.name}: rows up to {at - start}, expected {self.nbytes}")
        file.seek(start + self.nbytes)


def _rows(matrix: NewTensor, size: int) -> Iterator[memoryview]:
    """A matrix's rows of `size` bytes, whatever its pieces are."""
    left = np.zeros(0, np.uint8)
    for piece in matrix.pieces:
        data = np.concatenate([left, piece.reshape(-1)]) if len(left) else np.ascontiguousarray(piece).reshape(-1)
        n_rows = len(data) // size
        for k in range(n_rows):
            yield data[k * size : (k + 1) * size].data
        left = data[n_rows * size :]
    if len(left):
        raise AssertionError(f"{matrix.name}: ends within a row")


def bundled(
    s: Structure, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]
) -> tuple[dict[str, Any], list[NewTensor]]:
    """The keys and tensors of a file as its layout has them: those of `paged` with their rows in bundles, others as
    they are.
    """
    keys = {key: value for key, value in metadata.items() if key != TYPES_KEY}
    if s.layout != PAGED:
        return keys, list(tensors)
    given = {tensor.name: tensor for tensor in tensors}
    bundles: dict[str, BundledTensor] = {}
    for i, ffn in s.ffns.items():
        names = [n.weight_of(i, stem) for stem in n.row_matrices(ffn)]
        bundle = bundle_of(i, ffn, [given[name].type for name in names])
        size, matrices = bundle.stride * bundle.rows, tuple(given[name] for name in names)
        made = BundledTensor(bundle.name, bundle.shape, ggml.I8, size, (), PAGE, bundle, matrices)
        bundles |= dict.fromkeys(names, made)
        keys.setdefault(TYPES_KEY, [NO_TYPES] * s.block_count)[i] = types_text(bundle)
    found = [bundles.get(tensor.name, tensor) for tensor in tensors]
    return keys, list({tensor.name: tensor for tensor in found}.values())


def laid_out(s: Structure, layout: str | None, where: str) -> Structure:
    """The structure of a file that is written again in another layout; None: as it is. Raises UserError for a layout
    that needs more than the file has.
    """
    if layout == "both" != s.layout:
        raise UserError(
            f"{where}: has no ffn_down tensors (layout `{s.layout}`), which layout `{layout}` has",
            "convert the checkpoint again with --layout both",
        )
    return replace(s, layout=layout or s.layout)


def kept_in(layout: str, name: str) -> bool:
    """Whether a tensor of a file with both layouts of the down projection is in one of this layout."""
    at = n.parsed(name)
    return layout == "both" or at is None or at[1] not in n.NEURON_COLUMNS
