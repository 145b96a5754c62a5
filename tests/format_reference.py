"""What docs/format.md says that a file of schema 1 or 2 computes, in float64 numpy, read with the `gguf` package alone.

Shares no code with the runtime: neither its reader nor its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class FormatReference:
    """The model in some files: one, or all shards of it.

    predicted: neurons that its predictor does not name count as zero. hot: so many neurons of each block are computed
    whatever the predictor says, and projected by `ffn_down`, which in quantised files holds slightly other numbers than
    `ffn_down_t`: all of them in dense mode, those on a device in the others.
    """

    def __init__(self, paths: Sequence[Path], predicted: bool = False, hot: int = 0) -> None:
        readers = [gguf.GGUFReader(path) for path in paths]
        self.keys = {name: field.contents() for name, field in readers[0].fields.items()}
        self.tensors = {tensor.name: _numbers(tensor) for reader in readers for tensor in reader.tensors}
        self.predicted, self.hot = predicted, hot

    def key(self, name: str) -> Any:
        return self.keys[f"lazyneuron.{name}"]

    def default(self, name: str, value: Any) -> Any:
        """A key of schema 2, which files of schema 1 need not have."""
        return self.keys.get(f"lazyneuron.{name}", value)

    def logits(self, ids: Sequence[int]) -> Doubles:
        """float64 [len(ids), n_vocab]."""
        x = self.tensors["token_embd.weight"][list(ids)] * self.default("embedding_scale", 1.0)
        if "token_embd_proj.weight" in self.tensors:
            x = self.linear(x, "token_embd_proj")
        if self.key("position") == "learned":
            x = x + self.tensors["position_embd.weight"][: len(ids)]
        if self.default("embedding_norm", False):
            x = self.norm(x, "token_embd_norm")
        for i in range(self.key("block_count")):
            x = self.block(x, f"blk.{i}.")
        x = self.norm(x, "output_norm") if self.key("output_norm") else x
        if "output_proj.weight" in self.tensors:
            x = self.linear(x, "output_proj")
        x = self.linear(x * self.default("logit_scale", 1.0), "token_embd" if self.key("tied_output") else "output")
        cap = self.default("logit_softcap", 0.0)
        return cap * np.tanh(x / cap) if cap else x

    def block(self, x: Doubles, at: str) -> Doubles:
        scale = self.default("residual_scale", 1.0)
        if self.key("norm_placement") == "post":
            stream = x + scale * self.attention(x, at)
            h = self.norm(stream, f"{at}attn_norm")
            return self.norm(h + scale * self.ffn(h, stream, at), f"{at}ffn_norm")
        h = x + scale * self.attention(self.norm(x, f"{at}attn_norm"), at)
        stream = x if self.key("residual") == "parallel" else h
        return h + scale * self.ffn(self.norm(stream, f"{at}ffn_norm"), stream, at)

    def linear(self, x: Doubles, name: str) -> Doubles:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", np.float64(0))

    def norm(self, x: Doubles, name: str) -> Doubles:
        if self.key("norm") == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.key("norm_epsilon"))
        return x * self.tensors[f"{name}.weight"] + self.tensors.get(f"{name}.bias", np.float64(0))

    def attention(self, x: Doubles, at: str) -> Doubles:
        n, length = len(x), self.key("attention.key_length")
        q, k, v = (self.linear(x, f"{at}attn_{part}").reshape(n, -1, length) for part in "qkv")
        q, k = self.placed(q, f"{at}attn_q_norm"), self.placed(k, f"{at}attn_k_norm")
        mixed, group = np.empty_like(q), q.shape[1] // k.shape[1]
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T / np.sqrt(length)
            weights = np.exp(scores - scores.max(1, keepdims=True)) * np.tri(n)
            mixed[:, head] = weights / weights.sum(1, keepdims=True) @ v[:, head // group]
        flat = mixed.reshape(n, -1)
        if self.default("attention.sub_norm", False):
            flat = self.norm(flat, f"{at}attn_sub_norm")
        return self.linear(flat, f"{at}attn_output")

    def placed(self, x: Doubles, norm: str) -> Doubles:
        """Queries or keys [n_tokens, n_heads, key_length]."""
        where = self.default("attention.qk_norm", "none")
        x = self.norm(x, norm) if where == "before_rope" else x
        x = self.turned(x) if self.key("position") != "learned" else x
        return self.norm(x, norm) if where == "after_rope" else x

    def turned(self, x: Doubles) -> Doubles:
        """Pairs of elements as complex numbers, each turned by its position times its frequency."""
        n = self.key("rope.dimension_count")
        half = n // 2
        frequencies = self.key("rope.freq_base") ** (-np.arange(half) / half)
        if self.key("rope.scaling.type") == "linear":
            frequencies = frequencies / self.key("rope.scaling.factor")
        if self.key("rope.freq_factors"):
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        turns = self.default("rope.scaling.attn_factor", 1.0) * np.exp(1j * np.outer(np.arange(len(x)), frequencies))
        neighbours = self.key("position") == "rope_norm"
        first, second = (slice(0, n, 2), slice(1, n, 2)) if neighbours else (slice(0, half), slice(half, n))
        z, result = (x[..., first] + 1j * x[..., second]) * turns[:, None], x.copy()
        result[..., first], result[..., second] = z.real, z.imag
        return result

    def ffn(self, x: Doubles, stream: Doubles, at: str) -> Doubles:
        kind, gated = self.key("ffn.activation"), self.key("ffn.gate") == "gated"
        first = self.linear(x, f"{at}ffn_gate" if gated else f"{at}ffn_up")
        threshold = self.key("ffn.activation_threshold") if kind == "fatrelu" else 0.0
        h = np.where(first > threshold, first, 0.0)
        h = h * h if kind == "relu2" else h
        if gated:
            up = self.linear(x, f"{at}ffn_up")
            h = h * (np.maximum(up, 0) if kind == "drelu" else up)
        if self.predicted:
            named = self.candidates(x if self.key("predictor.tap") == "ffn_norm" else stream, at)
            h[:, self.hot :] *= named[:, self.hot :]
        if self.default("ffn.sub_norm", False):
            h = h / np.sqrt((h * h).mean(-1, keepdims=True) + self.key("norm_epsilon"))
        down = self.tensors[f"{at}ffn_down_t.weight"].copy()
        if self.hot:
            down[: self.hot] = self.tensors[f"{at}ffn_down.weight"].T[: self.hot]
        return h @ down + self.tensors.get(f"{at}ffn_down.bias", np.float64(0))

    def candidates(self, x: Doubles, at: str) -> npt.NDArray[np.bool_]:
        """Whose score is above 0: bool [n_tokens, n_ff]; all in a block without a predictor."""
        bias = self.tensors.get(f"{at}predictor_out.bias")
        if bias is None:
            return np.ones((len(x), self.key("feed_forward_length")), np.bool_)
        if self.key("predictor.kind") == "signbit":
            bits = self.tensors[f"{at}predictor_sign"].astype(np.int8).view(np.uint8)
            negative = np.unpackbits(bits, axis=1, bitorder="little").astype(np.bool_)
            scores = -((x < 0)[:, None] != negative).sum(2, dtype=np.float64)
        else:
            inner = x @ self.tensors[f"{at}predictor_in.weight"].T
            inner = np.maximum(inner, 0) if self.key("predictor.kind") == "mlp" else inner
            scores = inner @ self.tensors[f"{at}predictor_out.weight"].T
        assert (np.abs(scores + bias) > 1e-5).all(), "a score so close to 0 that rounding decides: use other weights"
        return scores + bias > 0


def _numbers(tensor: Any) -> Doubles:
    """A tensor as numbers, row-major."""
    if tensor.tensor_type.name in ("I8", "I32"):
        return np.asarray(tensor.data, np.float64)
    return np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float64)
