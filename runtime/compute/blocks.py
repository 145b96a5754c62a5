"""A model's operations in a ggml graph, block by block, built from the file's own description.

Shapes in comments are ggml's: the contiguous dimension first. Knows no architecture by name, and not whether a graph holds all of a model or a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.bindings import ggml, sparse_ffn
from runtime.compute.operators import NativeTensors, add_choice, add_native_ffn, add_predictor
from runtime.compute.repack import Fill, Repacked
from runtime.compute.weights import KvCache, Tensors
from runtime.model_file.structure import Structure

FFN_MATRICES = ("ffn_gate", "ffn_up", "ffn_down")
_NULL = ggml.TensorP()


@dataclass(frozen=True)
class GraphSpec:
    """What distinguishes one graph of a model from another."""

    n_tokens: int
    n_kv: int  # positions that attention reads, padded
    n_outputs: int  # the last token (1) or all of them
    ffn: str  # "dense", "exact" or "predicted"
    n_threads: int
    flash_attention: bool = True
    predictor_bias: float = 0.0  # in units of each block's predictor_error
    dense_from: tuple[float, ...] = ()  # by block: so many tokens at once go through every neuron, whatever `ffn` says
    # A part of the model: from the hidden states before block `first` (None: from token ids) to those before block `end` (None: to logits).
    first: int | None = None
    end: int | None = None
    tapped: bool = False  # keep inner results


@dataclass(frozen=True)
class Inputs:
    """What blocks read beside hidden states: I32 [n_tokens]; rows of the KV cache, I64 [n_tokens]; F16 [n_kv, n_tokens]; I32 [n_outputs]."""

    positions: ggml.TensorP
    cells: ggml.TensorP
    mask: ggml.TensorP
    outputs: ggml.TensorP


class Blocks:
    """Adds operations of a model to one ggml context.

    device: what will compute them. scratch: where matrices of one block are repacked, for blocks that are computed densely without being copied.
    ffns: the userdata of our own operators, by block; must live as long as the graph.
    """

    def __init__(
        self,
        ctx: ggml.ContextP,
        structure: Structure,
        weights: Tensors,
        kv: KvCache | None,
        spec: GraphSpec,
        inputs: Inputs,
        device: ggml.DeviceP,
        scratch: Repacked | None = None,
        ffns: dict[int, sparse_ffn.Ffn] | None = None,
    ) -> None:
        self.ctx, self.s, self.w, self.spec = ctx, structure, weights, spec
        self.kv, self.inputs, self.device, self.scratch = kv, inputs, device, scratch
        self.ffns = {} if ffns is None else ffns
        self.streams: dict[int, ggml.TensorP] = {}  # see until_ffn

    def embeddings(self, tokens: ggml.TensorP) -> ggml.TensorP:
        """Token embeddings, scaled, projected, with learned positions and normalised where the file says so: [n_embd, n_tokens]."""
        x = self.scaled(ggml.ggml_get_rows(self.ctx, self.w["token_embd.weight"], tokens), self.s.embedding_scale)
        if self.s.projected:
            x = self.linear(x, "token_embd_proj")
        if self.s.position == "learned":
            x = ggml.ggml_add(
                self.ctx, x, ggml.ggml_get_rows(self.ctx, self.w["position_embd.weight"], self.inputs.positions)
            )
        return self.norm(x, "token_embd_norm") if self.s.embedding_norm else x

    def until_ffn(self, x: ggml.TensorP, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """Block `i` up to its FFN: the residual stream there, and the FFN's input; [n_embd, n] both.

        The last block keeps only the tokens whose logits are wanted. In a parallel block the stream before the FFN's norm is
        the block's own input and not the residual: `streams[i]` keeps it, for a predictor that sees the stream.
        """
        pre = self.s.norm_placement == "pre"
        attended = self.attention(self.norm(x, f"blk.{i}.attn_norm") if pre else x, i)
        h = self.wanted(ggml.ggml_add(self.ctx, x, self.scaled(attended, self.s.residual_scale)), i)
        if not pre:
            return h, self.norm(h, f"blk.{i}.attn_norm")
        stream = self.wanted(x, i) if self.s.residual == "parallel" else h
        self.streams[i] = stream
        return h, self.norm(stream, f"blk.{i}.ffn_norm")

    def wanted(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The tokens of block `i`'s x that later operations need: in the last block, those whose logits are wanted."""
        if i == self.s.block_count - 1 and self.spec.n_outputs < self.spec.n_tokens:
            return ggml.ggml_get_rows(self.ctx, x, self.inputs.outputs)
        return x

    def after_ffn(self, residual: ggml.TensorP, x: ggml.TensorP, y: ggml.TensorP, i: int) -> ggml.TensorP:
        """The rest of block `i`: its output, from what `until_ffn` gave and the FFN's product y (see `ffn`)."""
        y = self.normalised(y) if self.s.ffn_sub_norm else y
        y = self.scaled(self.biased(y, f"blk.{i}.ffn_down"), self.s.residual_scale)
        if self.s.norm_placement == "pre":
            return ggml.ggml_add(self.ctx, residual, y)
        return self.norm(ggml.ggml_add(self.ctx, x, y), f"blk.{i}.ffn_norm")

    def normalised(self, y: ggml.TensorP) -> ggml.TensorP:
        """[n_embd + 1, n] -> [n_embd, n]: a product divided by the root mean square of the neurons that made it."""
        d, n, row = self.s.embedding_length, y.ne[1], y.nb[1]
        squares = ggml.ggml_cont(self.ctx, ggml.ggml_view_2d(self.ctx, y, 1, n, row, d * 4))
        mean = ggml.ggml_scale_bias(self.ctx, squares, 1 / self.s.feed_forward_length, self.s.norm_epsilon)
        return ggml.ggml_div(
            self.ctx,
            ggml.ggml_cont(self.ctx, ggml.ggml_view_2d(self.ctx, y, d, n, row, 0)),
            ggml.ggml_sqrt(self.ctx, mean),
        )

    def head(self, x: ggml.TensorP) -> ggml.TensorP:
        """Logits [n_vocab, n_outputs]."""
        if self.s.output_norm:
            x = self.norm(x, "output_norm")
        if self.s.projected:
            x = self.linear(x, "output_proj")
        x = self.linear(self.scaled(x, self.s.logit_scale), "token_embd" if self.s.tied_output else "output")
        if self.s.logit_softcap:
            x = ggml.ggml_tanh(self.ctx, self.scaled(x, 1 / self.s.logit_softcap))
            x = self.scaled(x, self.s.logit_softcap)
        return x

    def norm(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        """RMS or layer norm over the first dimension, scaled (and shifted)."""
        normalise = ggml.ggml_rms_norm if self.s.norm == "rms" else ggml.ggml_norm
        x = ggml.ggml_mul(self.ctx, normalise(self.ctx, x, self.s.norm_epsilon), self.w[f"{name}.weight"])
        return self.biased(x, name)

    def linear(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        """[n_in, n] -> [n_out, n]."""
        return self.biased(ggml.ggml_mul_mat(self.ctx, self.w.matrix(f"{name}.weight"), x), name)

    def biased(self, x: ggml.TensorP, name: str) -> ggml.TensorP:
        """x plus the bias `name`, where there is one."""
        bias = self.w.get(f"{name}.bias")
        return ggml.ggml_add(self.ctx, x, bias) if bias else x

    def scaled(self, x: ggml.TensorP, factor: float) -> ggml.TensorP:
        """x times a factor; x itself where that is 1."""
        return x if factor == 1 else ggml.ggml_scale_bias(self.ctx, x, factor, 0.0)

    # --- attention ---------------------------------------------------------------------------------------------------

    def attention(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """Causal self-attention of the new tokens over the cache: [n_embd, n_tokens]."""
        s, n = self.s, self.spec.n_tokens
        q = self.heads(x, f"blk.{i}.attn_q", s.head_count)
        k = self.heads(x, f"blk.{i}.attn_k", s.head_count_kv)
        q, k = self.placed(q, f"blk.{i}.attn_q_norm"), self.placed(k, f"blk.{i}.attn_k_norm")
        assert self.kv
        kept_keys, kept_values = self.kv.of(i)
        keys = self.remember(kept_keys, ggml.ggml_reshape_2d(self.ctx, k, s.kv_length, n))
        values = self.remember(kept_values, self.linear(x, f"blk.{i}.attn_v"))
        q = ggml.ggml_permute(self.ctx, q, 0, 2, 1, 3)  # [head_length, n_tokens, head_count]
        mixed = self.attend(q, keys, values)
        if s.attention_sub_norm:
            mixed = self.norm(mixed, f"blk.{i}.attn_sub_norm")
        return self.linear(mixed, f"blk.{i}.attn_output")

    def placed(self, x: ggml.TensorP, norm: str) -> ggml.TensorP:
        """Queries or keys [head_length, n_heads, n_tokens] with their positions, and normalised head by head where the file says so."""
        if self.s.qk_norm == "before_rope":
            x = self.norm(x, norm)
        if self.s.position.startswith("rope"):
            x = self.rope(x)
        return self.norm(x, norm) if self.s.qk_norm == "after_rope" else x

    def heads(self, x: ggml.TensorP, name: str, n_heads: int) -> ggml.TensorP:
        """[head_length, n_heads, n_tokens]."""
        return ggml.ggml_reshape_3d(self.ctx, self.linear(x, name), self.s.head_length, n_heads, self.spec.n_tokens)

    def rope(self, x: ggml.TensorP) -> ggml.TensorP:
        """Rotary embedding of queries or keys [head_length, n_heads, n_tokens]."""
        s = self.s
        mode = ggml.ROPE_TYPE_NEOX if s.position == "rope_neox" else ggml.ROPE_TYPE_NORMAL
        factors = self.w["rope_freqs.weight"] if s.rope_freq_factors else _NULL
        scale = 1 / s.rope_scaling_factor if s.rope_scaling == "linear" else 1.0
        return ggml.ggml_rope_ext(
            self.ctx, x, self.inputs.positions, factors, s.rope_dimension_count, mode, 0, s.rope_freq_base, scale,
            0.0, s.rope_attention_factor, 0.0, 0.0,
        )  # fmt: skip

    def remember(self, cache: ggml.TensorP, new: ggml.TensorP) -> ggml.TensorP:
        """Write the new tokens' rows into the cache; returns [head_length, n_kv, head_count_kv]."""
        cache = ggml.ggml_set_rows(self.ctx, cache, new, self.inputs.cells)
        row, head = cache.nb[1], ggml.ggml_row_size(cache.type, self.s.head_length)
        return ggml.ggml_view_3d(
            self.ctx, cache, self.s.head_length, self.spec.n_kv, self.s.head_count_kv, row, head, 0
        )

    def attend(self, q: ggml.TensorP, keys: ggml.TensorP, values: ggml.TensorP) -> ggml.TensorP:
        """[head_length * head_count, n_tokens]."""
        s, scale = self.s, 1 / math.sqrt(self.s.head_length)
        width = s.head_length * s.head_count
        flash = ggml.ggml_flash_attn_ext(self.ctx, q, keys, values, self.inputs.mask, scale, 0.0, 0.0)
        if self.spec.flash_attention and ggml.ggml_backend_dev_supports_op(self.device, ggml.ConstTensorP(flash.value)):
            return ggml.ggml_reshape_2d(self.ctx, flash, width, self.spec.n_tokens)
        weights = ggml.ggml_mul_mat(self.ctx, keys, q)  # [n_kv, n_tokens, head_count]
        weights = ggml.ggml_soft_max_ext(self.ctx, weights, self.inputs.mask, scale, 0.0)
        turned = ggml.ggml_cont(
            self.ctx, ggml.ggml_permute(self.ctx, values, 1, 0, 2, 3)
        )  # [n_kv, head_length, head_count_kv]
        mixed = ggml.ggml_mul_mat(self.ctx, turned, weights)  # [head_length, n_tokens, head_count]
        mixed = ggml.ggml_cont(self.ctx, ggml.ggml_permute(self.ctx, mixed, 0, 2, 1, 3))
        return ggml.ggml_reshape_2d(self.ctx, mixed, width, self.spec.n_tokens)

    # --- FFN ---------------------------------------------------------------------------------------------------------

    def ffn(self, x: ggml.TensorP, residual: ggml.TensorP, i: int) -> ggml.TensorP:
        """The FFN's product, [n_embd, n] -> [n_embd, n], without the bias of the down projection; residual: as `until_ffn` gave it.

        Where neurons are normalised before they are projected (`ffn_sub_norm`), it is [n_embd + 1, n]: the last row holds the sum of
        their squares, and `after_ffn` divides. So the products of two parts of the neurons add up to the product of all, element by element.
        """
        if self.spec.ffn == "dense" or (self.spec.dense_from and x.ne[1] >= self.spec.dense_from[i]):
            return self.ffn_dense(x, i)
        if self.spec.ffn == "predicted" and self.s.rank(i):
            seen = x if self.s.predictor_tap == "ffn_norm" else self.streams.get(i, residual)
            return self.ffn_native(x, self.candidates(seen, i), i)
        return self.ffn_native(x, None, i)

    def ffn_dense(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """Every neuron, through ggml's own products."""
        staged = {name: tensor for name in FFN_MATRICES if (tensor := self.staged(name, i))}
        if staged and self.scratch:
            # No other mode reads `ffn_down`: its pages are released again.
            fills = [
                Fill(staged_as(name, tensor.type), f"blk.{i}.{name}.weight", release=name == "ffn_down")
                for name, tensor in staged.items()
            ]
            x = self.scratch.add_fill(self.ctx, x, i, fills)

        def product(x: ggml.TensorP, name: str) -> ggml.TensorP:
            return ggml.ggml_mul_mat(self.ctx, staged.get(name) or self.w.matrix(f"blk.{i}.{name}.weight"), x)

        h = self.biased(product(x, "ffn_up"), f"blk.{i}.ffn_up")
        if self.s.gated:
            gate = self.activate(self.biased(product(x, "ffn_gate"), f"blk.{i}.ffn_gate"))
            h = ggml.ggml_mul(self.ctx, gate, ggml.ggml_relu(self.ctx, h) if self.s.ffn_activation == "drelu" else h)
        else:
            h = self.activate(h)
        y = product(h, "ffn_down")
        if self.s.ffn_sub_norm:
            y = ggml.ggml_concat(self.ctx, y, ggml.ggml_sum_rows(self.ctx, ggml.ggml_sqr(self.ctx, h)), 0)
        return y

    def staged(self, name: str, i: int) -> ggml.TensorP | None:
        """The scratch tensor that can hold this matrix of block `i`, where there is one."""
        matrix = self.w.get(f"blk.{i}.{name}.weight")
        return self.scratch.tensors.get(staged_as(name, matrix.type)) if self.scratch and matrix else None

    def activate(self, gate: ggml.TensorP) -> ggml.TensorP:
        """What a neuron's gate (ungated: its only) product is turned into."""
        if self.s.ffn_activation == "relu2":
            return ggml.ggml_sqr(self.ctx, ggml.ggml_relu(self.ctx, gate))
        if self.s.ffn_activation == "fatrelu":  # gate where it is above the threshold, else 0
            above = ggml.ggml_step(self.ctx, ggml.ggml_scale_bias(self.ctx, gate, 1.0, -self.s.activation_threshold))
            return ggml.ggml_mul(self.ctx, gate, above)
        return ggml.ggml_relu(self.ctx, gate)

    def ffn_native(self, x: ggml.TensorP, candidates: ggml.TensorP | None, i: int) -> ggml.TensorP:
        """Gate rows of every neuron (or of the candidates), up and down rows of those that fire: our own operators."""
        ffn = self.description(i)
        return add_native_ffn(self.ctx, x, ffn, native_tensors(self.w, self.s, i), candidates)

    def description(self, i: int) -> sparse_ffn.Ffn:
        """The userdata of block `i`'s operators, kept as long as the graph."""
        if i not in self.ffns:
            shape, types = self.s.blocks[i].ffn, native_tensors(self.w, self.s, i).types
            assert shape
            self.ffns[i] = sparse_ffn.describe(shape, types, self.spec.n_threads)
        return self.ffns[i]

    def candidates(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The neurons that block `i`'s predictor expects to fire, from its input x [n_embd, n]."""
        bias, shift = self.w[f"blk.{i}.predictor_out.bias"], self.shift(i)
        if self.s.predictor == "signbit":
            return add_predictor(self.ctx, x, self.description(i), self.w[f"blk.{i}.predictor_sign"], bias, shift)
        rows = self.w[f"blk.{i}.predictor_out.weight"]
        return add_predictor(self.ctx, self.narrowed(x, i), self.description(i), rows, bias, shift)

    def narrowed(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """The first half of a predictor of two matrices: [n_embd, n] -> [rank, n]."""
        z = ggml.ggml_mul_mat(self.ctx, self.w.matrix(f"blk.{i}.predictor_in.weight"), x)
        return ggml.ggml_relu(self.ctx, z) if self.s.predictor == "mlp" else z

    def scores(self, x: ggml.TensorP, i: int) -> ggml.TensorP:
        """What a predictor of two matrices says of its rows, without bias: [n_embd, n] -> [rows, n]. With ggml's operations alone."""
        return ggml.ggml_mul_mat(self.ctx, self.w[f"blk.{i}.predictor_out.weight"], self.narrowed(x, i))

    def chosen(self, scores: ggml.TensorP, i: int) -> ggml.TensorP:
        """The neurons that scores [n_ff, n] of block `i`'s predictor name."""
        return add_choice(self.ctx, scores, self.description(i), self.w[f"blk.{i}.predictor_out.bias"], self.shift(i))

    def shift(self, i: int) -> float:
        """What is added to the scores of block `i`'s predictor."""
        bias = self.spec.predictor_bias
        return bias * self.s.predictor_error[i] if math.isfinite(bias) else bias


def staged_as(name: str, type_id: int) -> str:
    """What the scratch memory calls a matrix: blocks need not have the same formats."""
    return f"{name}, type {type_id}"


def native_tensors(weights: Tensors, s: Structure, i: int) -> NativeTensors:
    """The FFN rows of block `i`."""
    first = "ffn_gate" if s.gated else "ffn_up"
    return NativeTensors(
        gate=weights[f"blk.{i}.{first}.weight"],
        down=weights[f"blk.{i}.ffn_down_t.weight"],
        up=weights[f"blk.{i}.ffn_up.weight"] if s.gated else None,
        gate_bias=weights.get(f"blk.{i}.{first}.bias"),
        up_bias=weights.get(f"blk.{i}.ffn_up.bias") if s.gated else None,
    )
