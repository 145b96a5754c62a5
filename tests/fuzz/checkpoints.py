"""Targets of the converter: damaged checkpoints of Llama and of a mixture of experts; of every family its config.json, which needs no weights to be read."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from convert.arch import describe, families, find_arch
from convert.checkpoint import open_checkpoint
from convert.config import read_json
from convert.job import convert
from convert.plan import Types, make_plan
from fuzz import mutate, mutate_json
from fuzz.bases import VOCAB
from fuzz.models import runs
from fuzz.tokenizers import CONFIG, byte_level_files, damaged_file, small_files
from fuzz.worker import Files, Target, seeded

D, FF = CONFIG["hidden_size"], CONFIG["intermediate_size"]
_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# Keys that some family reads, with the values that they have somewhere.
_OTHERS: dict[str, Any] = {
    "model_type": "opt", "activation_function": "relu", "word_embed_proj_dim": 16, "do_layer_norm_before": False, "ffn_dim": FF,
    "hidden_act": "relu2", "hidden_act_param": 0.01, "partial_rotary_factor": 0.5, "rope_parameters": _ROPE, "n_head": 2, "n_layer": 1,
    "activation": "relu", "bias": True, "alibi": False, "parallel_attn": True, "multi_query": True, "new_decoder_architecture": True,
    "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 64, "layer_norm_epsilon": 1e-5, "sliding_window": 32,
    "quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}, "scale_emb": 12, "scale_depth": 1.4,
    "dim_model_base": 16, "qk_layernorm": True, "final_logit_softcapping": 5.0, "norm_eps": 1e-5, "mlp_bias": False,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.0},
    "use_sliding_window": False, "layer_types": ["full_attention"], "pretraining_tp": 1, "mlp_only_layers": [], "head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_num_primary_experts": 4, "moe_num_active_primary_experts": 2,
    "moe_ffn_hidden_size": 64, "moe_primary_router_apply_softmax": True, "moe_layer_layout": [1], "moe_enable_secondary_experts": False,
    "moe_enable_early_router": True, "rope_layout": [1], "sliding_window_layout": [0], "sliding_window_size": 4, "n_group": 1,
    "topk_group": 1, "topk_method": "greedy", "num_hash_layers": 0, "n_shared_experts": 0, "shared_expert_intermediate_size": 0,
}  # fmt: skip
# A mixture of experts: what its config.json says otherwise than that of the Llama.
_EXPERTS = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2,
    "sliding_window": 5,
}  # fmt: skip
_WORDS = tuple(dict.fromkeys([*CONFIG, *_OTHERS, "llama3", "yarn", "linear", "default", "dynamic", "longrope", "relu", "silu", "type", "rope_type", "factor", "low_freq_factor", "gptq", "awq"]))  # fmt: skip


def weights(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a Llama or a Mixtral of this config."""
    rng, kv = np.random.default_rng(0), config["num_key_value_heads"] * 16
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, D),
        "lm_head.weight": (VOCAB, D),
        "model.norm.weight": (D,),
    }
    layer = "model.layers.0."
    n_experts = config.get("num_local_experts", 0)
    shapes |= {f"{layer}self_attn.{part}_proj.weight": (n, D) for part, n in {"q": D, "k": kv, "v": kv, "o": D}.items()}
    shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    moe = f"{layer}block_sparse_moe."
    ffns = {f"{moe}experts.{e}.w{{}}": (1, 3, 2) for e in range(n_experts)} or {
        f"{layer}mlp.{{}}_proj": ("gate", "up", "down")
    }
    for name, (gate, up, down) in ffns.items():
        shapes |= {f"{name.format(part)}.weight": (FF, D) for part in (gate, up)}
        shapes[f"{name.format(down)}.weight"] = (D, FF)
    if n_experts:
        shapes[f"{moe}gate.weight"] = (n_experts, D)
    return {name: rng.choice(np.array([-0.25, 0.25, 1.0], np.float16), shape) for name, shape in shapes.items()}


def safetensors(tensors: dict[str, np.ndarray[Any, Any]]) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def _joined(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if size is None else size) & (1 << 64) - 1) + header + data


# --- what is damaged --------------------------------------------------------------------------------------------------

_CONFIGS = (CONFIG, {**CONFIG, **_EXPERTS})
_WHOLE = tuple(safetensors(weights(config)) for config in _CONFIGS)
_HEADER, _DATA = _WHOLE[0]
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_TYPES = ("F16", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "dtype", "shape")
_NAMES = (
    *_SHARDS,
    "../model.safetensors",
    "/etc/passwd",
    "config.json",
    "model.safetensors",
    "weights/a.safetensors",
    ".",
    "",
)


@functools.cache
def _architectures() -> list[str]:
    return [name for arch in families().values() for name in arch.architectures]


def _config(rng: Random, usual: dict[str, Any] = CONFIG) -> Files:
    """A config.json of any family."""
    values = dict(usual)
    if rng.randrange(3):
        others = dict(rng.sample(sorted(_OTHERS.items()), rng.choice((1, 3, 12))))
        values |= {
            "architectures": [rng.choice(_architectures())],
            **others,
            "activation_function": "relu",
            "activation": "relu",
        }
    return {"config.json": mutate_json.damaged(rng, json.dumps(values).encode(), _WORDS)}


def _weights(rng: Random, whole: tuple[dict[str, Any], bytes] = _WHOLE[0]) -> Files:
    """A safetensors file with faults in its header, cut off, or of another length than it says."""
    described, data = whole
    header = mutate_json.damaged(rng, json.dumps(described).encode(), _TYPES)
    size = None if rng.randrange(6) else rng.choice((mutate.whole(rng), len(header) + rng.choice((-1, 1, 100))))
    return {"model.safetensors": _joined(header, data if rng.randrange(6) else data[: rng.randrange(len(data))], size)}


def _planned_weights(rng: Random) -> Files:
    """The same beside its own config.json."""
    i = rng.randrange(len(_CONFIGS))
    return {"config.json": json.dumps(_CONFIGS[i]).encode()} | _weights(rng, _WHOLE[i])


@functools.cache
def _shards() -> Files:
    tensors, half = weights(CONFIG), len(_HEADER) // 2
    names = list(tensors)
    files = {}
    for shard, part in zip(_SHARDS, (names[:half], names[half:]), strict=True):
        header, data = safetensors({name: tensors[name] for name in part})
        files[shard] = _joined(json.dumps(header).encode(), data)
    index = {"metadata": {"total_size": 1}, "weight_map": {n: _SHARDS[i >= half] for i, n in enumerate(names)}}
    return files | {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }


def _index(rng: Random) -> Files:
    name = "model.safetensors.index.json"
    return _shards() | {name: mutate_json.damaged(rng, _shards()[name], _NAMES)}


def _any_file(rng: Random) -> Files:
    """A whole checkpoint with one file damaged."""
    i = rng.randrange(len(_CONFIGS))
    described, data = _WHOLE[i]
    config = {"config.json": json.dumps(_CONFIGS[i]).encode()}
    files = small_files() | config | {"model.safetensors": _joined(json.dumps(described).encode(), data)}
    if rng.randrange(3) == 0:
        of_the_other = ("tokenizer.model", "added_tokens.json", "special_tokens_map.json")
        files = {name: data for name, data in files.items() if name not in of_the_other} | byte_level_files()
    name = rng.choice(sorted(files))
    if name == "config.json":
        return files | _config(rng, _CONFIGS[i])
    if name == "model.safetensors":
        return files | _weights(rng, _WHOLE[i])
    return files | {name: damaged_file(rng, name, files[name])}


# --- what is done with it ---------------------------------------------------------------------------------------------


def _planned(folder: Path) -> bool:
    make_plan(open_checkpoint(folder), Types())
    return True


def _described(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    describe(find_arch(config), config)
    return True


def _converted(folder: Path) -> bool:
    """A whole conversion; what it accepts has to run."""
    convert(folder, folder / "out/model.gguf", type="q8_0", calibration="none", threads=1)
    return runs(folder / "out/model.gguf")


def checkpoint_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """All of them."""
    return [
        seeded(rng_of, "config", _config, _described, 3),
        seeded(rng_of, "safetensors", _planned_weights, _planned, 2),
        seeded(rng_of, "index", _index, _planned, 0.5),
        seeded(rng_of, "convert", _any_file, _converted),
    ]
