"""Where each block of a model lies: the side of its mixer, and the sides of its neurons; and which tensors or rows that
puts on each side.

Pure: names, shapes and numbers of sides. Side 0 is the CPU, side d + 1 the device d of the list that the user named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from runtime.bindings.ffn_shape import FfnShape, Span
from runtime.hybrid.lengths import Longer
from runtime.hybrid.planner import Placement
from runtime.model_file import tensor_names as n
from runtime.model_file.structure import Mamba2, Structure
from runtime.model_file.tensor_shapes import required_tensors

CPU = 0
_ROWS = tuple(name for name in n.NEURON_ROWS if name not in n.TRANSPOSED)  # what a device computes with
NEURON_ELEMENTS = frozenset((*n.NEURON_ROWS, *n.PREDICTOR_ROWS))  # what has a row or an element for each neuron
_OF_NEURONS = NEURON_ELEMENTS | {*n.NEURON_COLUMNS, *n.NEURON_NOTES}


@dataclass(frozen=True)
class Piece:
    """Neurons first .. end - 1 of one block's FFN, or of each of its experts, on a side; or of some of these, by rising
    number. share: of the experts that a token uses, how many are among these on average.
    """

    side: int
    first: int
    end: int
    experts: tuple[int, ...] | None = None
    share: float = 1.0

    @property
    def length(self) -> int:
        """Number of neurons."""
        return self.end - self.first

    @property
    def span(self) -> Span:
        """The same wherever it lies."""
        return Span(self.first, self.end, self.experts)


@dataclass(frozen=True)
class BlockSides:
    """The sides of one block. home: of its norms, its mixer, and the mixer's keys and values. pieces: of all its
    neurons, in their order.
    """

    home: int
    pieces: tuple[Piece, ...] = ()

    @property
    def divided(self) -> bool:
        """Whether some of the neurons are not where the block is at home."""
        return any(p.side != self.home for p in self.pieces)

    @property
    def of_some_experts(self) -> bool:
        """Whether a piece is of some experts only."""
        return any(p.experts is not None for p in self.pieces)

    def on(self, side: int) -> tuple[Piece, ...]:
        """The pieces on a side."""
        return tuple(p for p in self.pieces if p.side == side)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides that have neurons."""
        return tuple(sorted({p.side for p in self.pieces}))


@dataclass(frozen=True)
class Slice:
    """A tensor, or some of its neurons: `first`..`end` along `axis` (1: rows, or elements of a vector; 0: columns), all
    where axis is None. experts: of these alone, None for all.
    """

    name: str
    axis: int | None = None
    first: int = 0
    end: int = 0
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorMap:
    """Where all of one model lies. head: the side of the output head. Embeddings are always the CPU's.

    predicted: whether blocks with a predictor use it for the neurons that the CPU computes.
    """

    structure: Structure
    blocks: tuple[BlockSides, ...]
    head: int
    predicted: bool

    def __post_init__(self) -> None:
        for i, (block, shape) in enumerate(zip(self.blocks, self.structure.blocks, strict=True)):
            _check(i, block, shape.ffn)

    @property
    def n_sides(self) -> int:
        """Sides up to the last one that holds anything."""
        return 1 + max(self.head, *(max(b.home, *(CPU, *b.sides)) for b in self.blocks))

    def homes(self, side: int) -> list[int]:
        """The blocks whose home a side is."""
        return [i for i, block in enumerate(self.blocks) if block.home == side]

    def kv_lengths(self, side: int) -> dict[int, int]:
        """By block, the elements of one token's keys (and of its values) that lie on a side."""
        return {i: a.kv_length for i, a in self.structure.attentions.items() if self.blocks[i].home == side}

    def mambas(self, side: int) -> dict[int, Mamba2]:
        """The Mamba-2 mixers whose states lie on a side, by block."""
        return {i: m for i, m in self.structure.mambas.items() if self.blocks[i].home == side}

    @cached_property
    def on_devices(self) -> tuple[int, ...]:
        """By block, the neurons on all devices together; with experts, of those that one token uses, on average. A
        shared expert's are where the block is at home.
        """
        used = (b.ffn.experts.used if b.ffn and b.ffn.experts else 1 for b in self.structure.blocks)
        shared = self.structure.shared
        beside = (shared[i].n_ff if i in shared and b.home != CPU else 0 for i, b in enumerate(self.blocks))
        return tuple(
            round(n * sum(p.share * p.length for p in block.pieces if p.side != CPU)) + m
            for n, m, block in zip(used, beside, self.blocks, strict=True)
        )

    def scored_at_home(self, i: int) -> bool:
        """Whether a device computes the predictor's scores for the CPU's neurons of block `i`. Sign bits are the CPU's:
        no device has an operation for them.
        """
        s, block = self.structure, self.blocks[i]
        ffn = s.blocks[i].ffn
        wanted = self.predicted and s.rank(i) > 0 and s.predictor != "signbit" and not (ffn and ffn.experts)
        return wanted and block.home != CPU and bool(block.on(CPU))

    @property
    def head_stem(self) -> str:
        """Stem of the matrix that makes logits."""
        return n.TOKEN_EMBD if self.structure.tied_output else n.OUTPUT

    @cached_property
    def whole_on_cpu(self) -> frozenset[int]:
        """The blocks with an FFN that are wholly the CPU's, in one piece."""
        blocks = enumerate(self.blocks)
        return frozenset(i for i, b in blocks if b.home == CPU and len(b.pieces) == 1 and not b.divided)

    # --- what a device holds -----------------------------------------------------------------------------------------

    def own(self, side: int) -> list[Slice]:
        """What a device holds beside neurons: of the blocks whose home it is, and the head."""
        names, homes = required_tensors(self.structure), self.homes(side)
        return [Slice(name) for name in names if self._is_own(name, side, homes)]

    def _is_own(self, name: str, side: int, homes: Sequence[int]) -> bool:
        block = n.parsed(name)
        if block is None:
            return bool(homes) if name == n.weight(n.ROPE_FREQS) else self.head == side and self._of_head(name)
        i, short = block
        if i not in homes or short in _OF_NEURONS or short in n.TRANSPOSED:
            return False
        return short != n.weight(n.PREDICTOR_IN) or self.scored_at_home(i)

    def _of_head(self, name: str) -> bool:
        return name == n.weight(self.head_stem) or name.startswith((n.OUTPUT_NORM, n.OUTPUT_PROJ))

    def neurons(self, i: int, piece: Piece) -> list[Slice]:
        """The rows and columns that a side computes a piece of block `i` with."""
        rows = (*n.NEURON_ROWS, *n.PREDICTOR_ROWS) if piece.side == CPU else _ROWS
        return self._there(i, ((1, rows), (0, n.NEURON_COLUMNS)), piece)

    def scorer(self, i: int, piece: Piece) -> list[Slice]:
        """What the home of block `i` computes the scores of a piece on the CPU with, beside the first matrix of the
        predictor.
        """
        return self._there(i, ((1, (n.weight(n.PREDICTOR_OUT),)),), piece)

    def _there(self, i: int, groups: tuple[tuple[int, tuple[str, ...]], ...], p: Piece) -> list[Slice]:
        names = self._names
        wanted = ((n.in_block(i, short), axis) for axis, group in groups for short in group)
        slices = (Slice(name, axis, p.first, p.end, p.experts) for name, axis in wanted)
        return [s for s in slices if s.name in names]

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(required_tensors(self.structure))


def cpu_alone(s: Structure, predicted: bool) -> TensorMap:
    """All of a model on the CPU."""
    return TensorMap(s, tuple(BlockSides(CPU, _cut(block.ffn, ())) for block in s.blocks), CPU, predicted)


def _check(i: int, block: BlockSides, ffn: FfnShape | None) -> None:
    """Raises ValueError where the pieces of block `i` do not hold each neuron, of each expert, once and in order."""
    n, count = (ffn.expert_length, ffn.experts.count if ffn.experts else 0) if ffn else (0, 0)
    for p in block.pieces:
        if p.length <= 0:
            raise ValueError(f"block {i}: a piece must hold a neuron")
        if p.experts is not None and (not p.experts or not set(p.experts) <= set(range(count))):
            raise ValueError(f"block {i}: pieces of experts {p.experts}, of {count}")
        if p.experts is not None and list(p.experts) != sorted(set(p.experts)):
            raise ValueError(f"block {i}: the experts of a piece must rise")
    for expert in range(max(1, count)):
        pieces = [p for p in block.pieces if p.experts is None or expert in p.experts]
        ends = [0, *(p.end for p in pieces)]
        if [p.first for p in pieces] != ends[:-1] or ends[-1] != n:
            what = "each of its neurons, of each expert," if count else "each of its neurons"
            raise ValueError(f"block {i}: its pieces must hold {what} once, in their order")
        own = [p for p in pieces if p.side == CPU]
        if block.of_some_experts and any(p.end != q.first for p, q in pairwise(own)):
            raise ValueError(f"block {i}: of some experts, with other sides' pieces between those of the CPU")
    if len({(p.side, p.first) for p in block.pieces}) != len(block.pieces):
        raise ValueError(f"block {i}: two pieces on a side begin with the same neuron")


def of_placement(
    s: Structure, placement: Placement, predicted: bool, refused: frozenset[int] = frozenset()
) -> TensorMap:
    """What the planner chose: the last blocks at home on the first device, a prefix of neurons on the devices, the
    others on the CPU. refused: blocks whose mixer the device cannot compute, which stay at home on the CPU.
    """
    homes = (CPU if i < placement.resident_from or i in refused else 1 for i in range(s.block_count))
    longer = placement.longer or (None,) * s.block_count
    sides = (
        BlockSides(home, _cut(block.ffn, hot, more))
        for home, block, hot, more in zip(homes, s.blocks, placement.hot, longer, strict=True)
    )
    return TensorMap(s, tuple(sides), 1 if placement.head else CPU, predicted)


def _cut(ffn: FfnShape | None, hot: Sequence[int], longer: Longer | None = None) -> tuple[Piece, ...]:
    """Consecutive pieces of an FFN's neurons, or of each expert's: so many on each device, the others on the CPU.

    longer: of which experts the first device holds more.
    """
    if not ffn:
        return ()
    return tuple(_unequal(ffn, hot[0], longer) if longer else _pieces(ffn.expert_length, hot))


def _pieces(n: int, hot: Sequence[int]) -> Iterator[Piece]:
    at = 0
    for side, length in (*enumerate(hot, start=1), (CPU, n - sum(hot))):
        if length:
            yield Piece(side, at, at + length)
        at += length


def _unequal(ffn: FfnShape, first: int, longer: Longer) -> Iterator[Piece]:
    """Neurons up to `first` of every expert and up to `longer.end` of some on the first device, the others on the
    CPU.
    """
    assert ffn.experts
    others = tuple(sorted({*range(ffn.experts.count)} - {*longer.experts}))
    if first:
        yield Piece(1, 0, first)
    yield Piece(1, first, longer.end, longer.experts, longer.share)
    if others:
        yield Piece(CPU, first, longer.end, others, 1 - longer.share)
    if longer.end < ffn.expert_length:
        yield Piece(CPU, longer.end, ffn.expert_length)
