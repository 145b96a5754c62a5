"""An FFN whose neurons are divided into experts, of which a router chooses some for each token.

Its neurons are rows of one tall matrix, and an expert is a range of them: the native operators scan the ranges that the
router chose. Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt

from runtime.bindings import ggml, sparse_ffn
from runtime.bindings.ffn_shape import Experts, FfnShape, Span
from runtime.compute.builder import Builder
from runtime.compute.ffns.neurons import NeuronFfn
from runtime.compute.operators import Chosen
from runtime.model_file import tensor_names as n

_LEAST_SUM = 6.103515625e-5  # of a token's weights, which are divided by it: the smallest normal number of F16


def members_name(i: int, span: Span) -> str:
    """Of the tensor that says which experts a span of block `i` is of."""
    return n.in_block(i, f"members_{span.first}")


def members(span: Span, count: int, packed: bool) -> npt.NDArray[np.float32]:
    """That tensor, in numpy's order of dimensions: a row for each of `count` experts, zeros for those that the span is
    not of.

    packed: the span's matrices hold its experts only, and an expert's row has a one at its place among them; else they
    hold all, and the row is a one.
    """
    assert span.experts
    rows = np.zeros((count, len(span.experts) if packed else 1), np.float32)
    rows[list(span.experts), range(len(span.experts)) if packed else 0] = 1
    return rows


class ExpertsFfn(NeuronFfn):
    """The FFN of block `i`, whose neurons are those of all experts; or the same ones of each of them, or of some.

    The builder's tensors hold all neurons where our own operators compute, which may be given several spans; else those
    of one span alone. Beside them lie the `members` of spans that are of some experts.
    """

    def __init__(self, b: Builder, shape: FfnShape, i: int, spans: Sequence[Span] = ()) -> None:
        assert shape.experts and (b.own or len(spans) < 2)
        super().__init__(b, shape, i, () if b.own else spans)
        self.experts: Experts = shape.experts
        self._spans = tuple(spans) or (Span(0, shape.expert_length),)

    # --- the router --------------------------------------------------------------------------------------------------

    def routed(self, x: ggml.TensorP, entry: ggml.TensorP) -> Chosen:
        """The experts of each token, and the weights of what they give."""
        ctx, e, n_tokens = self.b.ctx, self.experts, x.ne[1]
        scores = self._scores(self.b.times(n.weight_of(self.i, n.ROUTER), entry if e.tap == "block" else x))
        bias = self.b.w.get(n.bias_of(self.i, n.ROUTER_BIAS))
        ids = ggml.ggml_argsort_top_k(ctx, ggml.ggml_add(ctx, scores, bias) if bias else scores, e.used)
        rows = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, scores, 1, e.count, n_tokens), ids)
        weights = self._weights(ggml.ggml_reshape_2d(ctx, rows, e.used, n_tokens))
        return Chosen(ids, weights)

    def _scores(self, logits: ggml.TensorP) -> ggml.TensorP:
        """What experts are chosen by, from the router's product: [count, n]."""
        ctx = self.b.ctx
        if self.experts.gating == "sigmoid":
            return ggml.ggml_sigmoid(ctx, logits)
        return ggml.ggml_soft_max(ctx, logits) if self.experts.gating == "softmax" else logits

    def _weights(self, scores: ggml.TensorP) -> ggml.TensorP:
        """What the chosen experts' products are multiplied with, from their scores: [used, n]."""
        ctx, e = self.b.ctx, self.experts
        if e.gating == "softmax_weight":
            scores = ggml.ggml_soft_max(ctx, scores)
        if e.normalised:
            least = ggml.ggml_clamp(ctx, ggml.ggml_sum_rows(ctx, scores), _LEAST_SUM, float("inf"))
            scores = ggml.ggml_div(ctx, scores, least)
        return self.b.scaled(scores, e.scale)

    # --- between the model's width and that of latent experts ---------------------------------------------------------

    def entered(self, x: ggml.TensorP) -> ggml.TensorP:
        """What experts see, from the FFN's input: [n_embd of the shape, n]."""
        return self.b.times(n.weight_of(self.i, n.LATENT_DOWN), x) if self.b.s.expert_latent_length else x

    def finished(self, y: ggml.TensorP) -> ggml.TensorP:
        """What is added to the residual stream, from the sum of the experts' products: [n_embd of the model, n]."""
        wide = self.b.times(n.weight_of(self.i, n.LATENT_UP), y) if self.b.s.expert_latent_length else y
        return super().finished(wide)

    # --- the experts -------------------------------------------------------------------------------------------------

    def dense(self, x: ggml.TensorP, chosen: Chosen | None = None) -> ggml.TensorP:
        """The product through the whole matrices of the chosen experts, with ggml's own operations."""
        assert chosen
        products = [self._dense(x, span, chosen) for span in self._spans]
        return reduce(lambda a, b: ggml.ggml_add(self.b.ctx, a, b), products)

    def _dense(self, x: ggml.TensorP, span: Span, chosen: Chosen) -> ggml.TensorP:
        ctx, shape, stems = self.b.ctx, self.shape, self.stems
        if span.experts is not None:
            chosen = self._members(span, chosen)
        x = ggml.ggml_reshape_3d(ctx, x, shape.n_embd, 1, x.ne[1])
        up = self._times(stems.up, span, x, chosen)
        gate = self._times(stems.gate, span, x, chosen) if shape.gated else None
        if self.b.spec.tapped:
            self._tap("up", up)
            self._tap("gate", gate)
        h = self.strengths(gate, up)
        y = self._times(stems.down, span, h, chosen)
        k, n_tokens = chosen.ranges.ne[0], x.ne[2]
        y = ggml.ggml_mul(ctx, y, ggml.ggml_reshape_3d(ctx, chosen.weights, 1, k, n_tokens))
        parts = [ggml.ggml_view_2d(ctx, y, shape.n_embd, n_tokens, y.nb[2], j * y.nb[1]) for j in range(k)]
        return reduce(lambda a, b: ggml.ggml_add(ctx, a, b), parts) if k > 1 else ggml.ggml_cont(ctx, parts[0])

    def _members(self, span: Span, chosen: Chosen) -> Chosen:
        """Each token's choice among the experts of a span: whatever else it chose has no weight.

        Where the matrices hold these experts only, a token gets as many different ones as it can have; some may be none
        of its own, and have no weight either. No weight of a chosen one is negative.
        """
        ctx, rows = self.b.ctx, self.b.w[members_name(self.i, span)]
        (used, n_tokens), width = chosen.ranges.ne[:2], rows.ne[0]
        ids = chosen.ranges
        if ids.nb[1] != used * ids.nb[0]:
            ids = ggml.ggml_cont(ctx, ids)
        found = ggml.ggml_get_rows(ctx, rows, ggml.ggml_reshape_2d(ctx, ids, used * n_tokens, 1))
        found = ggml.ggml_reshape_3d(ctx, found, width, used, n_tokens)
        weights = ggml.ggml_mul(ctx, found, ggml.ggml_reshape_3d(ctx, chosen.weights, 1, used, n_tokens))
        if self.b.own:
            return Chosen(chosen.ranges, ggml.ggml_reshape_2d(ctx, weights, used, n_tokens))
        by_member = ggml.ggml_sum_rows(ctx, ggml.ggml_cont(ctx, ggml.ggml_permute(ctx, weights, 1, 0, 2, 3)))
        by_member = ggml.ggml_reshape_2d(ctx, by_member, width, n_tokens)
        ids = ggml.ggml_argsort_top_k(ctx, by_member, k := min(used, width))
        weights = ggml.ggml_get_rows(ctx, ggml.ggml_reshape_3d(ctx, by_member, 1, width, n_tokens), ids)
        return Chosen(ids, ggml.ggml_reshape_2d(ctx, weights, k, n_tokens))

    def _times(self, stem: str, span: Span, x: ggml.TensorP, chosen: Chosen) -> ggml.TensorP:
        """The chosen experts' matrices with a token's one vector, or with one vector for each: [n_out, used, n]."""
        matrix = self.b.w.matrix(n.weight_of(self.i, stem))
        if self.b.own and (span.first, span.end) != (0, self.shape.expert_length):
            matrix = self._part(matrix, span, columns=stem == self.stems.down)
        return ggml.ggml_mul_mat_id(self.b.ctx, matrix, x, chosen.ranges)

    def _part(self, matrix: ggml.TensorP, span: Span, columns: bool) -> ggml.TensorP:
        """The rows, or columns, of the neurons of a span, of a matrix of all."""
        first, end, ne, nb = span.first, span.end, matrix.ne, matrix.nb
        across, down = (end - first, ne[1]) if columns else (ne[0], end - first)
        at = ggml.ggml_row_size(matrix.type, first) if columns else first * nb[1]
        return ggml.ggml_view_3d(self.b.ctx, matrix, across, down, ne[2], nb[1], nb[2], at)

    def _tap(self, role: str, made: ggml.TensorP | None) -> None:
        """Keep what the chosen experts' rows say, [expert_length, used, n], as a matrix."""
        if made:
            n_rows = made.ne[1] * made.ne[2]
            self.b.taps[role] = ggml.ggml_reshape_2d(self.b.ctx, made, made.ne[0], n_rows)

    def _description(self) -> sparse_ffn.Ffn:
        ffn = super()._description()
        if not ffn.n_ranges:
            starts = np.arange(self.experts.count) * self.shape.expert_length
            sparse_ffn.divide(ffn, starts[:, None] + self._ranges(), self.b.choices.get(self.i))
        return ffn

    def _ranges(self) -> npt.NDArray[np.int64]:
        """The neurons of each expert, first and end, [count, 2]; equal where there are none.

        Raises ValueError where spans leave a gap within an expert.
        """
        ranges = np.zeros((self.experts.count, 2), np.int64)
        for span in self._spans:
            for e in range(self.experts.count) if span.experts is None else span.experts:
                if ranges[e, 1] and ranges[e, 1] != span.first:
                    raise ValueError(f"neurons of expert {e} up to {ranges[e, 1]}, then from {span.first}")
                ranges[e] = (ranges[e, 0] if ranges[e, 1] else span.first), span.end
        return ranges
