"""A model of random weights whose neurons fire as planned: every tensor of the file as a stream of bytes.

How activity is planted. The pre-activation of a neuron is (low-rank part + noise) . x + bias, where x, the normed input
of the FFN, has variance 1.
LayerNorm models have a real bias. RMSNorm models keep a first block of residual coordinates that nothing writes to:
coordinate 0 is the same for every token, the others are 0, and the norm's weight turns it into 1, so that the gate's
column 0 is the bias. Its sign does not depend on the size of the stream. The low-rank part is the stored predictor
itself; attention and FFN add little to the stream, so activity is the same in every block.

Encoding is what takes time, so nothing is encoded twice: every block has the same gate rows, rows and groups of columns
each in an order of its own, with the biases of its own neurons put into their first bytes. Columns in another order see
another part of x, so that blocks do not fire together. The experts of a block share these rows, too, each with some of
them in an order of its own; each fires as planned when it is chosen, and `bench.routing` plans that. What is planted in
one block is in `bench.planted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from bench.firing_rates import plan_firing
from bench.planted import PlantedBlock
from bench.pool import GROUP, Bytes, ColumnPool, Floats, RowPool, choose_groups, decode, encode_rows
from bench.routing import plan_routing
from convert.formats import NUMBERS, encode, fitting, output_type, row_bytes
from runtime.bindings import ggml
from runtime.bindings.ffn_shape import FfnShape
from runtime.errors import UserError
from runtime.model_file import tensor_names as names
from runtime.model_file.structure import Attention, Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import NewTensor

POOL_ROWS = 2048
EXPERTS_ROWS = 8192  # that experts choose their gates from, where there are as many
NOISE = 0.2  # standard deviation of what the predictor cannot know of a pre-activation, whose own is 1
FFN_GROWTH, MIXER_GROWTH = 0.3, 0.1  # what all blocks together add to the stream's variance, at most
_TYPICAL_ATTENTION = 0.3  # of that: an average over many values is smaller than one value
_FLOATS = (*names.NEURON_NOTES, *names.ROUTERS, *names.PREDICTOR_BIASES, *names.MAMBA_NUMBERS)
_SMALL_TYPES = ("q4_0", "q4_k", "q5_k")  # of files whose predictor is q4_0


Order = npt.NDArray[np.int64]


class Synthetic:
    """A planned model.

    structure: with neuron order and predictor; `streams` are its tensors, made while they are written.

    shape: from bench.shapes. active: share of neurons that fire. type: of the matrices, as in `convert --type`.
    Raises UserError for a type whose blocks are too long for the shape.
    """

    def __init__(self, shape: Structure, active: float, type_name: str, seed: int = 0) -> None:
        self.structure = shape
        self.ffn = next(iter(shape.ffns.values()))  # of every block that has one; so is what follows
        self.shared = next(iter(shape.shared.values()), None)
        self.attention = next(iter(shape.attentions.values()))
        self.mamba = next(iter(shape.mambas.values()), None)
        d, ff = self.ffn.n_embd, self.ffn.n_ff
        self.type, self.seed = type_name, seed
        self.predictor_type = "q4_0" if type_name in _SMALL_TYPES else "q8_0"
        both = [ffn for ffn in (self.ffn, self.shared) if ffn]
        self.firing = {ffn: plan_firing(ffn.expert_length, active) for ffn in both}  # with experts, of each
        self.routing = plan_routing(self.ffn.experts) if self.ffn.experts else None
        self.constant = max(32, ggml.ggml_blck_size(NUMBERS[type_name])) if shape.norm == "rms" else 0
        if self.constant > d // 4:
            raise UserError(f"--type {type_name}: its blocks are too long for {d} wide rows", "use q4_0, q8_0 or f16")
        self.pool_rows = min(POOL_ROWS, ff // GROUP * GROUP)
        self.group = math.gcd(GROUP, *(ffn.expert_length for ffn in both))  # of neurons, whose down rows stay together
        longest = max(ffn.expert_length for ffn in both)
        self.gate_rows = min(ff, max(EXPERTS_ROWS, longest)) if self.ffn.experts else ff
        rank = min(128, d // 8)
        error = math.hypot(NOISE, rounding_error(fitting(type_name, d), d))
        self.structure = replace(
            shape,
            neuron_order="hot",
            predictor="lowrank",
            predictor_rank=tuple(rank if block.ffn else 0 for block in shape.blocks),
            predictor_error=(error,) * shape.block_count,
        )
        self._make_pools()
        self._block = PlantedBlock(self, 0)

    def _make_pools(self) -> None:
        s, rng = self.structure, np.random.default_rng([self.seed, 1 << 20])
        d, main = s.embedding_length, fitting(self.type, s.embedding_length)
        head = fitting(output_type(self.type), d)
        plain = self.normal(rng, d, 1 / math.sqrt(d))
        self.plain = RowPool(plain, main)
        self.head = RowPool(plain, head)
        embedding = self.normal(rng, d, 1.0)
        if self.constant:
            embedding[:, 0] = math.sqrt(d)
        self.embedding = RowPool(embedding, head if s.tied_output else main)
        self.output = self._output_pool(rng, self.attention.query_length)
        down = self.normal(rng, d, self._down_scale())
        self.down_t = RowPool(down, main, self.group)
        kinds = {fitting(self.type, ffn.expert_length) for ffn in self.firing}
        self.down = {kind: ColumnPool(down, kind, self.group) for kind in kinds}
        self.gates = GatePool(self, rng)
        self.mamba_output = self._output_pool(rng, self.mamba.inner_length) if self.mamba else None

    def _output_pool(self, rng: np.random.Generator, length: int) -> RowPool:
        """Rows of what a mixer's `length` elements are multiplied with; the growth is as wanted."""
        rows = self.normal(rng, length, math.sqrt(MIXER_GROWTH / self._halves(mixers=True) / length))
        return RowPool(rows, fitting(self.type, length))

    def normal(self, rng: np.random.Generator, length: int, scale: float) -> Floats:
        """As many rows as a pool has; nothing where the constant is."""
        rows = rng.standard_normal((self.pool_rows, length), np.float32) * np.float32(scale)
        if length == self.structure.embedding_length:
            rows[:, : self.constant] = 0
        return rows

    def _down_scale(self) -> float:
        """Standard deviation of the down projection's elements: the growth is as wanted."""
        experts = self.ffn.experts
        weight = experts.scale**2 / experts.used if experts else 1  # squares of equal weights that add up to the scale
        energy = sum(self._energy(ffn) * (1 if ffn.shared else weight) for ffn in self.firing)
        return math.sqrt(FFN_GROWTH / self._halves(mixers=False) / max(energy, 1e-9))

    def _energy(self, ffn: FfnShape) -> float:
        """Expected squares of what the neurons of an FFN, or of one expert, multiply their down rows with."""
        firing = self.firing[ffn]
        if ffn.activation == "relu2":
            return float(firing.square_energies.sum())
        centred = not ffn.gated and ffn.bias  # the down projection's bias takes the mean away
        return float((firing.energies - (firing.outputs**2 if centred else 0)).sum())

    def streams(self) -> list[NewTensor]:
        """Every tensor of the file, in its order; to be written once, in that order or any other."""
        return [self._stream(name, shape) for name, shape in required_tensors(self.structure).items()]

    def _stream(self, name: str, shape: tuple[int, ...]) -> NewTensor:
        kind = self._type(name, shape)
        rows, length = (math.prod(shape[1:]), shape[0]) if len(shape) > 1 else (shape[0], 1)
        return NewTensor(name, shape, NUMBERS[kind], rows * row_bytes(kind, length), self._pieces(name, shape, kind))

    def _type(self, name: str, shape: tuple[int, ...]) -> str:
        _, short = names.parsed(name) or (0, name)
        if short in names.INDICES:
            return "i32"
        if len(shape) == 1 or short in (*_FLOATS, "position_embd.weight"):
            return "f32"
        if ".predictor_" in name:
            return self.predictor_type
        head = "token_embd.weight" if self.structure.tied_output else "output.weight"
        return fitting(output_type(self.type) if name == head else self.type, shape[0])

    def _pieces(self, name: str, shape: tuple[int, ...], kind: str) -> Iterator[Bytes]:
        if name.startswith("blk."):
            _, i, part = name.split(".", 2)
            yield from self.block(int(i)).pieces(part, shape)
        elif len(shape) == 1:
            yield encode(self.vector(name, self.structure.block_count), kind)
        elif name == "position_embd.weight":
            rng = np.random.default_rng([self.seed, 1 << 21])
            yield encode(rng.standard_normal(shape[::-1], np.float32) * np.float32(0.1), kind)
        else:
            pool = self.embedding if name == "token_embd.weight" else self.head
            groups = choose_groups(np.random.default_rng([self.seed, 1 << 22]), self.pool_rows, shape[1])
            yield from pool.pieces(groups, shape[1])

    def block(self, i: int) -> PlantedBlock:
        """What is planted in block `i`; the last one asked for is kept."""
        if self._block.i != i:
            self._block = PlantedBlock(self, i)
        return self._block

    def _halves(self, mixers: bool, end: int | None = None) -> int:
        """How many of the first `end` blocks, or of all, have a mixer, or an FFN."""
        return sum(bool(block.mixer if mixers else block.ffn) for block in self.structure.blocks[:end])

    def variance(self, depth: float) -> float:
        """Of the stream behind so many blocks, or, with a half more, before an FFN."""
        half = depth % 1
        ffns = (self._halves(mixers=False, end=int(depth)) + half) / self._halves(mixers=False)
        mixers = self.structure.blocks[: math.ceil(depth)]
        kinds = [_TYPICAL_ATTENTION if isinstance(block.mixer, Attention) else 1 for block in mixers if block.mixer]
        return 1 + ffns * FFN_GROWTH + sum(kinds) / self._halves(mixers=True) * MIXER_GROWTH

    def vector(self, name: str, depth: float) -> Floats:
        """A norm's weight or bias, or another bias. depth: blocks before it; a half more for the norm of an FFN."""
        s = self.structure
        d = s.embedding_length
        if not name.endswith("norm.weight"):
            return np.zeros(self.attention.kv_length if name.startswith(("attn_k.", "attn_v.")) else d, np.float32)
        if not self.constant:
            return np.ones(d, np.float32)
        variance = self.variance(depth)
        rms = math.sqrt(1 + variance * (d - self.constant) / d)
        weight = np.full(d, rms / math.sqrt(variance), np.float32)
        # The constant, sqrt(d) in the stream: 1 for the FFN, where it is the gate's bias; nobody else sees it.
        weight[: self.constant] = rms / math.sqrt(d) if name.startswith("ffn") else 0
        return weight


class GatePool:
    """The gate rows of every block, without biases, and the predictor that knows them, encoded.

    weights: bytes [rows, groups of columns, their bytes]; inner_bytes, outer_bytes: of the predictor, [rank, groups of
    columns, their bytes] and [rows, row bytes]. n_first: groups that hold the constant, which stay where they are.
    spread: float32 [rows], what the predictor and the noise give a pre-activation, as a standard deviation.
    """

    def __init__(self, model: Synthetic, rng: np.random.Generator) -> None:
        d, ff, rank, kind = model.ffn.n_embd, model.gate_rows, max(model.structure.predictor_rank), model.predictor_type
        self.type, self.constant = model.plain.type, model.constant
        inner = rng.standard_normal((rank, d), np.float32) / np.float32(math.sqrt(d - model.constant))
        inner[:, : model.constant] = 0
        outer = rng.standard_normal((ff, rank), np.float32) * np.float32(math.sqrt((1 - NOISE**2) / rank))
        inner_bytes, outer_bytes = encode_rows(inner, kind), encode_rows(outer, kind)
        known, outer = decode(inner_bytes, kind, d), decode(outer_bytes, kind, rank)
        width = max(32, ggml.ggml_blck_size(NUMBERS[self.type]))  # columns of a group: whole blocks of both types
        self.inner_bytes = inner_bytes.reshape(rank, d // width, -1)
        self.outer_bytes = outer_bytes.reshape(ff, -1)
        self.n_first = self.constant // width
        explained = ((outer @ (known @ known.T)) * outer).sum(1)
        self.spread = np.sqrt(explained + NOISE**2).astype(np.float32)
        noise = model.normal(rng, d, NOISE / math.sqrt(d - model.constant))
        n = len(noise)
        parts = [encode_rows(outer[at : at + n] @ known + noise[: ff - at], self.type) for at in range(0, ff, n)]
        self.weights = np.concatenate(parts).reshape(ff, d // width, -1)

    def order_of_columns(self, rng: np.random.Generator) -> Order:
        """The groups of columns in a random order."""
        rest = np.arange(self.n_first, self.weights.shape[1])
        return np.concatenate([np.arange(self.n_first), rng.permutation(rest)])

    def rows(self, which: Order, columns: Order, biases: Floats) -> Bytes:
        """Bytes of some rows, with a bias for each in column 0 where the model has the constant."""
        chosen = self.weights[which[:, None], columns].reshape(len(which), -1)
        if self.constant:
            head = np.zeros((len(which), self.constant), np.float32)
            head[:, 0] = biases
            encoded = encode(head, self.type).reshape(len(which), -1)
            chosen[:, : encoded.shape[1]] = encoded
        return chosen.reshape(-1)


def rounding_error(type_name: str, length: int) -> float:
    """How far normally distributed rows of `length` are from their encoded selves: relative, root mean square."""
    rows = np.random.default_rng(0).standard_normal((64, length), np.float32)
    return float(np.sqrt(np.mean((decode(encode(rows, type_name), type_name, length) - rows) ** 2)))
