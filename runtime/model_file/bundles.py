"""The layout `paged`: the gate, up and down_t rows of one neuron side by side, so that one read of the disk has all.

A block's three matrices are one tensor then, a bundle for each neuron. Here is how a bundle is divided, and how a
file's bundles become the matrices that all other modules know. docs/format.md says the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.bindings import ggml
from runtime.bindings.ffn_shape import FfnShape
from runtime.errors import UserError
from runtime.model_file import tensor_names as n
from runtime.model_file.container import TensorInfo, without_ones
from runtime.model_file.structure import ARCHITECTURE, PAGED, Structure
from runtime.model_file.structure_reading import read_structure

TYPES_KEY = f"{ARCHITECTURE}.bundle.types"
NO_TYPES = "none"  # of a block without an FFN
PAGE = 4096  # bytes of a disk's block, and of a page of memory
_ROW_ALIGNMENT = 16  # of a row within its bundle
_ALIGNMENT = 64  # of a bundle: a line of the caches
_AGAIN = "the file is damaged: download or convert it again"


@dataclass(frozen=True)
class Column:
    """One of the matrices in bundles: the type of its rows, their bytes, and where they lie within a bundle."""

    name: str
    type_id: int
    row: int
    first: int


@dataclass(frozen=True)
class Bundle:
    """The bundles of one block. shape: in ggml's order, of the tensor: bytes of a bundle, then its neurons. n_embd:
    elements of a row.
    """

    name: str
    n_embd: int
    shape: tuple[int, ...]
    columns: tuple[Column, ...]

    @property
    def stride(self) -> int:
        """Bytes from one neuron to the next."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Neurons, of all experts together."""
        return math.prod(self.shape[1:])


def bundle_of(i: int, ffn: FfnShape, type_ids: Sequence[int], stride: int = 0) -> Bundle:
    """The bundles of block `i`, whose matrices have these ggml types. stride: as a file has it; 0: the best one."""
    stems, length, columns = n.row_matrices(ffn), 0, []
    for stem, type_id in zip(stems, type_ids, strict=True):
        row = ggml.ggml_row_size(type_id, ffn.n_embd)
        columns.append(Column(n.weight_of(i, stem), type_id, row, length))
        length += -(-row // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    rows = (ffn.expert_length, ffn.experts.count) if ffn.experts else (ffn.n_ff,)
    shape = (stride or best_stride(length), *rows)
    return Bundle(n.in_block(i, n.stems(ffn).bundle), ffn.n_embd, shape, tuple(columns))


def best_stride(length: int) -> int:
    """Bytes from one bundle of `length` bytes to the next: those for which (pages that a bundle lies in, on average) x
    (bytes that it takes) is least. The first begins with a page.
    """
    choices = range(-(-length // _ALIGNMENT) * _ALIGNMENT, length + PAGE + 1, _ALIGNMENT)
    return min(choices, key=lambda stride: (pages_touched(length, stride) * stride, stride))


def pages_touched(length: int, stride: int) -> float:
    """How many pages a bundle lies in, on average."""
    period = PAGE // math.gcd(stride, PAGE)
    starts = [k * stride % PAGE for k in range(period)]
    return sum(-(-(start + length) // PAGE) for start in starts) / period


def unbundled(
    stored: Mapping[str, TensorInfo], metadata: Mapping[str, Any], where: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A file's tensors with the matrices of its bundles in the place of these; and by matrix, the bundle that it is of.

    Tensors of a file with another layout are what they are. Raises UserError where a bundle is missing, or has another
    size than the file's description asks for.
    """
    if metadata.get(f"{ARCHITECTURE}.layout") != PAGED:
        return dict(stored), {}
    structure = read_structure(metadata, where)
    bundles = {bundle.name: bundle for bundle in _described(structure, stored, metadata, where)}
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if bundle := bundles.get(name):
            tensors |= {made.name: made for made in _matrices(bundle, info)}
        else:
            tensors[name] = info
    return tensors, {column.name: bundle.name for bundle in bundles.values() for column in bundle.columns}


def _described(
    s: Structure, stored: Mapping[str, TensorInfo], metadata: Mapping[str, Any], where: str
) -> Iterator[Bundle]:
    types = metadata.get(TYPES_KEY)
    if not isinstance(types, list) or len(types) != s.block_count:
        raise UserError(f"{where}: `{TYPES_KEY}` is {types!r}, expected a text for each block", _AGAIN)
    for i, ffn in s.ffns.items():
        short = n.in_block(i, n.stems(ffn).bundle)
        info, ids = stored.get(short), _type_ids(types[i], len(n.row_matrices(ffn)))
        if ids is None or any(ffn.n_embd % ggml.ggml_blck_size(type_id) for type_id in ids):
            raise UserError(
                f"{where}: types of block {i}'s bundles are {types[i]!r}, expected those of its rows", _AGAIN
            )
        if info is None:
            raise UserError(f"{where}: tensor `{short}` is missing, which layout `{PAGED}` has", _AGAIN)
        bundle = bundle_of(i, ffn, ids, info.ne[0])
        last = bundle.columns[-1]
        if info.type_id != ggml.I8 or info.ne != without_ones(bundle.shape) or info.ne[0] < last.first + last.row:
            raise UserError(
                f"{where}: tensor `{short}` is {info.type} {list(info.ne)}, expected i8, at least "
                f"{[last.first + last.row, *bundle.shape[1:]]}",
                _AGAIN,
            )
        yield bundle


def _type_ids(text: Any, count: int) -> list[int] | None:
    """The ggml types that a text names, None where it does not name so many."""
    found = [ggml.TYPES.get(name) for name in str(text).split(",")]
    ids = [type_id for type_id in found if type_id is not None]
    return ids if len(found) == len(ids) == count else None


def types_text(bundle: Bundle) -> str:
    """The types of a bundle's rows, as the file's keys have them."""
    return ",".join(ggml.ggml_type_name(column.type_id).decode() for column in bundle.columns)


def _matrices(bundle: Bundle, info: TensorInfo) -> Iterator[TensorInfo]:
    for column in bundle.columns:
        yield replace(
            info,
            name=column.name,
            type=ggml.ggml_type_name(column.type_id).decode(),
            type_id=column.type_id,
            ne=without_ones((bundle.n_embd, *bundle.shape[1:])),
            offset=info.offset + column.first,
            nbytes=column.row * bundle.rows,
            stride=bundle.stride,
        )
