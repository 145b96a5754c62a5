"""What is planted in one block of a synthetic model: which rows and groups of its pools each tensor consists of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.pool import GROUP, Bytes, Floats, Groups, choose_groups, row_ids
from bench.routing import router_rows
from convert.formats import encode, fitting
from runtime.bindings.ffn_shape import FfnShape
from runtime.model_file import tensor_names as names

if TYPE_CHECKING:
    from bench.synthetic import Synthetic

MARGIN = 0.6  # threshold of the predictor, in units of its error
_STEP_BIAS = -3.0  # of Mamba's steps: softplus of it is 0.05
_CONVOLUTION = 0.5  # standard deviation of its weights
_ROUTER_BIAS = 0.02  # standard deviation, beside scores from 0 to 1
_FASTEST = 16.0  # a Mamba head forgets at a rate from 1 to this

_ATTENTION = (names.ATTN_Q, names.ATTN_K, names.ATTN_V, names.ATTN_OUTPUT)

Order = npt.NDArray[np.int64]


class PlantedNeurons:
    """The neurons of a block's FFN, or of its shared expert: biases, the order of gate rows, and which groups of pools
    the other matrices consist of.

    groups: by name; those of the block's mixer, too.
    """

    def __init__(self, model: Synthetic, ffn: FfnShape, i: int, rng: np.random.Generator) -> None:
        self.m, self.ffn, self.i, self.stems, self._rng = model, ffn, i, names.stems(ffn), rng
        experts = ffn.n_ff // ffn.expert_length
        self.gates, self.columns = self._choice(model.gate_rows), model.gates.order_of_columns(rng)
        self.bias = (np.tile(model.firing[ffn].means, experts) * model.gates.spread[self.gates]).astype(np.float32)
        self.groups = drawn_groups(model, rng, ffn.n_ff)
        self.ids = self._choice(ffn.expert_length).astype(np.int32)
        self.experts = rng.permutation(experts)

    def _choice(self, n: int) -> Order:
        """For each expert as many different numbers below n as it has neurons, in a random order: [n_ff]."""
        ffn = self.ffn
        each = range(ffn.n_ff // ffn.expert_length)
        return np.concatenate([self._rng.permutation(n)[: ffn.expert_length] for _ in each])

    def matrix(self, stem: str) -> Iterator[Bytes] | None:
        """The bytes of a matrix over neurons; None for one that has no such stem."""
        m, ffn = self.m, self.ffn
        if stem == names.row_matrices(ffn)[0]:
            return self._gate_rows()
        if stem == self.stems.up:
            return m.plain.pieces(self.groups["up"], ffn.n_ff)
        if stem == self.stems.down_t:
            return m.down_t.pieces(self.groups["down"], ffn.n_ff)
        return self._columns() if stem == self.stems.down else None

    def _gate_rows(self) -> Iterator[Bytes]:
        for at in range(0, self.ffn.n_ff, GROUP):
            some = slice(at, at + GROUP)
            yield self.m.gates.rows(self.gates[some], self.columns, self.bias[some])

    def _columns(self) -> Iterator[Bytes]:
        pool = self.m.down[fitting(self.m.type, self.ffn.expert_length)]
        each = self.ffn.expert_length // pool.group  # of one expert
        for at in range(0, self.ffn.n_ff // pool.group, each):
            yield from pool.pieces(self.groups["down"][at : at + each])

    def notes(self) -> Mapping[str, Callable[[], npt.NDArray[Any]]]:
        """What makes the numbers of the predictor's bias, the neurons' frequencies and biases, and the router, by short
        name; not their order.
        """
        m, stems, first = self.m, self.stems, names.row_matrices(self.ffn)[0]
        of_experts = {names.weight(names.ROUTER): self._router, names.EXPERT_FREQ: self._expert_frequencies}
        return {
            **(of_experts if self.ffn.experts else {}),
            stems.freq: lambda: np.tile(m.firing[self.ffn].frequencies, self.ffn.n_ff // self.ffn.expert_length),
            names.bias(stems.predictor_out): lambda: self.bias + MARGIN * m.structure.predictor_error[self.i],
            names.bias(first): lambda: self.bias,
            names.bias(names.FFN_DOWN): self._centring,
        }

    def predictor(self, part: str) -> Bytes | None:
        """The bytes of a predictor's matrix; None for another tensor."""
        if part == names.weight(names.PREDICTOR_IN):
            return self.m.gates.inner_bytes[:, self.columns].reshape(-1)
        if part == names.weight(self.stems.predictor_out):
            return self.m.gates.outer_bytes[self.gates].reshape(-1)
        return None

    def _centring(self) -> npt.NDArray[np.float64]:
        """Ungated outputs are positive, so that their mean is a vector of its own: this bias takes it away."""
        ids = row_ids(self.groups["down"], self.ffn.n_ff, self.m.group)
        share = np.zeros(self.m.pool_rows)
        np.add.at(share, ids, self.m.firing[self.ffn].outputs)
        return -share @ self.m.down_t.floats()

    def _router(self) -> Floats:
        m, d, experts = self.m, self.ffn.n_embd, self.ffn.experts
        assert m.routing and experts and m.constant, "an RMSNorm model with experts"
        # The normed input has 1 as its first coordinate; the stream has what the embedding put there.
        seen = (math.sqrt(d), math.sqrt(m.variance(self.i))) if experts.tap == "block" else (1.0, 1.0)
        return router_rows(self._rng, m.routing.means[self.experts], d, m.constant, seen)

    def _expert_frequencies(self) -> npt.NDArray[np.float64]:
        assert self.m.routing
        return self.m.routing.frequencies[self.experts]


class PlantedBlock:
    """What is planted in block `i`."""

    def __init__(self, model: Synthetic, i: int) -> None:
        self.m, self.i = model, i
        self._rng = np.random.default_rng([model.seed, i])
        block = model.structure.blocks[i]
        self.ffns = []
        if block.ffn:
            self.ffns.append(PlantedNeurons(model, block.ffn, i, self._rng))
        if block.shared:
            rng = np.random.default_rng([model.seed, i, 1])
            self.ffns.append(PlantedNeurons(model, block.shared, i, rng))
        self.groups = self.ffns[0].groups if self.ffns else drawn_groups(model, self._rng, 0)

    def pieces(self, part: str, shape: tuple[int, ...]) -> Iterator[Bytes]:
        """The bytes of the block's tensor `part`, e.g. "ffn_up.weight"."""
        m, (kind, _, _) = self.m, part.partition(".")
        found = [made for ffn in self.ffns if part.endswith("weight") and (made := ffn.matrix(kind)) is not None]
        if found:
            yield from found[0]
        elif part == names.weight(names.ATTN_OUTPUT):
            yield from m.output.pieces(self.groups[kind], shape[1], zeros=m.constant)
        elif part == names.weight(names.SSM_OUT):
            assert m.mamba_output
            yield from m.mamba_output.pieces(self.groups[kind], shape[1], zeros=m.constant)
        elif kind in (*_ATTENTION, names.SSM_IN) and len(shape) > 1:
            yield from m.plain.pieces(self.groups[kind], shape[1])
        else:
            yield self._small(part, shape)

    def _small(self, part: str, shape: tuple[int, ...]) -> Bytes:
        """Vectors, the predictor, the router, and Mamba's numbers."""
        made = {name: numbers for ffn in self.ffns for name, numbers in ffn.notes().items()} | self._mamba(shape)
        for ffn in self.ffns:
            if (matrix := ffn.predictor(part)) is not None:
                return matrix
            if part == ffn.stems.index:
                return ffn.ids.view(np.uint8)
        depth = self.i + 0.5 if part.startswith("ffn_norm") else self.i
        return encode(made.get(part, lambda: self.m.vector(part, depth))(), "f32")

    def _mamba(self, shape: tuple[int, ...]) -> dict[str, Callable[[], npt.NDArray[Any]]]:
        """What makes the numbers of a Mamba mixer, and of a router's bias, of a tensor's shape."""
        rows = shape[::-1]
        return {
            names.weight(names.SSM_CONV): lambda: _CONVOLUTION * self._rng.standard_normal(rows, np.float32),
            names.bias(names.SSM_CONV): lambda: np.zeros(rows),
            names.bias(names.SSM_DT): lambda: np.full(rows, _STEP_BIAS),
            names.SSM_A: lambda: -self._rng.uniform(1, _FASTEST, rows),
            names.SSM_D: lambda: np.ones(rows),
            names.weight(names.SSM_NORM): lambda: np.ones(rows),
            names.bias(names.ROUTER_BIAS): lambda: _ROUTER_BIAS * self._rng.standard_normal(rows),
        }


def drawn_groups(model: Synthetic, rng: np.random.Generator, n_ff: int) -> dict[str, Groups]:
    """Groups of pools for the matrices of a block with so many neurons, by what they are."""
    rows = max(n_ff, model.attention.query_length)
    found = {name: choose_groups(rng, model.pool_rows, rows, model.group if name == "down" else GROUP)
             for name in ("up", "down", *_ATTENTION)}  # fmt: skip
    if model.mamba:
        rows = max(model.structure.embedding_length, model.mamba.inner_length + model.mamba.conv_channels + GROUP)
        found |= {name: choose_groups(rng, model.pool_rows, rows) for name in names.MAMBA_MATRICES}
    return found
