"""Makes tiny Hugging Face checkpoints with random weights, one per variant that the converter and the runtime must get
right.

Weights have a standard deviation of 0.2 (norms around 1, biases not zero), so that a mistake anywhere shows in the
logits. They are stored in bfloat16, as published checkpoints are. Every checkpoint is deterministic: its seed is its
folder's name.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parent.parent / "examples/tiny-relu-llama"
VOCAB_SIZE = 4096  # of that tokenizer
STD = 0.2


def first_block() -> dict[str, bytes]:
    """Files of the bundled checkpoint with one block instead of six: converting it takes seconds."""
    from safetensors.torch import load, save

    files = {path.name: path.read_bytes() for path in TOKENIZER.iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"num_hidden_layers": 1}).encode()
    tensors = load(files["model.safetensors"]).items()
    files["model.safetensors"] = save({k: v for k, v in tensors if not re.match(r"model\.layers\.[1-9]", k)})
    return files


_LLAMA = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "hidden_act": "relu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def make_llama(folder: Path, **overrides: Any) -> None:
    """Save a random Llama with ReGLU to `folder`; overrides are LlamaConfig's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save(LlamaForCausalLM(LlamaConfig(**{**_LLAMA, **overrides})), folder)


def make_opt(folder: Path, **overrides: Any) -> None:
    """Save a random OPT to `folder`; overrides are OPTConfig's."""
    from transformers import OPTConfig, OPTForCausalLM

    save(OPTForCausalLM(OPTConfig(**{**_OPT, **overrides})), folder)


def save(model: Any, folder: Path) -> None:
    """Save a transformers model with random weights, and a tokenizer, to `folder`."""
    randomize(model, seed=zlib.crc32(folder.name.encode()))
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def randomize(model: Any, seed: int) -> None:
    """Fill every parameter of a torch module with random numbers that hide no mistake."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(center + STD * torch.randn(parameter.shape, generator=generator))


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "llama-mha": make_llama,
    "llama-gqa": partial(make_llama, num_key_value_heads=2),
    "llama-tied": partial(make_llama, tie_word_embeddings=True, num_key_value_heads=1),
    "llama-head-dim": partial(make_llama, head_dim=16, num_hidden_layers=3),
    "llama-odd-ff": partial(make_llama, intermediate_size=352),
    "llama-rope-llama3": partial(make_llama, rope_parameters=_LLAMA3_ROPE),
    "llama-rope-linear": partial(
        make_llama, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "llama-biases": partial(make_llama, attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "llama-padded-vocab": partial(make_llama, vocab_size=VOCAB_SIZE + 32),
    "opt-pre-norm": make_opt,
    "opt-post-norm": partial(make_opt, do_layer_norm_before=False, word_embed_proj_dim=32),
    "opt-untied": partial(make_opt, tie_word_embeddings=False, ffn_dim=352),
}


def copy_checkpoint(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint to be broken; `config` replaces values of config.json, None removes them."""
    shutil.copytree(source, folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def load_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a checkpoint's single safetensors file, as torch tensors."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def save_tensors(folder: Path, tensors: dict[str, Any], shards: int = 1) -> None:
    """Save tensors as safetensors, in one file or several with an index."""
    from safetensors.torch import save_file

    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
