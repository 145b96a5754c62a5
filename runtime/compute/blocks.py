"""A model's operations in a ggml graph, block by block, built from the file's own description.

What mixes tokens is in `mixers`, what is computed of each token by itself in `ffns`; here is how both are joined, and a
model's two ends. Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.bindings import ggml
from runtime.compute.builder import Builder
from runtime.compute.ffns import ffn_of, shared_of
from runtime.compute.ffns.neurons import FfnInputs, NeuronFfn
from runtime.compute.mixers import mixer_of
from runtime.model_file import tensor_names as n


@dataclass(frozen=True)
class AtFfn:
    """Where a block's FFN begins. residual: what its result is added to, F32 [n_embd, n]; what a shared expert gives is
    in it.
    """

    inputs: FfnInputs
    residual: ggml.TensorP


class Blocks:
    """Adds the operations of a model to a builder's context."""

    def __init__(self, builder: Builder) -> None:
        self.b, self.s = builder, builder.s

    def embeddings(self, tokens: ggml.TensorP) -> ggml.TensorP:
        """Token embeddings, scaled, projected, with learned positions and normalised where the file says so: [n_embd,
        n_tokens].
        """
        b, s = self.b, self.s
        x = b.scaled(ggml.ggml_get_rows(b.ctx, b.w[n.weight(n.TOKEN_EMBD)], tokens), s.embedding_scale)
        if s.projected:
            x = b.linear(x, n.TOKEN_EMBD_PROJ)
        if s.position == "learned":
            rows = ggml.ggml_get_rows(b.ctx, b.w[n.weight(n.POSITION_EMBD)], b.inputs.positions)
            x = ggml.ggml_add(b.ctx, x, rows)
        return b.norm(x, n.TOKEN_EMBD_NORM) if s.embedding_norm else x

    def block(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The whole of block `i`: [n_embd, n_tokens] -> [n_embd, n]. The last block keeps only the tokens whose logits
        are wanted.
        """
        if self.s.blocks[i].ffn is None:
            _, h = self._mixed(x, i)
            return h
        at = self.until_ffn(x, i)
        return self.after_ffn(at, self.ffn(i).product(at.inputs), i)

    def until_ffn(self, x: ggml.TensorP, i: int) -> AtFfn:
        """Block `i`, which has an FFN, up to there."""
        residual, h = self._mixed(x, i)
        ffn, entry = self.ffn(i), self._wanted(x, i)
        if self.s.norm_placement == "post":
            return AtFfn(FfnInputs(h, residual, ffn.routed(h, entry)), residual)
        stream = entry if self.s.residual == "parallel" else h
        given = self.b.norm(stream, ffn.norm)
        inputs = FfnInputs(ffn.entered(given), stream, ffn.routed(given, entry))
        return AtFfn(inputs, self._with_shared(residual, given, i))

    def _with_shared(self, residual: ggml.TensorP, given: ggml.TensorP, i: int) -> ggml.TensorP:
        """The residual stream and what block `i`'s shared expert adds to it, from the FFN's input."""
        shared = shared_of(self.b, i)
        if not shared:
            return residual
        return ggml.ggml_add(self.b.ctx, residual, shared.finished(shared.product(FfnInputs(given, given))))

    def _mixed(self, x: ggml.TensorP, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """Block `i`'s hidden states after its mixer, and these with the norm behind it, where norms stand there."""
        b, mixer, pre = self.b, mixer_of(self.b, i), self.s.norm_placement == "pre"
        if mixer is None:
            h = self._wanted(x, i)
            return h, h
        mixed = mixer.mixed(b.norm(x, mixer.norm) if pre else x)
        h = self._wanted(ggml.ggml_add(b.ctx, x, b.scaled(mixed, self.s.residual_scale)), i)
        return h, h if pre else b.norm(h, mixer.norm)

    def _wanted(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The tokens of block `i`'s x that later operations need: in the last block, those whose logits are wanted."""
        if i == self.s.block_count - 1 and self.b.spec.n_outputs < self.b.spec.n_tokens:
            return ggml.ggml_get_rows(self.b.ctx, x, self.b.inputs.outputs)
        return x

    def ffn(self, i: int) -> NeuronFfn:
        """The FFN of block `i`, which has one."""
        return ffn_of(self.b, i)

    def after_ffn(self, at: AtFfn, y: ggml.TensorP, i: int) -> ggml.TensorP:
        """The rest of block `i`: its output, from the FFN's product y (see `NeuronFfn`)."""
        b, ffn = self.b, self.ffn(i)
        y = ffn.finished(y)
        if self.s.norm_placement == "pre":
            return ggml.ggml_add(b.ctx, at.residual, y)
        return b.norm(ggml.ggml_add(b.ctx, at.inputs.x, y), ffn.norm)

    def head(self, x: ggml.TensorP) -> ggml.TensorP:
        """Logits [n_vocab, n_outputs]."""
        b, s = self.b, self.s
        if s.output_norm:
            x = b.norm(x, n.OUTPUT_NORM)
        if s.projected:
            x = b.linear(x, n.OUTPUT_PROJ)
        x = b.linear(b.scaled(x, s.logit_scale), n.TOKEN_EMBD if s.tied_output else n.OUTPUT)
        if s.logit_softcap:
            x = ggml.ggml_tanh(b.ctx, b.scaled(x, 1 / s.logit_softcap))
            x = b.scaled(x, s.logit_softcap)
        return x
