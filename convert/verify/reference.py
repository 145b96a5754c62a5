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
from convert.plan import Plan, PlannedTensor
from convert.verify.mamba2 import Mamba2Weights, mix
from runtime.bindings.ffn_shape import Experts, FfnShape
from runtime.model_file import tensor_names as names
from runtime.model_file.structure import Mamba2

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
        x = self.embeddings(ids)
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
        return self._rows_of(self._tensors[name], start, stop)

    def _rows_of(self, tensor: PlannedTensor, start: int, stop: int) -> Floats:
        if isinstance(tensor.source, Generated):
            return tensor.source.make(self._checkpoint.config)[start:stop]
        assert isinstance(tensor.source, Source)
        with read(self._checkpoint, tensor.source) as stored:
            return np.asarray(tensor.rewrite.rows(stored, start, stop), np.float32)

    def _picked(self, name: str, ids: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """The rows `ids` of a tensor of the checkpoint: [len(ids), n_in]."""
        tensor = self._tensors[name]
        assert isinstance(tensor.source, Source)
        distinct, places = np.unique(np.asarray(ids), return_inverse=True)
        with read(self._checkpoint, tensor.source) as stored:
            rows = [np.asarray(tensor.rewrite.rows(stored, i, i + 1), np.float32) for i in distinct.tolist()]
        return np.concatenate(rows)[places]

    def _tensor(self, name: str) -> Floats:
        return self._rows(name, 0, self._tensors[name].rows)

    def _stored(self, name: str) -> Floats:
        """A tensor as the checkpoint has it, whatever the file stores of it."""
        return self._source_of(self._tensors[name])

    def _source_of(self, tensor: PlannedTensor) -> Floats:
        assert isinstance(tensor.source, Source)
        with read(self._checkpoint, tensor.source) as stored:
            return np.asarray(stored[:], np.float32)

    def _linear(self, x: Floats, name: str, e: int | None = None) -> Floats:
        """x times a matrix, or that of expert `e`."""
        if e is not None:
            part = self._tensors[f"{name}.weight"].parts[e]
            return x @ self._rows_of(part, 0, part.rows).T
        return self._biased(x @ self._tensor(f"{name}.weight").T, name)

    def _biased(self, x: Floats, name: str) -> Floats:
        bias = f"{name}.bias"
        return x + self._tensor(bias) if bias in self._tensors else x

    def _norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(-1, keepdims=True) if self.s.norm == "layer" else x
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(self.s.norm_epsilon))
        return self._biased(centred / scale * self._tensor(f"{name}.weight"), name)

    # --- a model, from its two ends to the middle --------------------------------------------------------------------

    def embeddings(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """Hidden states before the first block, float32 [len(ids), n_embd]."""
        s = self.s
        x = self._picked("token_embd.weight", ids) * np.float32(s.embedding_scale)
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
        norms = f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"
        if s.norm_placement == "post":
            h = self._norm(x + scale * self._mixed(x, i), norms[0]) if block.mixer else x
            return self._norm(h + scale * self._ffn(h, i, block.ffn), norms[1]) if block.ffn else h
        mixed = self._mixed(self._norm(x, norms[0]), i) if block.mixer else np.float32(0)
        h = x + scale * mixed
        if not block.ffn:
            return h
        seen = self._norm(x if s.residual == "parallel" else h, norms[1])
        if experts := block.ffn.experts:
            made = self._experts(seen, x if experts.tap == "block" else seen, i, experts)
            return h + scale * (made + self._ffn(seen, i, block.shared) if block.shared else made)
        return h + scale * self._ffn(seen, i, block.ffn)

    def _mixed(self, x: Floats, i: int) -> Floats:
        mixer = self.s.blocks[i].mixer
        return self._mamba2(x, i, mixer) if isinstance(mixer, Mamba2) else self._attention(x, i)

    def _mamba2(self, x: Floats, i: int, m: Mamba2) -> Floats:
        conv, *vectors = (
            self._stored(f"blk.{i}.ssm_{name}")
            for name in ("conv1d.weight", "conv1d.bias", "dt.bias", "a", "d", "norm.weight")
        )
        weights = Mamba2Weights(conv[:, 0], *vectors)
        mixed = mix(self._linear(x, f"blk.{i}.ssm_in"), weights, m.group_count, m.state_length, self.s.norm_epsilon)
        return self._linear(mixed, f"blk.{i}.ssm_out")

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

    def _experts(self, x: Floats, routed_by: Floats, i: int, e: Experts) -> Floats:
        """Expert by expert, for the tokens that chose it."""
        chosen, weights = self._routed(self._linear(routed_by, f"blk.{i}.{names.ROUTER}"), i, e)
        if self.s.expert_latent_length:
            x = self._linear(x, f"blk.{i}.{names.LATENT_DOWN}")
        out = np.zeros_like(x)
        for expert in range(e.count):
            tokens, places = np.nonzero(chosen == expert)
            if len(tokens):
                made = self._neurons(x[tokens], i, self.s.ffns[i], expert) @ self._down(i, self.s.ffns[i], expert).T
                out[tokens] += weights[tokens, places, None] * made
        return self._linear(out, f"blk.{i}.{names.LATENT_UP}") if self.s.expert_latent_length else out

    def _routed(self, logits: Floats, i: int, e: Experts) -> tuple[npt.NDArray[np.int64], Floats]:
        """The experts of each token and the weights of what they give, both [n_tokens, used]."""
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        scores = 1 / (1 + np.exp(-logits)) if e.gating == "sigmoid" else powers / powers.sum(-1, keepdims=True)
        judged = logits if e.gating == "softmax_weight" else scores
        if e.bias:
            judged = judged + self._tensor(f"blk.{i}.{names.ROUTER_BIAS}.bias")
        chosen = np.argsort(-judged, axis=-1, kind="stable")[:, : e.used]
        weights = np.take_along_axis(scores, chosen, -1)
        if e.normalised or e.gating == "softmax_weight":
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, np.float32(e.scale) * weights

    def _neurons(self, x: Floats, i: int, ffn: FfnShape, e: int | None = None) -> Floats:
        """What each neuron of an FFN, or of its expert `e`, is multiplied with its down row by: [n_tokens, n]."""
        stems, activate = names.stems(ffn), _activation(ffn.activation, ffn.threshold)
        h = self._linear(x, names.in_block(i, stems.up), e)
        if not ffn.gated:
            return activate(h)
        up = np.maximum(h, 0) if ffn.activation == "drelu" else h
        return np.asarray(activate(self._linear(x, names.in_block(i, stems.gate), e)) * up)

    def _ffn(self, x: Floats, i: int, ffn: FfnShape) -> Floats:
        s = self.s
        h = self._neurons(x, i, ffn)
        if ffn.sub_norm:
            h = h / np.sqrt((h**2).mean(-1, keepdims=True) + np.float32(s.norm_epsilon))
        return self._biased(h @ self._down(i, ffn).T, f"blk.{i}.ffn_down")

    def _down(self, i: int, ffn: FfnShape, e: int = 0) -> Floats:
        """Block `i`'s down projection, or its expert's, as the checkpoint has it, [n_embd, n_ff], whatever layouts the
        file stores.
        """
        return self._source_of(self._tensors[names.weight_of(i, names.stems(ffn).down_t)].parts[e])


def _activation(name: str, threshold: float) -> Callable[[Floats], Floats]:
    table: dict[str, Callable[[Floats], Floats]] = {
        "relu": lambda x: np.maximum(x, 0),
        "drelu": lambda x: np.maximum(x, 0),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
        "fatrelu": lambda x: np.where(x > threshold, x, np.float32(0)),
    }
    return table[name]
