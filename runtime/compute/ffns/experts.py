"""An FFN whose neurons are divided into experts, of which a router chooses some for each token.

Its neurons are rows of one tall matrix, and an expert is a range of them: the native operators scan the ranges that the
router chose. Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from runtime.bindings import ggml, sparse_ffn
from runtime.bindings.ffn_shape import Experts, FfnShape
from runtime.compute.builder import Builder
from runtime.compute.ffns.neurons import NeuronFfn
from runtime.compute.operators import Chosen
from runtime.model_file import tensor_names as n

_LEAST_SUM = 6.103515625e-5  # of a token's weights, which are divided by it: the smallest normal number of F16


class ExpertsFfn(NeuronFfn):
    """The FFN of block `i`, whose neurons are those of all experts; or the same ones of each of them.

    The builder's tensors hold all neurons where our own operators compute, else those alone that are meant.
    """

    def __init__(self, b: Builder, shape: FfnShape, i: int, piece: tuple[int, int] | None = None) -> None:
        super().__init__(b, shape, i, None if b.own else piece)
        assert shape.experts
        self.experts: Experts = shape.experts
        self._piece = piece or (0, shape.expert_length)  # of each expert

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
        ctx, shape, stems = self.b.ctx, self.shape, self.stems
        x = ggml.ggml_reshape_3d(ctx, x, shape.n_embd, 1, x.ne[1])
        up = self._times(stems.up, x, chosen)
        gate = self._times(stems.gate, x, chosen) if shape.gated else None
        if self.b.spec.tapped:
            self._tap("up", up)
            self._tap("gate", gate)
        h = self.strengths(gate, up)
        y = self._times(stems.down, h, chosen)
        k, n_tokens = self.experts.used, x.ne[2]
        y = ggml.ggml_mul(ctx, y, ggml.ggml_reshape_3d(ctx, chosen.weights, 1, k, n_tokens))
        parts = [ggml.ggml_view_2d(ctx, y, shape.n_embd, n_tokens, y.nb[2], j * y.nb[1]) for j in range(k)]
        return reduce(lambda a, b: ggml.ggml_add(ctx, a, b), parts) if k > 1 else ggml.ggml_cont(ctx, parts[0])

    def _times(self, stem: str, x: ggml.TensorP, chosen: Chosen) -> ggml.TensorP:
        """The chosen experts' matrices with a token's one vector, or with one vector for each: [n_out, used, n]."""
        matrix = self.b.w.matrix(n.weight_of(self.i, stem))
        if self.b.own and self._piece != (0, self.shape.expert_length):
            matrix = self._part(matrix, columns=stem == self.stems.down)
        return ggml.ggml_mul_mat_id(self.b.ctx, matrix, x, chosen.ranges)

    def _part(self, matrix: ggml.TensorP, columns: bool) -> ggml.TensorP:
        """The rows, or columns, of the neurons that are meant, of a matrix of all."""
        (first, end), ne, nb = self._piece, matrix.ne, matrix.nb
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
            sparse_ffn.divide(ffn, starts[:, None] + np.array(self._piece), self.b.choices.get(self.i))
        return ffn
