"""A model that writes a given text for ever, byte by byte: what it says is known, and may be hard to show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from convert import convert

TOKENIZER = Path(__file__).parent.parent / "examples/tiny-relu-llama"
WOMEN = "\N{WOMAN}\N{ZERO WIDTH JOINER}"
_D, _FF, _LAYERS, _VOCAB = 32, 64, 2, 4096

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": _D,
    "intermediate_size": _FF,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 2,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_parrot(folder: Path, text: str) -> Path:
    """The GGUF file of a model that writes `text`, in which no byte occurs twice: parrot.gguf in `folder`.

    Two layers whose neurons fire and add nothing, 16,384 tokens of context.
    """
    from safetensors.numpy import save_file

    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps(_CONFIG))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, checkpoint / name)
    save_file(_weights([3 + byte for byte in text.encode()]), checkpoint / "model.safetensors")
    convert(checkpoint, folder / "parrot.gguf", type="f16", calibration="none")
    return folder / "parrot.gguf"


def _weights(tokens: list[int]) -> dict[str, np.ndarray]:
    # `tokens` are the tokenizer's for single bytes. Each has a direction of its own and asks for the next one; every other asks for the first.
    embeddings, head = np.zeros((_VOCAB, _D), np.float32), np.zeros((_VOCAB, _D), np.float32)
    embeddings[:, 0] = 1
    embeddings[tokens] = np.eye(len(tokens), _D, k=1)
    head[np.roll(tokens, -1)] = np.eye(len(tokens), _D, k=1)
    head[tokens[0], 0] = 1
    weights = {"model.embed_tokens.weight": embeddings, "lm_head.weight": head, "model.norm.weight": np.ones(_D)}
    rng = np.random.default_rng(0)
    for i in range(_LAYERS):
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": np.zeros((_D, _D)) for name in "qkvo"}
        weights |= {f"{layer}.{name}_layernorm.weight": np.ones(_D) for name in ("input", "post_attention")}
        weights[f"{layer}.mlp.gate_proj.weight"] = rng.normal(size=(_FF, _D))
        weights[f"{layer}.mlp.up_proj.weight"] = rng.normal(size=(_FF, _D))
        weights[f"{layer}.mlp.down_proj.weight"] = np.zeros((_D, _FF))
    return {name: np.ascontiguousarray(values, np.float32) for name, values in weights.items()}
