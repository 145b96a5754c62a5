"""PowerInfer's model files written byte by byte from the description of the format, and its predictors as torch saves them.

Independent of the project's own writer, reader and quantisation.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from checkpoints import VOCAB_SIZE, load_tensors, randomize

from runtime.model_file.reader import GgufFile

Array = npt.NDArray[Any]
Tensors = dict[str, tuple[Array, int]]
F32, F16, Q4_0 = 0, 1, 2  # enum ggml_type
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9  # enum gguf_type
ALIGNMENT = 32
THRESHOLD = 2.0  # of the predictors
RANK = 24  # of the made-up predictors: no multiple of a block in F16 files
RANK_Q4 = 32
# What PowerInfer's converters write of a SentencePiece vocabulary; today's files have more keys.
TOKENIZER_KEYS = ("model", "tokens", "scores", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id")


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    kind = {str: _STRING, float: _FLOAT32, int: _INT32}[type(value[0])]
    items = [_text(v) if kind == _STRING else struct.pack("<f" if kind == _FLOAT32 else "<i", v) for v in value]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(items)


def q4_0(rows: Array) -> bytes:
    """Blocks of 32: a half-float scale, the value of largest magnitude / -8, then nibbles, the first 16 values low."""
    x = rows.astype(np.float32).reshape(-1, 32)
    extreme = x[np.arange(len(x)), np.abs(x).argmax(1)]
    d = extreme / np.float32(-8)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)
    nibbles = np.minimum((x * inverse[:, None] + np.float32(8.5)).astype(np.int8), 15).astype(np.uint8)
    packed = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    return b"".join(s.tobytes() + q.tobytes() for s, q in zip(d.astype("<f2"), packed, strict=True))


def encoded(array: Array, kind: int) -> bytes:
    return q4_0(array) if kind == Q4_0 else array.astype("<f2" if kind == F16 else "<f4").tobytes()


def header_bytes(
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[tuple[int, ...], int, int]],
    magic: bytes = b"PWRI",
    version: int = 3,
) -> bytes:
    """All that stands before the tensors' data. shapes: row-major, with type and size in bytes."""
    header = magic + struct.pack("<IQQ", version, len(shapes), len(keys))
    header += b"".join(_text(key) + _value(value) for key, value in keys.items())
    offset = 0
    for name, (shape, kind, nbytes) in shapes.items():
        ne = shape[::-1]
        header += _text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)
        offset += nbytes + -nbytes % ALIGNMENT
    return header + bytes(-len(header) % ALIGNMENT)


def file_bytes(keys: Mapping[str, Any], tensors: Mapping[str, tuple[Array, int]], **options: Any) -> bytes:
    """A whole file. tensors: row-major arrays with their types; options: of `header_bytes`."""
    data = {name: encoded(array, kind) for name, (array, kind) in tensors.items()}
    header = header_bytes(keys, {n: (a.shape, kind, len(data[n])) for n, (a, kind) in tensors.items()}, **options)
    return header + b"".join(part + bytes(-len(part) % ALIGNMENT) for part in data.values())


def interleaved(weight: Array, n_heads: int) -> Array:
    """Hugging Face's query or key rows in GGUF's order: the two rows of a rotated pair become neighbours."""
    head = weight.reshape(n_heads, -1, weight.shape[-1])
    half = head.shape[1] // 2
    pairs = np.stack([head[:, :half], head[:, half:]], axis=2)
    return pairs.reshape(weight.shape)


def checkpoint_arrays(checkpoint: Path) -> dict[str, Array]:
    return {name: tensor.float().numpy() for name, tensor in load_tensors(checkpoint).items()}


def predictor_arrays(n_layers: int, d: int, n_ff: int, rank: int, seed: int = 0) -> list[tuple[Array, Array]]:
    """fc1 [rank, d] and fc2 [n_ff, rank] of every layer: whole numbers, so that scores have no rounding and ties occur."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(-3, 4, (rank, d)).astype(np.float32), rng.integers(-3, 4, (n_ff, rank)).astype(np.float32))
        for _ in range(n_layers)
    ]


def save_predictors(folder: Path, layers: list[tuple[Array, Array]], threshold: float | None = None) -> Path:
    """A folder with predictors as torch saves them."""
    folder.mkdir()
    for i, (fc1, fc2) in enumerate(layers):
        torch.save({"fc1.weight": torch.from_numpy(fc1), "fc2.weight": torch.from_numpy(fc2)}, folder / f"model_{i}.pt")
    if threshold is not None:
        (folder / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    return folder


_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
}
_OPT = {
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
}


def llama_tensors(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Array]:
    """A Llama checkpoint's tensors as PowerInfer's converter names and turns them, without predictors."""
    w = checkpoint_arrays(checkpoint)
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    found = {
        "token_embd.weight": w["model.embed_tokens.weight"],
        "output_norm.weight": w["model.norm.weight"],
        "output.weight": w["lm_head.weight"],
    }
    for i in range(config["num_hidden_layers"]):
        there = f"model.layers.{i}."
        found |= {f"blk.{i}.{ours}.weight": w[f"{there}{theirs}.weight"] for ours, theirs in _LLAMA.items()}
        for part, n in heads.items():
            found[f"blk.{i}.attn_{part}.weight"] = interleaved(w[f"{there}self_attn.{part}_proj.weight"], n)
        found[f"blk.{i}.ffn_down_t.weight"] = np.ascontiguousarray(w[f"{there}mlp.down_proj.weight"].T)
    return found


def opt_tensors(checkpoint: Path, config: Mapping[str, Any]) -> dict[str, Array]:
    """The same of an OPT checkpoint."""
    w = checkpoint_arrays(checkpoint)
    root = "model.decoder."
    found = {
        "token_embd.weight": w[f"{root}embed_tokens.weight"],
        "position_embd.weight": w[f"{root}embed_positions.weight"],
        "output_norm.weight": w[f"{root}final_layer_norm.weight"],
        "output_norm.bias": w[f"{root}final_layer_norm.bias"],
    }
    for i in range(config["num_hidden_layers"]):
        there = f"{root}layers.{i}."
        for part in ("weight", "bias"):
            found |= {f"blk.{i}.{ours}.{part}": w[f"{there}{theirs}.{part}"] for ours, theirs in _OPT.items()}
        found[f"blk.{i}.ffn_down_t.weight"] = np.ascontiguousarray(w[f"{there}fc2.weight"].T)
        found[f"blk.{i}.ffn_down_t.bias"] = w[f"{there}fc2.bias"]
    return found


def make_falcon(folder: Path, **overrides: Any) -> None:
    """Save a random Falcon with ReLU to `folder`; overrides are FalconConfig's."""
    from transformers import FalconConfig, FalconForCausalLM

    config = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "activation": "relu",
        "bias": False,
        "parallel_attn": True,
        "multi_query": True,
        "alibi": False,
    }
    model = FalconForCausalLM(FalconConfig(**{**config, **overrides}))
    randomize(model, seed=1)
    model.bfloat16().save_pretrained(folder)


def falcon_tensors(checkpoint: Path, config: Mapping[str, Any], n_kv: int) -> dict[str, Array]:
    """The same of a Falcon checkpoint: per group of queries one key and one value there, all queries first here."""
    w = checkpoint_arrays(checkpoint)
    n, width = config["num_attention_heads"], config["hidden_size"]
    found = {"token_embd.weight": w["transformer.word_embeddings.weight"]}
    found |= {f"output_norm.{part}": w[f"transformer.ln_f.{part}"] for part in ("weight", "bias")}
    for i in range(config["num_hidden_layers"]):
        there = f"transformer.h.{i}."
        both = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"} if n_kv > 1 else {"attn_norm": "input_layernorm"}
        for part in ("weight", "bias"):
            found |= {f"blk.{i}.{ours}.{part}": w[f"{there}{theirs}.{part}"] for ours, theirs in both.items()}
        groups = w[f"{there}self_attention.query_key_value.weight"].reshape(n_kv, n // n_kv + 2, width // n, width)
        turned = [groups[:, :-2], groups[:, -2], groups[:, -1]]
        found[f"blk.{i}.attn_qkv.weight"] = np.concatenate([part.reshape(-1, width) for part in turned])
        found[f"blk.{i}.attn_output.weight"] = w[f"{there}self_attention.dense.weight"]
        found[f"blk.{i}.ffn_up.weight"] = w[f"{there}mlp.dense_h_to_4h.weight"]
        found[f"blk.{i}.ffn_down_t.weight"] = np.ascontiguousarray(w[f"{there}mlp.dense_4h_to_h.weight"].T)
    return found


def with_types(tensors: Mapping[str, Array], kind: int) -> dict[str, tuple[Array, int]]:
    """Vectors in F32, matrices in `kind`, but positions and the output head no smaller than F16."""
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    wide = (head, "position_embd.weight")
    types = {name: F32 if a.ndim == 1 else min(kind, F16) if name in wide else kind for name, a in tensors.items()}
    return {name: (array, types[name]) for name, array in tensors.items()}


def parts(checkpoint: Path, kind: int, tokenizer_of: Path) -> tuple[dict[str, Any], Tensors]:
    """Keys and tensors of a PowerInfer file of a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    arch, opt = config["model_type"], config["model_type"] == "opt"
    n_ff = config["ffn_dim" if opt else "intermediate_size"]
    n_layers, width = config["num_hidden_layers"], config["hidden_size"]
    keys: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": "LLaMA v2",
        "general.file_type": kind,
        f"{arch}.context_length": config["max_position_embeddings"] + (2 if opt else 0),
        f"{arch}.embedding_length": width,
        f"{arch}.block_count": n_layers,
        f"{arch}.feed_forward_length": n_ff,
        f"{arch}.attention.head_count": config["num_attention_heads"],
        "powerinfer.sparse_threshold": THRESHOLD,
    }
    if not opt:
        rope = config["rope_parameters"]
        keys |= {
            f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
            f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            f"{arch}.rope.dimension_count": width // config["num_attention_heads"],
            f"{arch}.rope.freq_base": rope["rope_theta"],
        }
        if rope["rope_type"] == "linear":
            keys |= {f"{arch}.rope.scaling.type": "linear", f"{arch}.rope.scaling.factor": rope["factor"]}
    keys |= tokenizer_keys(tokenizer_of)
    arrays = (opt_tensors if opt else llama_tensors)(checkpoint, config)
    for i, (fc1, fc2) in enumerate(predictor_arrays(n_layers, width, n_ff, RANK_Q4)):
        arrays |= {f"blk.{i}.fc1.weight": fc1, f"blk.{i}.fc2.weight": fc2}
    return keys, with_types(arrays, kind)


def tokenizer_keys(path: Path) -> dict[str, Any]:
    with GgufFile(path) as file:
        found = {f"tokenizer.ggml.{key}": file.metadata[f"tokenizer.ggml.{key}"] for key in TOKENIZER_KEYS}
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
