"""Causal self-attention over the KV cache: grouped heads, rotated or not, over everything or over a window.

Shapes in comments are ggml's: the contiguous dimension first.
"""

from __future__ import annotations

import math

from runtime.bindings import ggml, sparse_ffn
from runtime.compute.builder import Builder
from runtime.compute.operators import add_attention
from runtime.compute.products import by_rows
from runtime.model_file import tensor_names as n
from runtime.model_file.structure import Attention

_NULL = ggml.TensorP()


class AttentionMixer:
    """The attention of block `i`."""

    def __init__(self, b: Builder, shape: Attention, i: int) -> None:
        self.b, self.shape, self.i = b, shape, i
        self.norm = n.in_block(i, n.ATTN_NORM)

    def mixed(self, x: ggml.TensorP) -> ggml.TensorP:
        """The new tokens' attention: [n_embd, n_tokens] -> as long. Writes their keys and values to the cache."""
        b, a = self.b, self.shape
        x = b.repacked_for_batch(x, [n.weight_of(self.i, stem) for stem in n.ATTENTION_MATRICES])
        q = self._placed(self._heads(x, n.ATTN_Q, a.head_count), n.ATTN_Q_NORM)
        k = self._placed(self._heads(x, n.ATTN_K, a.head_count_kv), n.ATTN_K_NORM)
        assert b.kv
        kept_keys, kept_values = b.kv.of(self.i)
        keys = self._remember(kept_keys, ggml.ggml_reshape_2d(b.ctx, k, a.kv_length, b.spec.n_tokens))
        values = self._remember(kept_values, b.linear(x, n.in_block(self.i, n.ATTN_V)))
        mixed = self._attend(q, keys, values)
        if b.s.attention_sub_norm:
            mixed = b.norm(mixed, n.in_block(self.i, n.ATTN_SUB_NORM))
        return b.linear(mixed, n.in_block(self.i, n.ATTN_OUTPUT))

    def _heads(self, x: ggml.TensorP, stem: str, n_heads: int) -> ggml.TensorP:
        """[head_length, n_heads, n_tokens]."""
        b = self.b
        projected = b.linear(x, n.in_block(self.i, stem))
        return ggml.ggml_reshape_3d(b.ctx, projected, self.shape.head_length, n_heads, b.spec.n_tokens)

    def _placed(self, x: ggml.TensorP, norm: str) -> ggml.TensorP:
        """Queries or keys [head_length, n_heads, n_tokens] with their positions, and normalised head by head where the
        file says so.
        """
        b, norm = self.b, n.in_block(self.i, norm)
        if b.s.qk_norm == "before_rope":
            x = b.norm(x, norm)
        if self.shape.rope:
            x = self._rotated(x)
        return b.norm(x, norm) if b.s.qk_norm == "after_rope" else x

    def _rotated(self, x: ggml.TensorP) -> ggml.TensorP:
        """Rotary embedding of queries or keys [head_length, n_heads, n_tokens]."""
        b, s = self.b, self.b.s
        mode = ggml.ROPE_TYPE_NEOX if s.position == "rope_neox" else ggml.ROPE_TYPE_NORMAL
        factors = b.w[n.weight(n.ROPE_FREQS)] if s.rope_freq_factors else _NULL
        scale = 1 / s.rope_scaling_factor if s.rope_scaling == "linear" else 1.0
        return ggml.ggml_rope_ext(
            b.ctx, x, b.inputs.positions, factors, self.shape.rope, mode, 0, s.rope_freq_base, scale,
            0.0, s.rope_attention_factor, 0.0, 0.0,
        )  # fmt: skip

    def _remember(self, cache: ggml.TensorP, new: ggml.TensorP) -> ggml.TensorP:
        """Write the new tokens' rows into the cache; returns [head_length, n_kv, head_count_kv]."""
        b, a = self.b, self.shape
        cache = ggml.ggml_set_rows(b.ctx, cache, new, b.inputs.cells)
        row, head = cache.nb[1], ggml.ggml_row_size(cache.type, a.head_length)
        return ggml.ggml_view_3d(b.ctx, cache, a.head_length, b.spec.n_kv, a.head_count_kv, row, head, 0)

    def _attend(self, q: ggml.TensorP, keys: ggml.TensorP, values: ggml.TensorP) -> ggml.TensorP:
        """Of queries [head_length, head_count, n_tokens]: [query_length, n_tokens]."""
        b, a, mask = self.b, self.shape, self.b.inputs.masks[self.shape.window]
        scale, width = 1 / math.sqrt(a.head_length), a.query_length
        if own := self._own(scale, keys):
            b.products.append(own)
            return add_attention(b.ctx, q, keys, values, mask, own)
        q = ggml.ggml_permute(b.ctx, q, 0, 2, 1, 3)  # [head_length, n_tokens, head_count]
        flash = ggml.ggml_flash_attn_ext(b.ctx, q, keys, values, mask, scale, 0.0, 0.0)
        if b.spec.run.flash_attention and ggml.ggml_backend_dev_supports_op(b.device, ggml.ConstTensorP(flash.value)):
            return ggml.ggml_reshape_2d(b.ctx, flash, width, b.spec.n_tokens)
        weights = ggml.ggml_mul_mat(b.ctx, keys, q)  # [n_kv, n_tokens, head_count]
        weights = ggml.ggml_soft_max_ext(b.ctx, weights, mask, scale, 0.0)
        turned = ggml.ggml_cont(b.ctx, ggml.ggml_permute(b.ctx, values, 1, 0, 2, 3))  # [n_kv, head_length, heads_kv]
        mixed = ggml.ggml_mul_mat(b.ctx, turned, weights)  # [head_length, n_tokens, head_count]
        mixed = ggml.ggml_cont(b.ctx, ggml.ggml_permute(b.ctx, mixed, 0, 2, 1, 3))
        return ggml.ggml_reshape_2d(b.ctx, mixed, width, b.spec.n_tokens)

    def _own(self, scale: float, keys: ggml.TensorP) -> sparse_ffn.Attention | None:
        """Our own operator, where few tokens attend on the CPU: it unpacks a key once for all heads that share it."""
        b, a, run = self.b, self.shape, self.b.spec.run
        if not b.own or run.ffn == "dense" or not run.flash_attention or keys.type != ggml.F16:
            return None
        if not by_rows(b.spec.n_tokens):
            return None
        return sparse_ffn.attention((a.head_length, a.head_count, a.head_count_kv), scale, run.threads)
