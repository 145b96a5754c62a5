"""The plan of a conversion: every tensor of the file with its source, shape and format, settled before writing starts.

The mapping is total in both directions: each tensor that the structure requires has a source in the checkpoint, and
each tensor of the checkpoint is used or known to be of no use.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from convert.already_quantized import refuse_quantised_tensors
from convert.arch import Arch, Generated, Source, Sources, adapted, block_kinds, describe, find_arch
from convert.checkpoint import FLOATS, Checkpoint
from convert.config import Config
from convert.file_tensors import KeptRows, Readable
from convert.formats import fitting, output_type, row_bytes
from convert.rewrites import IDENTITY, Mixer, Rewrite, Shape, named
from convert.tied_head import settle_head
from convert.unmapped import common_prefix, disagreement, explanation, is_buffer, listed, without_head
from predictors.matrices import Tensor
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

# Besides everything with one dimension: norms, biases, frequencies.
_ALWAYS_F32 = (names.weight(names.POSITION_EMBD), *names.ROUTERS, *names.MAMBA_NUMBERS)


@dataclass(frozen=True)
class Types:
    """The formats that were asked for: of the matrices, and of the output head ("" for the usual one)."""

    main: str = "f16"
    output: str = ""


@dataclass(frozen=True)
class MadeTensor:
    """A tensor whose bytes were made during the conversion."""

    data: npt.NDArray[np.uint8]


class NewBlock(Protocol):
    """What a fit, or a new order, changes in a block: see predictors.fit.BlockFit."""

    @property
    def order(self) -> npt.NDArray[np.int32]: ...  # noqa: D102 - of predictors.hot_order.BlockOrder
    @property
    def tensors(self) -> tuple[Tensor, ...]: ...  # noqa: D102


class NewBlocks(Protocol):
    """What a fit or a new order changes in a model: predictors.fit.ModelFit or predictors.hot_order.ModelOrder."""

    @property
    def blocks(self) -> Sequence[NewBlock]: ...  # noqa: D102 - of predictors.fit.ModelFit
    @property
    def metadata(self) -> dict[str, Any]: ...  # noqa: D102
    def structure_fields(self) -> dict[str, Any]: ...  # noqa: D102


Origin = Source | Generated | MadeTensor | KeptRows | Readable


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the file. shape: in ggml's order, the contiguous dimension first. wanted: the format asked for.

    order: neurons in the order they are stored, by their original ids; None where the tensor has no neurons, or all
    stay.
    """

    name: str
    source: Origin
    shape: Shape
    type: str
    wanted: str
    order: npt.NDArray[np.int32] | None = None
    rewrite: Rewrite = IDENTITY  # of a source in the checkpoint

    @property
    def neuron_axis(self) -> int:
        """Which axis of the (row-major) tensor runs over neurons."""
        return 1 if self.name.endswith(names.NEURON_COLUMNS) else 0

    @property
    def parts(self) -> tuple[PlannedTensor, ...]:
        """What the tensor is made of, one behind the other: a matrix for each expert, or itself."""
        if not isinstance(self.source, Source) or "{e}" not in self.source.name:
            return (self,)
        *shape, count = self.shape
        orders = [None] * count if self.order is None else self._orders(count)
        return tuple(
            replace(self, source=self.source.numbered(e=e), shape=tuple(shape), order=order)
            for e, order in enumerate(orders)
        )

    def _orders(self, count: int) -> list[npt.NDArray[np.int32]]:
        """The order of each expert's neurons among themselves."""
        assert self.order is not None
        length = len(self.order) // count
        return [order - np.int32(e * length) for e, order in enumerate(self.order.reshape(count, length))]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; a vector counts as rows of one element."""
        return row_bytes(self.type, self.shape[0] if len(self.shape) > 1 else 1)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, without padding."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Plan:
    """What a conversion will write. arch: None where the source is no checkpoint. notes: what its user should know."""

    arch: Arch | None
    structure: Structure
    types: Types
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def fallbacks(self) -> dict[str, str]:
        """Tensors whose rows do not fit the format asked for -> the format they get."""
        return {tensor.name: tensor.type for tensor in self.tensors if tensor.type != tensor.wanted}


def make_plan(
    checkpoint: Checkpoint,
    types: Types,
    layout: str = "both",
    ffn_type: str | None = None,
    known: str | None = None,
) -> Plan:
    """Plan the conversion of `checkpoint`; ffn_type, known: see `convert.arch.describe`.

    Raises UserError when config, tensors and architecture do not agree.
    """
    arch, structure = outline(checkpoint.config, layout, ffn_type, known)
    sources = _sources(arch, structure, checkpoint)
    structure, sources, notes = settle_head(checkpoint, structure, sources)
    required = required_tensors(structure)
    left = _left_aside(arch, structure, checkpoint)
    _check_names(checkpoint, required, sources, left | _useless(arch, structure, checkpoint))
    tensors = [_planned(name, shape, sources[name], structure, types) for name, shape in required.items()]
    _check_shapes(checkpoint, [part for tensor in tensors for part in tensor.parts])
    return Plan(arch, structure, types, tuple(tensors), notes + _told(left))


def outline(
    config: Config, layout: str = "both", ffn_type: str | None = None, known: str | None = None
) -> tuple[Arch, Structure]:
    """What config.json alone tells of a conversion: raises UserError for a checkpoint that its weights would not make
    convertible.
    """
    arch = find_arch(config)
    return arch, describe(arch, config, layout, ffn_type, known)


_NEURON_TENSORS = (*names.NEURON_ROWS, *names.NEURON_COLUMNS, names.weight(names.PREDICTOR_OUT))


def with_neurons(plan: Plan, fit: NewBlocks) -> Plan:
    """The same conversion with neurons reordered, and with the tensors that say so or that a fit of their predictors
    adds.
    """
    structure = replace(plan.structure, **fit.structure_fields())
    tensors = {t.name: _reordered(t, fit) for t in plan.tensors}
    for i, block in enumerate(fit.blocks):
        for made in block.tensors:
            name = names.in_block(i, made.name)
            tensors[name] = PlannedTensor(name, MadeTensor(made.data), made.shape, made.type, made.type)
    ordered = tuple(tensors[name] for name in required_tensors(structure))
    return replace(plan, structure=structure, tensors=ordered)


def _reordered(tensor: PlannedTensor, fit: NewBlocks) -> PlannedTensor:
    at = names.parsed(tensor.name)
    if at is None or at[1] not in _NEURON_TENSORS:
        return tensor
    order = fit.blocks[at[0]].order
    if np.array_equal(order, np.arange(len(order))):
        return tensor
    return replace(tensor, order=order if tensor.order is None else tensor.order[order])


def _planned(name: str, shape: Shape, source: Source | Generated, structure: Structure, types: Types) -> PlannedTensor:
    head = names.weight(names.TOKEN_EMBD if structure.tied_output else names.OUTPUT)
    wanted = (types.output or output_type(types.main)) if name == head else types.main
    if len(shape) == 1 or name.endswith(_ALWAYS_F32):
        wanted = "f32"
    rewrite = named(source.rewrite, mixer_of(structure, name)) if isinstance(source, Source) else IDENTITY
    return PlannedTensor(name, source, shape, fitting(wanted, shape[0]), wanted, rewrite=rewrite)


def mixer_of(structure: Structure, name: str) -> Mixer | None:
    """What mixes tokens in the block that a tensor belongs to."""
    at = names.parsed(name)
    return structure.blocks[at[0]].mixer if at else None


def _sources(arch: Arch, structure: Structure, checkpoint: Checkpoint) -> dict[str, Source | Generated]:
    """The architecture's table with its block numbers filled in, and its names as this checkpoint spells them."""
    prefix = _absent_prefix(arch, checkpoint)
    config = adapted(arch, checkpoint.config)
    required = required_tensors(structure)
    table: dict[str, Source | Generated] = {}
    for template, i, found in _templates(arch, config, structure.block_count):
        name = template.format(i=i)
        choices = [_numbered(source, i, prefix) for source in (found if isinstance(found, tuple) else (found,))]
        mixer, shape = mixer_of(structure, name), required.get(name)
        fitting_ones = (source for source in choices if _fits(source, shape, mixer, checkpoint))
        table[name] = next(fitting_ones, next((one for one in choices if _is_there(one, checkpoint)), choices[0]))
    return table


def _templates(arch: Arch, config: Config, block_count: int) -> Iterator[tuple[str, int, Sources]]:
    """Each tensor of the model and of each block, as the block's kind has it: its GGUF name, the block, and its
    sources.
    """
    kinds = [arch.kinds[kind].tensors for kind in block_kinds(arch, config, block_count)] or [{}] * block_count
    for i, kind in enumerate(kinds):
        for template, given in {**arch.tensors, **kind}.items():
            if i == 0 or "{i}" in template:
                yield template, i, given(config) if callable(given) else given


def _fits(source: Source | Generated, shape: Shape | None, mixer: Mixer | None, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a source in the shape that a tensor of `shape` (in ggml's order) is made from."""
    if isinstance(source, Generated) or shape is None:
        return False
    first = source.numbered(e=0)
    expected = named(source.rewrite, mixer).source_shape(shape[:2][::-1])
    return first.name in checkpoint.tensors and checkpoint.tensors[first.name].shape == expected


def _is_there(source: Source | Generated, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a source, in whatever shape."""
    return isinstance(source, Source) and source.numbered(e=0).name in checkpoint.tensors


def _absent_prefix(arch: Arch, checkpoint: Checkpoint) -> str:
    """The part of the architecture's tensor names that this checkpoint leaves out."""
    return "" if any(name.startswith(arch.base_prefix) for name in checkpoint.tensors) else arch.base_prefix


def _numbered(source: Source | Generated, i: int, prefix: str) -> Source | Generated:
    return source if isinstance(source, Generated) else source.numbered(i, prefix=prefix)


def _left_aside(arch: Arch, structure: Structure, checkpoint: Checkpoint) -> set[str]:
    """The tensors that the architecture knows of, and has no use for."""
    prefix = _absent_prefix(arch, checkpoint)
    patterns = {name.format(i=i).removeprefix(prefix) for name in arch.skip for i in range(structure.block_count)}
    return {name for pattern in patterns for name in fnmatch.filter(checkpoint.tensors, pattern)}


def _told(left: set[str]) -> tuple[str, ...]:
    return (f"{len(left)} tensors of the checkpoint are left aside ({listed(sorted(left), 1)})",) if left else ()


def _useless(arch: Arch, structure: Structure, checkpoint: Checkpoint) -> set[str]:
    """Buffers, and a head that is the embeddings."""
    skipped = set()
    head = arch.tensors.get(names.weight(names.OUTPUT))
    if structure.tied_output and isinstance(head, Source):
        skipped.add(head.name)  # where it is stored as well, it is the same as the embeddings
    return skipped | {name for name, stored in checkpoint.tensors.items() if is_buffer(name, stored.shape)}


def _check_names(
    checkpoint: Checkpoint,
    required: Mapping[str, Shape],
    sources: Mapping[str, Source | Generated],
    skipped: set[str],
) -> None:
    read = [
        source.numbered(e=e)
        for name, shape in required.items()
        if isinstance(source := sources.get(name), Source)
        for e in range(shape[-1] if "{e}" in source.name else 1)
    ]
    used = {source.name for source in read} | {source.columns for source in read if source.columns}
    missing = sorted(used - set(checkpoint.tensors))
    missing += [f"a source of {name}" for name in required if name not in sources]
    unknown = sorted(set(checkpoint.tensors) - used - skipped)
    found = disagreement(missing, unknown)
    refuse_quantised_tensors(f"`{checkpoint.folder}`", unknown)
    hint = explanation(unknown) or common_prefix(missing, unknown)
    if not hint:
        _check_types(checkpoint, [*sorted(used.intersection(checkpoint.tensors)), *unknown])
    if not found:
        return
    head = sources.get("output.weight")
    raise UserError(
        f"`{checkpoint.folder}`: {found}",
        hint
        or (isinstance(head, Source) and "output.weight" in required and without_head(missing, head.name))
        or "config.json and the weights belong to different models, or the model has an option not supported yet",
    )


def _check_types(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse weights that are no floats: whatever their names are, they are quantised."""
    for name in names:
        stored = checkpoint.tensors[name]
        if stored.dtype not in FLOATS:
            raise UserError(
                f"`{stored.file}`: {name} is of type {stored.dtype}, expected {', '.join(FLOATS)}",
                "the checkpoint is quantised already: use the original one",
            )


def _check_shapes(checkpoint: Checkpoint, tensors: list[PlannedTensor]) -> None:
    wrong = []
    for tensor in tensors:
        if not isinstance(tensor.source, Source):
            continue
        expected = tensor.rewrite.source_shape(tensor.shape[::-1])
        wanted = {tensor.source.name: expected} | (
            {tensor.source.columns: expected[1:]} if tensor.source.columns else {}
        )
        for name, shape in wanted.items():
            found = checkpoint.tensors[name].shape
            if found != shape:
                wrong.append(f"{name} is {list(found)} instead of {list(shape)}")
    if wrong:
        raise UserError(
            f"`{checkpoint.folder}`: {len(wrong)} shapes disagree with config.json: {listed(sorted(set(wrong)))}",
            "config.json belongs to another checkpoint",
        )
