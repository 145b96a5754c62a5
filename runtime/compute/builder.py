"""What the parts of a ggml graph are added with: a context, a model's tensors, and the operations that all kinds of
layers use.

Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml, sparse_ffn
from runtime.compute.kv_cache import KvCache
from runtime.compute.operators import Asking, Userdata, add_product, add_tiled, add_tiled_product
from runtime.compute.paging import Paging
from runtime.compute.products import by_rows, repacked_from, tiles_of
from runtime.compute.repack import Fill, Repacked
from runtime.compute.states import StateCache
from runtime.compute.weights import Tensors
from runtime.model_file import tensor_names as n
from runtime.model_file.structure import Structure
from runtime.options import SettledOptions


@dataclass(frozen=True)
class GraphSpec:
    """What distinguishes one graph of a model from another."""

    n_tokens: int
    n_kv: int  # positions that attention reads, padded
    n_outputs: int  # tokens whose logits are wanted
    run: SettledOptions
    dense_from: tuple[float, ...] = ()  # by block: so many tokens at once go through every neuron, in every mode
    # A part of the model: from the hidden states before block `first` (None: from token ids) to those before block
    # `end` (None: to logits).
    first: int | None = None
    end: int | None = None
    tapped: bool = False  # keep inner results
    runs: tuple[int, ...] = ()  # with Mamba blocks: how many tokens of each sequence stand one behind the other
    logged: bool = False  # Mamba blocks keep what their states follow from
    replays: bool = False  # nothing but the states of Mamba blocks, from what was kept
    tiled: bool = False  # matrices are multiplied as they are stored, tile by tile, where there are kernels for it


@dataclass(frozen=True)
class Inputs:
    """What blocks read beside hidden states.

    positions: I32 [n_tokens]. cells: rows of the KV cache, I64 [n_tokens]. outputs: I32 [n_outputs].
    masks: of each distinct window of the model's attentions (0: none), F16 [n_kv, n_tokens].
    states: rows that each sequence's states are read from, and written to, I32 [n_sequences] each; none where no block
    is a Mamba block.
    """

    positions: ggml.TensorP
    cells: ggml.TensorP
    outputs: ggml.TensorP
    masks: dict[int, ggml.TensorP]
    states: tuple[ggml.TensorP, ...] = ()

    @property
    def tensors(self) -> tuple[ggml.TensorP, ...]:
        """All of them, masks by rising window: in the order of `GraphInputs.arrays`."""
        masks = (self.masks[window] for window in sorted(self.masks))
        return self.positions, self.cells, self.outputs, *self.states, *masks


@dataclass(frozen=True)
class Builder:
    """One ggml context, and what is added to it: of a whole model, or of a part.

    device: what will compute it. own: whether our operators may, which only the CPU can. scratch: where matrices of one
    block are repacked for a batch. ffns, products: the userdata of our own operators; must live as long as the graph.
    placed: repacked matrices, by the tensor that they are copies of. taps: inner results, by role, where the spec asks
    for them. arranged: what matrices were multiplied with so far, as tiles want it. choices: by block, how often each
    of its experts was chosen, to which our operators add. paging: what rows must be asked of, None where all are there.
    states: of Mamba blocks. graph: what is built.
    """

    ctx: ggml.ContextP
    s: Structure
    w: Tensors
    kv: KvCache | None
    spec: GraphSpec
    inputs: Inputs
    device: ggml.DeviceP
    own: bool = False
    scratch: Repacked | None = None
    ffns: dict[int, sparse_ffn.Ffn] = field(default_factory=dict)
    products: list[Userdata] = field(default_factory=list)
    placed: dict[str, ggml.TensorP] = field(default_factory=dict)
    taps: dict[str, ggml.TensorP] = field(default_factory=dict)
    arranged: dict[tuple[int | None, int | None], ggml.TensorP] = field(default_factory=dict)
    choices: Mapping[int, npt.NDArray[np.int64]] = field(default_factory=dict)
    paging: Paging | None = None
    states: StateCache | None = None
    graph: ggml.GraphP | None = None

    @property
    def asking(self) -> Asking | None:
        """What asks for rows, where that has to be."""
        return Asking(self.paging, self.products) if self.paging and self.own else None

    def fetched(self, x: ggml.TensorP, names: Collection[str]) -> ggml.TensorP:
        """Let whole matrices be in memory before x is used; returns x, to be used from here on."""
        asking = self.asking
        return asking.whole(self.ctx, x, [self.w[name] for name in names]) if asking else x

    def also(self, x: ggml.TensorP) -> None:
        """Let the graph compute something that its result does not depend on."""
        assert self.graph
        ggml.ggml_build_forward_expand(self.graph, x)

    def norm(self, x: ggml.TensorP, stem: str) -> ggml.TensorP:
        """RMS or layer norm over the first dimension, scaled (and shifted)."""
        normalise = ggml.ggml_rms_norm if self.s.norm == "rms" else ggml.ggml_norm
        x = ggml.ggml_mul(self.ctx, normalise(self.ctx, x, self.s.norm_epsilon), self.w[n.weight(stem)])
        return self.biased(x, stem)

    def linear(self, x: ggml.TensorP, stem: str) -> ggml.TensorP:
        """[n_in, n] -> [n_out, n]."""
        return self.biased(self.times(n.weight(stem), x), stem)

    def times(self, name: str, x: ggml.TensorP) -> ggml.TensorP:
        """A whole matrix [n_in, n_out] with every token: x [n_in, n] -> [n_out, n]."""
        matrix, skips = self.w[name], self.own and self.spec.run.by_rows
        if place := self.placed.get(name):
            return ggml.ggml_mul_mat(self.ctx, place, x)
        if skips and by_rows(x.ne[1]):
            product = sparse_ffn.multiplier(matrix.type, matrix.ne[0], matrix.ne[1], self.spec.run.threads)
            self.products.append(product)
            return add_product(self.ctx, x, matrix, product)
        if (skips or self.spec.tiled) and (tiles := tiles_of(matrix)):
            return self._tiled(matrix, tiles, x)
        return ggml.ggml_mul_mat(self.ctx, self.w.matrix(name), x)

    def _tiled(self, matrix: ggml.TensorP, tiles: sparse_ffn.Tiles, x: ggml.TensorP) -> ggml.TensorP:
        key = x.value, tiles.kernels
        if key not in self.arranged:
            self.arranged[key] = add_tiled(self.ctx, x, tiles)
        return add_tiled_product(self.ctx, self.arranged[key], matrix, tiles, x.ne[1])

    def repacked(self, x: ggml.TensorP, names: Collection[str], release: Collection[str] = ()) -> ggml.TensorP:
        """Let matrices be repacked before x is used, where there is a place for them; returns x, to be used from here
        on.

        release: whose pages of the file are not needed afterwards.
        """
        if not self.scratch:
            return x
        found = {name: self.scratch.tensors.get(place_of(name, self.w[name])) for name in names}
        self.placed.update({name: place for name, place in found.items() if place})
        fills = [Fill(place_of(name, self.w[name]), name, name in release) for name in self.placed if name in found]
        return self.scratch.add_fill(self.ctx, x, fills) if fills else x

    def repacked_for_batch(self, x: ggml.TensorP, names: Collection[str]) -> ggml.TensorP:
        """As `repacked`, for those matrices only that gain by it with so many tokens."""
        some = [name for name in names if self.spec.n_tokens >= repacked_from(self.w[name])] if self.own else ()
        return self.repacked(x, some)

    def biased(self, x: ggml.TensorP, stem: str) -> ggml.TensorP:
        """x plus the bias of that stem, where there is one."""
        bias = self.w.get(n.bias(stem))
        return ggml.ggml_add(self.ctx, x, bias) if bias else x

    def scaled(self, x: ggml.TensorP, factor: float) -> ggml.TensorP:
        """x times a factor; x itself where that is 1."""
        return x if factor == 1 else ggml.ggml_scale_bias(self.ctx, x, factor, 0.0)


def equal_runs(runs: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of tokens, those beside each other that are equally long put together: (length, how many)."""
    return [(length, len(list(group))) for length, group in itertools.groupby(runs)]


def place_of(name: str, tensor: ggml.TensorP) -> str:
    """What the scratch memory calls a matrix: one place for all blocks whose matrices are alike, of which they need not
    have the same formats and shapes.
    """
    block = n.parsed(name)
    n_in, n_out = tensor.ne[:2]
    return f"{block[1] if block else name}, type {tensor.type}, {n_in} x {n_out}"
