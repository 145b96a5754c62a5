"""Tiny checkpoints of mixtures of experts, and what they compute, in float64 numpy.

The reference reads the checkpoint's own tensors, and shares no code with the converter or the runtime. One token after
the other: each has a router's choice of its own.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import STD, TOKENIZER, VOCAB_SIZE
from unequal import HEAD, WIDTH, Doubles, attended

HEADS, HEADS_KV, FF = 6, 2, 64
EPSILON, BASE = 1e-6, 10000.0
STRETCHED: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """smallthinker: the router sees the block's input, and names are SmallThinker's; else Mixtral's. rotates, windowed:
    per block. sigmoid: of the router's scores.
    """

    smallthinker: bool
    n_blocks: int = 3
    experts: int = 6
    used: int = 3
    drelu: bool = False
    sigmoid: bool = False
    rotates: tuple[int, ...] = (1, 1, 1)
    windowed: tuple[int, ...] = (0, 0, 0)
    window: int = 5
    context: int = 512
    tied: bool = False
    stretched: bool = False  # the rotation's long waves are slower, as in Llama 3.1

    # Of the family in tests/archs/sharing.py, whose names are Mixtral's beside: neurons that every token uses; the width
    # that experts see, 0 for the model's; whether neurons have gates; whether a bias helps to choose; what weights are
    # multiplied with.
    sharing: bool = False
    shared: int = 0
    latent: int = 0
    gated: bool = True
    biased: bool = False
    scale: float = 1.0

    ffn_type: str | None = None

    @property
    def family(self) -> str:
        """As in `convert.archs`."""
        if self.sharing:
            return "sharing"
        return "smallthinker" if self.smallthinker else "mixtral"

    def make(self, folder: Path, spoil: Callable[[dict[str, npt.NDArray[Any]]], object] = lambda _: None) -> None:
        """Save a checkpoint with random weights to `folder`, whose name is the seed. spoil: changes the weights."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(zlib.crc32(folder.name.encode()))
        weights: dict[str, npt.NDArray[Any]] = {
            name: np.float32(("norm" in name) + STD * rng.normal(size=shape)) for name, shape in self._shapes().items()
        }
        spoil(weights)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config()))
        for name in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, folder / name)

    def config(self) -> dict[str, Any]:
        """config.json's values."""
        common = {
            "vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "head_dim": HEAD, "num_hidden_layers": self.n_blocks,
            "max_position_embeddings": self.context, "num_attention_heads": HEADS, "num_key_value_heads": HEADS_KV,
            "rms_norm_eps": EPSILON, "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_theta": BASE, "rope_type": "default"} | (STRETCHED if self.stretched else {}),
        }  # fmt: skip
        if self.sharing:
            return common | {
                "architectures": ["SharingForCausalLM"], "model_type": "sharing", "intermediate_size": FF,
                "num_local_experts": self.experts, "num_experts_per_tok": self.used, "shared": self.shared,
                "latent": self.latent, "gated": self.gated, "biased": self.biased, "scale": self.scale,
                "sigmoid": self.sigmoid, "hidden_act": "relu" if self.gated else "relu2",
            }  # fmt: skip
        if not self.smallthinker:
            return common | {
                "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": FF,
                "num_local_experts": self.experts, "num_experts_per_tok": self.used, "sliding_window": None,
                "hidden_act": "drelu" if self.drelu else "relu",
            }  # fmt: skip
        return common | {
            "architectures": ["SmallThinkerForCausalLM"], "model_type": "smallthinker", "moe_ffn_hidden_size": FF,
            "moe_num_primary_experts": self.experts, "moe_num_active_primary_experts": self.used,
            "moe_primary_router_apply_softmax": not self.sigmoid, "rope_layout": list(self.rotates),
            "sliding_window_layout": list(self.windowed), "sliding_window_size": self.window,
            "moe_layer_layout": [1] * self.n_blocks,
        }  # fmt: skip

    @property
    def names(self) -> tuple[str, str, str, str]:
        """How a checkpoint calls the router, and gate, up and down of an expert."""
        if self.smallthinker:
            return "primary_router", "gate", "up", "down"
        return "gate", "w1", "w3", "w2"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, row-major as in a checkpoint: [n_out, n_in]."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, WIDTH)}
        if not self.tied:
            shapes["lm_head.weight"] = (VOCAB_SIZE, WIDTH)
        shapes["model.norm.weight"] = (WIDTH,)
        router, gate, up, down = self.names
        for i in range(self.n_blocks):
            at = f"model.layers.{i}."
            shapes |= {f"{at}{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
            shapes |= {f"{at}self_attn.{part}_proj.weight": (HEADS_KV * HEAD, WIDTH) for part in "kv"}
            shapes[f"{at}self_attn.q_proj.weight"] = (HEADS * HEAD, WIDTH)
            shapes[f"{at}self_attn.o_proj.weight"] = (WIDTH, HEADS * HEAD)
            shapes[f"{at}block_sparse_moe.{router}.weight"] = (self.experts, WIDTH)
            parts = (gate, up) if self.gated else (up,)
            for e in range(self.experts):
                expert, width = f"{at}block_sparse_moe.experts.{e}.", self.latent or WIDTH
                shapes |= {f"{expert}{part}.weight": (FF, width) for part in parts}
                shapes[f"{expert}{down}.weight"] = (width, FF)
            if self.shared:
                expert = f"{at}block_sparse_moe.shared."
                shapes |= {f"{expert}{part}.weight": (self.shared, WIDTH) for part in parts}
                shapes[f"{expert}{down}.weight"] = (WIDTH, self.shared)
            if self.latent:
                shapes[f"{at}block_sparse_moe.latent_down.weight"] = (self.latent, WIDTH)
                shapes[f"{at}block_sparse_moe.latent_up.weight"] = (WIDTH, self.latent)
            if self.biased:
                shapes[f"{at}block_sparse_moe.gate.e_score_correction_bias"] = (self.experts,)
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
        for i in range(self.model.n_blocks):
            at = f"model.layers.{i}."
            h = x + self.attention(self.norm(x, f"{at}input_layernorm"), at, i)
            seen = self.norm(h, f"{at}post_attention_layernorm")
            x = h + self.experts(seen, x if self.model.smallthinker else seen, at)
        head = "model.embed_tokens" if self.model.tied else "lm_head"
        return self.norm(x, "model.norm") @ self.weights[f"{head}.weight"].T

    def norm(self, x: Doubles, name: str) -> Doubles:
        return x / np.sqrt((x * x).mean(1, keepdims=True) + EPSILON) * self.weights[f"{name}.weight"]

    def experts(self, x: Doubles, routed_by: Doubles, at: str) -> Doubles:
        """Each token's experts, one by one."""
        model, moe = self.model, f"{at}block_sparse_moe."
        out = np.zeros_like(x)
        for t, (token, seen) in enumerate(zip(x, routed_by, strict=True)):
            given = self.weights[f"{moe}latent_down.weight"] @ token if model.latent else token
            made = sum(share * self.expert(given, f"{moe}experts.{e}.") for e, share in self.choice(seen, moe))
            out[t] = self.weights[f"{moe}latent_up.weight"] @ made if model.latent else made
            if model.shared:
                out[t] += self.expert(token, f"{moe}shared.")
        return out

    def choice(self, seen: Doubles, moe: str) -> Iterator[tuple[int, float]]:
        """A token's experts, and what they give is multiplied with."""
        logits = self.weights[f"{moe}{self.model.names[0]}.weight"] @ seen
        judged = logits
        if self.model.biased:
            judged = 1 / (1 + np.exp(-logits)) + self.weights[f"{moe}gate.e_score_correction_bias"]
        chosen = np.argsort(-judged)[: self.model.used]
        scores = 1 / (1 + np.exp(-logits[chosen])) if self.model.sigmoid else np.exp(logits[chosen] - logits.max())
        return zip(chosen.tolist(), self.model.scale * scores / scores.sum(), strict=True)

    def expert(self, x: Doubles, at: str) -> Doubles:
        """What one expert makes of a token."""
        _, gate, up, down = (self.weights.get(f"{at}{part}.weight") for part in self.model.names)
        assert up is not None and down is not None
        if gate is None:
            return down @ np.maximum(up @ x, 0) ** 2
        lifted = np.maximum(up @ x, 0) if self.model.drelu else up @ x
        return down @ (np.maximum(gate @ x, 0) * lifted)

    def rotated(self, x: Doubles) -> Doubles:
        """x [n_tokens, n_heads, HEAD]: element j and element j + HEAD / 2 are one complex number, turned by its position."""
        half = HEAD // 2
        waves = BASE ** (-np.arange(half) / half)
        if self.model.stretched:
            turns = STRETCHED["original_max_position_embeddings"] * waves / (2 * np.pi)
            kept = np.clip((turns - 1) / (4 - 1), 0, 1)  # low_freq_factor, high_freq_factor
            waves = waves * (kept + (1 - kept) / STRETCHED["factor"])
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.outer(np.arange(len(x)), waves))[:, None, :]
        return np.concatenate([z.real, z.imag], axis=-1)

    def attention(self, x: Doubles, at: str, i: int) -> Doubles:
        n = len(x)
        q, k, v = ((x @ self.weights[f"{at}self_attn.{part}_proj.weight"].T).reshape(n, -1, HEAD) for part in "qkv")
        if self.model.rotates[i]:
            q, k = self.rotated(q), self.rotated(k)
        mixed = attended(q, k, v, self.model.window if self.model.windowed[i] else 0)
        return mixed.reshape(n, -1) @ self.weights[f"{at}self_attn.o_proj.weight"].T


MODELS = {
    "mixtral-drelu-tied": Model(False, drelu=True, experts=8, used=2, tied=True),
    "smallthinker-4b": Model(True, sigmoid=True, tied=True),
    "smallthinker-21b": Model(True, sigmoid=True, rotates=(0, 1, 1), windowed=(0, 1, 1), experts=16, used=6),
    "smallthinker-softmax": Model(True, rotates=(1, 0, 1), windowed=(1, 0, 0), used=1, stretched=True),
}

# With tests/archs/sharing.py in the converter's list of families.
SHARING = {
    "shared": Model(False, sharing=True, shared=96, used=2, experts=4),
    "latent": Model(
        False, sharing=True, shared=160, latent=32, gated=False, sigmoid=True, biased=True, scale=2.5, used=4
    ),
    "latent-alone": Model(False, sharing=True, latent=64, tied=True),
}
