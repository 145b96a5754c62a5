"""An FFN of neurons, each a row of the up (and gate) and of the transposed down projection: all of them, those that
fire, or those that a predictor names.

Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.bindings import ggml, sparse_ffn
from runtime.bindings.ffn_shape import FfnShape, Span
from runtime.compute.builder import Builder
from runtime.compute.operators import Chosen, NativeTensors, add_choice, add_native_ffn, add_predictor
from runtime.compute.products import by_rows, tiles_of
from runtime.model_file import tensor_names as n


@dataclass(frozen=True)
class FfnInputs:
    """What an FFN reads, F32 [n_embd, n] each.

    x: its input. stream: what a predictor sees that does not see x: the hidden states before the FFN's norm, which in a
    parallel block are the block's own input. chosen: each token's experts; None where all neurons are every token's.
    """

    x: ggml.TensorP
    stream: ggml.TensorP
    chosen: Chosen | None = None


class NeuronFfn:
    """The FFN of block `i`; or a span of its neurons, whose rows the builder's tensors hold.

    A product is [n_embd, n], without the bias of the down projection. Where neurons are normalised before they are
    projected (`sub_norm`) it is [n_embd + 1, n]: the last row holds the sum of their squares, and `finished` divides.
    So the products of two parts of the neurons add up to the product of all, element by element.
    """

    def __init__(self, b: Builder, shape: FfnShape, i: int, spans: Sequence[Span] = ()) -> None:
        self.b, self.i, self.stems = b, i, n.stems(shape)
        self.shape = shape.part(spans[0].end - spans[0].first) if spans else shape
        self.norm = n.in_block(i, n.FFN_NORM)

    def product(self, given: FfnInputs) -> ggml.TensorP:
        """The product, in the way that the graph's spec asks for."""
        b, chosen = self.b, given.chosen
        if self._whole(given.x.ne[1]):
            return self.dense(given.x, chosen)
        if b.spec.run.chooses and b.s.rank(self.i):
            seen = given.x if b.s.predictor_tap == "ffn_norm" else given.stream
            return self.native(given.x, self.candidates(seen, chosen), chosen)
        return self.native(given.x, None, chosen)

    def _whole(self, n_tokens: int) -> bool:
        """Whether so many tokens go through whole matrices."""
        spec = self.b.spec
        return spec.run.ffn == "dense" or bool(spec.dense_from and n_tokens >= spec.dense_from[self.i])

    def routed(self, x: ggml.TensorP, entry: ggml.TensorP) -> Chosen | None:
        """The experts of each token; None where all neurons are every token's. x: the FFN's input; entry: the block's
        own.
        """
        return None

    def entered(self, x: ggml.TensorP) -> ggml.TensorP:
        """What the neurons see, from the FFN's input: [n_embd, n]."""
        return x

    def finished(self, y: ggml.TensorP) -> ggml.TensorP:
        """What is added to the residual stream, from the product of all neurons: [n_embd, n]."""
        y = self._normalised(y) if self.shape.sub_norm else y
        return self.b.scaled(self.b.biased(y, self._named(n.FFN_DOWN)), self.b.s.residual_scale)

    def _normalised(self, y: ggml.TensorP) -> ggml.TensorP:
        """[n_embd + 1, n] -> [n_embd, n]: a product divided by the root mean square of the neurons that made it."""
        ctx, d, row = self.b.ctx, self.shape.n_embd, y.nb[1]
        squares = ggml.ggml_cont(ctx, ggml.ggml_view_2d(ctx, y, 1, y.ne[1], row, d * 4))
        mean = ggml.ggml_scale_bias(ctx, squares, 1 / self.shape.n_ff, self.b.s.norm_epsilon)
        product = ggml.ggml_cont(ctx, ggml.ggml_view_2d(ctx, y, d, y.ne[1], row, 0))
        return ggml.ggml_div(ctx, product, ggml.ggml_sqrt(ctx, mean))

    def _named(self, stem: str) -> str:
        return n.in_block(self.i, stem)

    # --- all neurons, with ggml's operations -------------------------------------------------------------------------

    def dense(self, x: ggml.TensorP, chosen: Chosen | None = None) -> ggml.TensorP:
        """The product through whole matrices, every neuron: in `dense` mode ggml's own products."""
        b = self.b
        names = [name for stem in self.stems.matrices if b.w.get(name := n.weight_of(self.i, stem))]
        x = b.fetched(x, names)
        # No other mode reads `ffn_down`: its pages are released again.
        x = b.repacked(x, names, release=[n.weight_of(self.i, self.stems.down)])
        gate, up = None, b.linear(x, self._named(self.stems.up))
        b.taps["up"] = up
        if self.shape.gated:
            gate = b.taps["gate"] = b.linear(x, self._named(self.stems.gate))
        h = self.strengths(gate, up)
        y = b.times(n.weight_of(self.i, self.stems.down), h)
        if self.shape.sub_norm:
            y = ggml.ggml_concat(b.ctx, y, ggml.ggml_sum_rows(b.ctx, ggml.ggml_sqr(b.ctx, h)), 0)
        return y

    def strengths(self, gate: ggml.TensorP | None, up: ggml.TensorP) -> ggml.TensorP:
        """What each neuron's down row is multiplied by, from the products of its gate (None: ungated) and up rows."""
        if gate is None:
            return self._activated(up)
        drelu = self.shape.activation == "drelu"
        return ggml.ggml_mul(self.b.ctx, self._activated(gate), ggml.ggml_relu(self.b.ctx, up) if drelu else up)

    def _activated(self, gate: ggml.TensorP) -> ggml.TensorP:
        """What a neuron's gate (ungated: its only) product is turned into."""
        ctx = self.b.ctx
        if self.shape.activation == "relu2":
            return ggml.ggml_sqr(ctx, ggml.ggml_relu(ctx, gate))
        if self.shape.activation == "fatrelu":  # gate where it is above the threshold, else 0
            above = ggml.ggml_step(ctx, ggml.ggml_scale_bias(ctx, gate, 1.0, -self.shape.threshold))
            return ggml.ggml_mul(ctx, gate, above)
        return ggml.ggml_relu(ctx, gate)

    # --- those that fire, with our own operators ---------------------------------------------------------------------

    def native(self, x: ggml.TensorP, candidates: ggml.TensorP | None, chosen: Chosen | None = None) -> ggml.TensorP:
        """The product through gate rows of every neuron (or of the candidates), up and down rows of those that fire."""
        gates = None if chosen else self._gates(x, candidates)
        asking = self.b.asking
        return add_native_ffn(self.b.ctx, x, self._description(), self._rows(), candidates, chosen, gates, asking)

    def _gates(self, x: ggml.TensorP, candidates: ggml.TensorP | None) -> ggml.TensorP | None:
        """The gates of all neurons, [n_ff, n], for a batch of which tiles compute them faster than rows do."""
        name = n.weight_of(self.i, n.row_matrices(self.shape)[0])
        if candidates is not None or by_rows(x.ne[1]) or tiles_of(self.b.w[name]) is None:
            return None
        return self.b.times(name, self.b.fetched(x, [name]))

    def _rows(self) -> NativeTensors:
        w, first = self.b.w, n.row_matrices(self.shape)[0]
        return NativeTensors(
            gate=w[n.weight_of(self.i, first)],
            down=w[n.weight_of(self.i, self.stems.down_t)],
            up=w[n.weight_of(self.i, self.stems.up)] if self.shape.gated else None,
            gate_bias=w.get(n.bias_of(self.i, first)),
            up_bias=w.get(n.bias_of(self.i, self.stems.up)) if self.shape.gated else None,
        )

    def _description(self) -> sparse_ffn.Ffn:
        """The userdata of the block's operators, kept as long as the graph."""
        ffns = self.b.ffns
        if self.i not in ffns:
            rows = self._rows()
            ffns[self.i] = sparse_ffn.describe(self.shape, rows.types, self.b.spec.run.threads, rows.strides)
        return ffns[self.i]

    # --- its predictor -----------------------------------------------------------------------------------------------

    def candidates(self, x: ggml.TensorP, chosen: Chosen | None = None) -> ggml.TensorP:
        """The neurons that the predictor expects to fire, from its input x [n_embd, n]."""
        b, bias = self.b, self.b.w[n.bias_of(self.i, self.stems.predictor_out)]
        if b.s.predictor == "signbit":
            rows = b.w[self._named(self.stems.predictor_sign)]
        else:
            name = n.weight_of(self.i, self.stems.predictor_out)
            x, rows = self._narrowed(x), b.w[name]
            if chosen is None and not by_rows(x.ne[1]) and tiles_of(rows):
                return add_choice(b.ctx, b.times(name, x), self._description(), bias, self._shift())
        return add_predictor(b.ctx, x, self._description(), rows, bias, self._shift(), chosen)

    def scores(self, x: ggml.TensorP) -> ggml.TensorP:
        """What a predictor of two matrices says of its rows, without bias: [n_embd, n] -> [rows, n]. With ggml's
        operations alone.
        """
        return ggml.ggml_mul_mat(self.b.ctx, self.b.w[n.weight_of(self.i, n.PREDICTOR_OUT)], self._narrowed(x))

    def chosen(self, scores: ggml.TensorP) -> ggml.TensorP:
        """The candidates that scores [n_ff, n] computed elsewhere name."""
        bias = self.b.w[n.bias_of(self.i, n.PREDICTOR_OUT)]
        return add_choice(self.b.ctx, scores, self._description(), bias, self._shift())

    def _narrowed(self, x: ggml.TensorP) -> ggml.TensorP:
        """The first half of a predictor of two matrices: [n_embd, n] -> [rank, n]."""
        z = self.b.times(n.weight_of(self.i, n.PREDICTOR_IN), x)
        return ggml.ggml_relu(self.b.ctx, z) if self.b.s.predictor == "mlp" else z

    def _shift(self) -> float:
        """What is added to the predictor's scores."""
        bias = self.b.spec.run.predictor_bias
        return bias * self.b.s.predictor_error[self.i] if math.isfinite(bias) else bias
