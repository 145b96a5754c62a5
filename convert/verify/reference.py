"""What a checkpoint computes, in plain float32 numpy: the oracle of `--verify` where transformers cannot be one.

Reads the checkpoint tensor by tensor, unquantised and in its own order of neurons, and shares no arithmetic with the
runtime. The down projection is read as the checkpoint has it, not as the file stores it. Slow, and meant for a few
dozen tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from convert.arch import Generated, Source
from convert.checkpoint import Checkpoint
from convert.encode import read
from convert.plan import Plan

Floats = npt.NDArray[np.float32]
_ROWS = 4096  # of the output head that are held at once


class NumpyModel:
    """The model of a checkpoint. plan: of its conversion, before neurons are reordered."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan) -> None:
        self._checkpoint, self.s = checkpoint, plan.structure
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}

    def logits(self, ids: Sequence[int]) -> Floats:
        """Logits at every position, float32 [len(ids), n_vocab]."""
        s = self.s
        x = self._embeddings(ids)
        for i in range(s.block_count):
            x = self._block(x, i)
        if s.output_norm:
            x = self._norm(x, "output_norm")
        if s.projected:
            x = self._linear(x, "output_proj")
        return self._head(x * s.logit_scale)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows start .. stop - 1 of a tensor, row-major: [stop - start, n_in]; elements of a vector."""
        tensor = self._tensors[name]
        if isinstance(tensor.source, Generated):
            return tensor.source.make(self._checkpoint.config)[start:stop]
        assert isinstance(tensor.source, Source)
        with read(self._checkpoint, tensor.source) as stored:
            return np.asarray(tensor.rewrite.rows(stored, start, stop), np.float32)

    def _tensor(self, name: str) -> Floats:
        return self._rows(name, 0, self._tensors[name].rows)

    def _linear(self, x: Floats, name: str) -> Floats:
        return self._biased(x @ self._tensor(f"{name}.weight").T, name)

    def _biased(self, x: Floats, name: str) -> Floats:
        bias = f"{name}.bias"
        return x + self._tensor(bias) if bias in self._tensors else x

    def _norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(-1, keepdims=True) if self.s.norm == "layer" else x
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self.s.norm_epsilon))
        return self._biased(centred / scale * self._tensor(f"{name}.weight"), name)

    # --- a model, from its two ends to the middle --------------------------------------------------------------------

    def _embeddings(self, ids: Sequence[int]) -> Floats:
        s = self.s
        x = np.concatenate([self._rows("token_embd.weight", i, i + 1) for i in ids]) * np.float32(s.embedding_scale)
        if s.projected:
            x = self._linear(x, "token_embd_proj")
        if s.position == "learned":
            x = x + self._rows("position_embd.weight", 0, len(ids))
        return self._norm(x, "token_embd_norm") if s.embedding_norm else x

    def _head(self, x: Floats) -> Floats:
        name = "token_embd.weight" if self.s.tied_output else "output.weight"
        n = self.s.vocab_size
        parts = [x @ self._rows(name, at, min(at + _ROWS, n)).T for at in range(0, n, _ROWS)]
        logits = np.concatenate(parts, axis=1, dtype=np.float32)
        cap = np.float32(self.s.logit_softcap)
        return np.asarray(np.tanh(logits / cap) * cap) if cap else logits

    def _block(self, x: Floats, i: int) -> Floats:
        s, block, scale = self.s, self.s.blocks[i], np.float32(self.s.residual_scale)
        names = f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"
        if s.norm_placement == "post":
            h = self._norm(x + scale * self._attention(x, i), names[0]) if block.mixer else x
            return self._norm(h + scale * self._ffn(h, i), names[1]) if block.ffn else h
        mixed = self._attention(self._norm(x, names[0]), i) if block.mixer else np.float32(0)
        h = x + scale * mixed
        if not block.ffn:
            return h
        return h + scale * self._ffn(self._norm(x if s.residual == "parallel" else h, names[1]), i)

    def _attention(self, x: Floats, i: int) -> Floats:
        s, a, n = self.s, self.s.attentions[i], len(x)
        q, k = (
            self._placed(self._heads(x, f"blk.{i}.attn_{part}"), f"blk.{i}.attn_{part}_norm", a.rope) for part in "qk"
        )
        v = self._heads(x, f"blk.{i}.attn_v")
        group = a.head_count // a.head_count_kv
        k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
        scores = q @ k.transpose(0, 2, 1) / np.float32(np.sqrt(a.head_length))
        behind = np.subtract.outer(np.arange(n), np.arange(n))
        scores[:, (behind < 0) | (behind >= (a.window or n))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ v
        mixed = mixed.transpose(1, 0, 2).reshape(n, -1)
        if s.attention_sub_norm:
            mixed = self._norm(mixed, f"blk.{i}.attn_sub_norm")
        return self._linear(mixed, f"blk.{i}.attn_output")

    def _heads(self, x: Floats, name: str) -> Floats:
        """[n_heads, n_tokens, head_length]"""
        return self._linear(x, name).reshape(len(x), -1, self.s.head_length).transpose(1, 0, 2)

    def _placed(self, x: Floats, norm: str, rotated: int) -> Floats:
        if self.s.qk_norm == "before_rope":
            x = self._norm(x, norm)
        if rotated:
            x = self._rotated(x, rotated)
        return self._norm(x, norm) if self.s.qk_norm == "after_rope" else x

    def _rotated(self, x: Floats, n: int) -> Floats:
        """The first n elements of each head turned, those half as many apart in pairs."""
        s, half = self.s, n // 2
        frequencies = s.rope_freq_base ** (-np.arange(half) / half) / s.rope_scaling_factor
        if s.rope_freq_factors:
            frequencies = frequencies / self._tensor("rope_freqs.weight")
        angles = np.outer(np.arange(x.shape[1]), frequencies)
        cos, sin = (np.float32(s.rope_attention_factor * f(angles)) for f in (np.cos, np.sin))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1, dtype=np.float32)

    def _ffn(self, x: Floats, i: int) -> Floats:
        s, ffn = self.s, self.s.ffns[i]
        activate = _activation(ffn.activation, ffn.threshold)
        h = self._linear(x, f"blk.{i}.ffn_up")
        if ffn.gated:
            up = np.maximum(h, 0) if ffn.activation == "drelu" else h
            h = activate(self._linear(x, f"blk.{i}.ffn_gate")) * up
        else:
            h = activate(h)
        if ffn.sub_norm:
            h = h / np.sqrt((h**2).mean(-1, keepdims=True) + np.float32(s.norm_epsilon))
        return self._biased(h @ self._down(i).T, f"blk.{i}.ffn_down")

    def _down(self, i: int) -> Floats:
        """Block `i`'s down projection as the checkpoint has it, [n_embd, n_ff], whatever layouts the file stores."""
        source = self._tensors[f"blk.{i}.ffn_down_t.weight"].source
        assert isinstance(source, Source)
        with read(self._checkpoint, source) as stored:
            return np.asarray(stored[:], np.float32)


def _activation(name: str, threshold: float) -> Callable[[Floats], Floats]:
    table: dict[str, Callable[[Floats], Floats]] = {
        "relu": lambda x: np.maximum(x, 0),
        "drelu": lambda x: np.maximum(x, 0),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
        "fatrelu": lambda x: np.where(x > threshold, x, np.float32(0)),
    }
    return table[name]
