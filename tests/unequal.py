"""Tiny checkpoints whose blocks differ in kind and in size, and what they compute, in float64 numpy.

The reference reads the checkpoint's own tensors and config, and shares no code with the converter or the runtime.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import STD, TOKENIZER, VOCAB_SIZE

Doubles = npt.NDArray[np.float64]

WIDTH, HEAD, WINDOW = 96, 16, 5
EPSILON, BASE = 1e-5, 10000.0


@dataclass(frozen=True)
class Block:
    """heads, heads_kv: 0 for a block without attention; ff: 0 for one without an FFN."""

    heads: int = 0
    heads_kv: int = 0
    ff: int = 0
    rope: bool = True
    window: bool = False


@dataclass(frozen=True)
class Model:
    """Blocks, and what they have in common. biases: of all projections; norm: "rms" or "layer"."""

    blocks: tuple[Block, ...]
    gated: bool = True
    activation: str = "relu"
    norm: str = "rms"
    parallel: bool = False
    biases: bool = False

    def make(self, folder: Path) -> None:
        """Save a checkpoint with random weights to `folder`, whose name is the seed."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True)
        rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
        weights = {
            name: np.float32(
                (1.0 if "norm" in name and name.endswith("weight") else 0.0) + STD * rng.normal(size=shape)
            )
            for name, shape in self._shapes().items()
        }
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self._config()))
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder / name)

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["UnequalForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": WIDTH,
            "head_dim": HEAD,
            "num_hidden_layers": len(self.blocks),
            "max_position_embeddings": 512,
            "num_attention_heads": [b.heads for b in self.blocks],
            "num_key_value_heads": [b.heads_kv for b in self.blocks],
            "intermediate_size": [b.ff for b in self.blocks],
            "rotates": [b.rope for b in self.blocks],
            "sliding_window": WINDOW,
            "windowed": [b.window for b in self.blocks],
            "hidden_act": self.activation,
            "gate": "gated" if self.gated else "none",
            "norm": self.norm,
            "residual": "parallel" if self.parallel else "sequential",
            "biases": self.biases,
        }

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, row-major as in a checkpoint: [n_out, n_in]."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCAB_SIZE, WIDTH),
            "lm_head.weight": (VOCAB_SIZE, WIDTH),
        }

        def norm(name: str) -> None:
            parts = ("weight", "bias") if self.norm == "layer" else ("weight",)
            shapes.update({f"{name}.{part}": (WIDTH,) for part in parts})

        def matrix(name: str, n_out: int, n_in: int) -> None:
            shapes[f"{name}.weight"] = (n_out, n_in)
            if self.biases:
                shapes[f"{name}.bias"] = (n_out,)

        norm("model.norm")
        for i, b in enumerate(self.blocks):
            at = f"model.layers.{i}."
            if b.heads:
                norm(f"{at}input_layernorm")
                matrix(f"{at}self_attn.q_proj", b.heads * HEAD, WIDTH)
                matrix(f"{at}self_attn.k_proj", b.heads_kv * HEAD, WIDTH)
                matrix(f"{at}self_attn.v_proj", b.heads_kv * HEAD, WIDTH)
                matrix(f"{at}self_attn.o_proj", WIDTH, b.heads * HEAD)
            if b.ff:
                norm(f"{at}post_attention_layernorm")
                for part in ("gate", "up") if self.gated else ("up",):
                    matrix(f"{at}mlp.{part}_proj", b.ff, WIDTH)
                matrix(f"{at}mlp.down_proj", WIDTH, b.ff)
        return shapes

    def logits(self, folder: Path, ids: list[int]) -> Doubles:
        """float64 [len(ids), n_vocab] of the checkpoint in `folder`."""
        from safetensors.numpy import load_file

        return _Reference(self, load_file(folder / "model.safetensors")).logits(ids)


class _Reference:
    def __init__(self, model: Model, weights: dict[str, npt.NDArray[Any]]) -> None:
        self.model, self.weights = model, {name: value.astype(np.float64) for name, value in weights.items()}

    def logits(self, ids: list[int]) -> Doubles:
        x = self.weights["model.embed_tokens.weight"][ids]
        for i, block in enumerate(self.model.blocks):
            at = f"model.layers.{i}."
            attended = x + self.attention(self.norm(x, f"{at}input_layernorm"), at, block) if block.heads else x
            if block.ff:
                source = x if self.model.parallel else attended
                attended = attended + self.ffn(self.norm(source, f"{at}post_attention_layernorm"), at)
            x = attended
        return self.norm(x, "model.norm") @ self.weights["lm_head.weight"].T

    def linear(self, x: Doubles, name: str) -> Doubles:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", np.float64(0))

    def norm(self, x: Doubles, name: str) -> Doubles:
        if self.model.norm == "layer":
            x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + EPSILON)
        return x * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", np.float64(0))

    def ffn(self, x: Doubles, at: str) -> Doubles:
        first = np.maximum(self.linear(x, f"{at}mlp.{'gate' if self.model.gated else 'up'}_proj"), 0)
        h = first * first if self.model.activation == "relu2" else first
        if self.model.gated:
            up = self.linear(x, f"{at}mlp.up_proj")
            h = h * (np.maximum(up, 0) if self.model.activation == "drelu" else up)
        return self.linear(h, f"{at}mlp.down_proj")

    def attention(self, x: Doubles, at: str, block: Block) -> Doubles:
        n = len(x)
        q, k, v = (self.linear(x, f"{at}self_attn.{part}_proj").reshape(n, -1, HEAD) for part in "qkv")
        if block.rope:
            q, k = rotated(q), rotated(k)
        mixed = attended(q, k, v, WINDOW if block.window else 0)
        return self.linear(mixed.reshape(n, -1), f"{at}self_attn.o_proj")


def attended(q: Doubles, k: Doubles, v: Doubles, window: int) -> Doubles:
    """Causal attention of q [n_tokens, n_heads, HEAD] over as many k and v, of fewer heads; window: 0 for none."""
    mixed, group = np.empty_like(q), q.shape[1] // k.shape[1]
    for t, head in np.ndindex(q.shape[:2]):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
        scores = k[seen, head // group] @ q[t, head] / np.sqrt(HEAD)
        weights = np.exp(scores - scores.max())
        mixed[t, head] = weights / weights.sum() @ v[seen, head // group]
    return mixed


def rotated(x: Doubles) -> Doubles:
    """x [n_tokens, n_heads, HEAD]: element j and element j + HEAD / 2 are one complex number, turned by position x frequency j."""
    half = HEAD // 2
    turns = np.exp(1j * np.outer(np.arange(len(x)), BASE ** (-np.arange(half) / half)))[:, None, :]
    z = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([z.real, z.imag], axis=-1)


# Attention alone, an FFN alone, both; two lengths of FFN; a block that does not rotate; windows; 1, 2, 3 and 6 key-value heads.
_BOTH = Block(6, 2, 224)
_ATTENTION = Block(6, 1, rope=False)
_FFN = Block(ff=352)
_WINDOWED = Block(6, 6, 352, window=True)
_NARROW = Block(3, 3, window=True)

MODELS = {
    "ends with an FFN": Model((_BOTH, _ATTENTION, _FFN, _WINDOWED, _NARROW, Block(ff=224))),
    "ends with attention": Model(
        (_FFN, _NARROW, _BOTH, _ATTENTION, Block(ff=224), _WINDOWED, Block(6, 2)), activation="drelu", biases=True
    ),
    "parallel and ungated": Model(
        (_WINDOWED, _FFN, _ATTENTION, Block(6, 3, 224, rope=False)),
        gated=False,
        activation="relu2",
        norm="layer",
        parallel=True,
        biases=True,
    ),
}
