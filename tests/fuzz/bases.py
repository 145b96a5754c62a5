"""Whole small files that are then damaged: models of every kind of structure, without a checkpoint, without torch, the same bytes every time.

Weights have few distinct values, so that a damaged file in the corpus packs small.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from convert.formats import NUMBERS, encode, fitting
from runtime.bindings.ffn_shape import GATINGS, ROUTER_TAPS
from runtime.model_file import structure
from runtime.model_file.shard_writer import split_model
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_names import EXPERT_FREQ, INDICES, NEURON_NOTES, PREDICTOR_BIASES, ROUTERS, SIGNS
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import NewTensor, write_files

VOCAB = 300
_FREQUENCIES = tuple(set(NEURON_NOTES) - {*INDICES, EXPERT_FREQ})
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

LLAMA = Structure(
    source_architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    context_length=64,
    embedding_length=32,
    block_count=1,
    feed_forward_length=64,
    head_count=2,
    head_count_kv=1,
    head_length=16,
    norm="rms",
    norm_epsilon=2.0**-17,
    position="rope_neox",
    ffn_gate="gated",
    ffn_activation="relu",
    rope_dimension_count=16,
    layout="sparse",
)
_HOT = {"neuron_order": "hot", "predictor_error": (0.5,)}
_OPT = replace(
    LLAMA,
    source_architecture="OPTForCausalLM",
    head_count_kv=2,
    norm="layer",
    position="learned",
    rope_dimension_count=0,
    ffn_gate="none",
    ffn_bias=True,
    attention_bias=True,
    attention_output_bias=True,
    tied_output=True,
    layout="both",
)

# Name -> structure, format of the matrices, kind of vocabulary.
MODELS: dict[str, tuple[Structure, str, str]] = {
    "lowrank": (replace(LLAMA, predictor="lowrank", predictor_rank=(16,), **_HOT), "f32", "spm"),
    "mlp": (
        replace(LLAMA, layout="both", predictor="mlp", predictor_tap="residual", predictor_rank=(32,), **_HOT),
        "q4_0",
        "bpe",
    ),
    "signbit": (replace(LLAMA, predictor="signbit", predictor_rank=(32,), **_HOT), "f16", "spm"),
    "two-blocks": (
        replace(
            LLAMA,
            block_count=2,
            layout="both",
            tied_output=True,
            predictor="lowrank",
            predictor_rank=(0, 8),
            neuron_order="hot",
            predictor_error=(0.0, 1.5),
        ),
        "q8_0",
        "spm",
    ),
    "opt": (_OPT, "f32", "bpe"),
    "opt-post": (
        replace(_OPT, norm_placement="post", output_norm=False, token_embedding_length=16, layout="sparse"),
        "f16",
        "bpe",
    ),
    "falcon": (
        replace(
            _OPT,
            position="rope_neox",
            rope_dimension_count=16,
            residual="parallel",
            ffn_bias=False,
            embedding_norm=True,
        ),
        "bf16",
        "bpe",
    ),
    "bitnet": (
        replace(
            LLAMA,
            ffn_activation="relu2",
            attention_sub_norm=True,
            ffn_sub_norm=True,
            qk_norm="after_rope",
            logit_softcap=30.0,
        ),
        "q4_0",
        "spm",
    ),
    "fatrelu": (
        replace(
            LLAMA,
            ffn_activation="fatrelu",
            activation_threshold=0.01,
            rope_freq_factors=True,
            embedding_scale=12.0,
            residual_scale=0.5,
            logit_scale=0.25,
            attention_bias=True,
            rope_scaling="linear",
            rope_scaling_factor=4.0,
        ),
        "f32",
        "spm",
    ),
    "k-quants": (
        replace(
            LLAMA,
            embedding_length=256,
            feed_forward_length=256,
            ffn_activation="drelu",
            layout="both",
            tied_output=True,
            vocab_size=270,
        ),
        "q4_k",
        "spm",
    ),
    "experts": (
        replace(
            LLAMA,
            feed_forward_length=32,
            expert_count=4,
            expert_used_count=2,
            expert_gating="sigmoid",
            expert_bias=True,
            expert_weights_norm=True,
            expert_weights_scale=2.5,
            router_tap="block",
            sliding_window=3,
            layout="both",
            predictor="lowrank",
            predictor_rank=(8,),
            **_HOT,
        ),
        "q8_0",
        "spm",
    ),
    "experts-in-one-block": (
        replace(
            LLAMA,
            block_count=2,
            feed_forward_length=(33, 64),
            expert_count=(3, 0),
            expert_used_count=(3, 0),
            expert_gating="softmax_weight",
            sliding_window=4,
            sliding_window_pattern=(False, True),
            ffn_activation="drelu",
            layout="both",
        ),
        "f16",
        "bpe",
    ),
    "odd": (
        replace(
            LLAMA,
            embedding_length=36,
            feed_forward_length=50,
            head_count=6,
            head_count_kv=3,
            head_length=6,
            rope_dimension_count=4,
            layout="both",
        ),
        "f16",
        "bpe",
    ),
}
SHARDED = "two-blocks"  # written as shards, too


def any_structure(rng: Random) -> tuple[Structure, str, str]:
    """A consistent model of odd sizes and any combination of properties, with its format and vocabulary."""
    pick = rng.choice
    d, n_blocks, heads_kv, head_length = (
        pick((2, 8, 18, 32, 33, 64, 96, 256)),
        pick((1, 1, 2, 3)),
        pick((1, 1, 2, 3)),
        pick((2, 3, 4, 16, 18, 33, 64, 80, 256)),
    )
    rope, predictor = pick(structure.POSITIONS), pick(structure.PREDICTOR_KINDS)
    gate, residual = pick(structure.GATES), pick(structure.RESIDUALS)
    values: dict[str, Any] = {
        "vocab_size": pick((280, 288, 300)), "context_length": pick((40, 300)), "embedding_length": d, "block_count": n_blocks,
        "feed_forward_length": pick((2, 7, 32, 33, 64, 65, 256)), "head_count": heads_kv * pick((1, 1, 2, 5)), "head_count_kv": heads_kv, "head_length": head_length,
        "norm": pick(structure.NORMS), "norm_epsilon": pick((1e-5, 1e-30, 0.5)), "position": rope, "ffn_gate": gate,
        "ffn_activation": pick([a for a in structure.ACTIVATIONS if gate == "gated" or a != "drelu"]), "residual": residual,
        "norm_placement": "pre" if residual == "parallel" else pick(structure.NORM_PLACEMENTS), "activation_threshold": pick((0.0, 0.1, 1e9)),
        "token_embedding_length": pick((0, 0, 0, 2, 32, d)), "embedding_scale": pick((1.0, 12.0)), "residual_scale": pick((1.0, 0.5)), "logit_scale": pick((1.0, 1e-3)),
        "logit_softcap": pick((0.0, 0.0, 30.0)), "qk_norm": pick(structure.QK_NORMS), "rope_scaling": pick(structure.ROPE_SCALINGS), "layout": pick(structure.LAYOUTS),
        "rope_dimension_count": 0 if rope == "learned" else 2 * rng.randrange(1, max(2, head_length // 2 + 1)), "rope_scaling_factor": pick((1.0, 4.0)),
        "neuron_order": pick(structure.NEURON_ORDERS), "predictor_tap": pick(structure.PREDICTOR_TAPS), "rope_freq_base": pick((10000.0, 1.0)),
    }  # fmt: skip
    flags = (
        "output_norm",
        "ffn_bias",
        "attention_bias",
        "attention_output_bias",
        "tied_output",
        "embedding_norm",
        "attention_sub_norm",
        "ffn_sub_norm",
        "rope_freq_factors",
    )
    values |= {name: pick((False, True)) for name in flags}
    if rope == "learned":
        values["rope_freq_factors"] = False
    if predictor != "none":
        ranks = (0, d) if predictor == "signbit" else (0, 2, 7, 32, 64)
        values |= {
            "predictor": predictor,
            "predictor_rank": tuple(pick(ranks) for _ in range(n_blocks)),
            "predictor_error": (0.5,) * n_blocks,
        }
    if rng.randrange(3) == 0:
        values |= _with_experts(rng, n_blocks)
    if rng.randrange(3) == 0:
        values["sliding_window"] = pick((1, 2, 5, 1000))
        values["sliding_window_pattern"] = pick(((), tuple(pick((False, True)) for _ in range(n_blocks))))
    return replace(LLAMA, **values), pick(("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")), pick(("spm", "bpe"))


def _with_experts(rng: Random, n_blocks: int) -> dict[str, Any]:
    """Fields of a mixture of experts, in some blocks or in all."""
    pick = rng.choice
    counts = (
        tuple(pick((0, 2, 3, 8)) for _ in range(n_blocks)) if rng.randrange(2) else (pick((2, 3, 8, 40)),) * n_blocks
    )
    return {
        "expert_count": counts,
        "expert_used_count": tuple(rng.randrange(1, count + 1) if count else 0 for count in counts),
        "expert_gating": pick(GATINGS),
        "expert_bias": pick((False, True)),
        "expert_weights_norm": pick((False, True)),
        "expert_weights_scale": pick((1.0, 1.0, 2.5, 1e-3)),
        "router_tap": pick(ROUTER_TAPS),
        "ffn_bias": False,
        "ffn_sub_norm": False,
    }


def model_bytes(folder: Path, s: Structure, kind: str, vocabulary: str) -> bytes:
    """The file of a structure."""
    path = folder / f"any-{os.getpid()}.gguf"
    write_files(split_model(path, metadata_of(s, kind, vocabulary), _streams(s, kind), 0))
    return path.read_bytes()


def write_models(folder: Path) -> dict[str, Path]:
    """Write every model of MODELS to `folder`, and one as shards; name -> its file, or the first shard."""
    paths = {}
    for name, (s, kind, vocabulary) in MODELS.items():
        keys, streams = metadata_of(s, kind, vocabulary), _streams(s, kind)
        write_files(split_model(folder / f"{name}.gguf", keys, streams, 0))
        paths[name] = folder / f"{name}.gguf"
    s, kind, vocabulary = MODELS[SHARDED]
    files = split_model(folder / "shards.gguf", metadata_of(s, kind, vocabulary), _streams(s, kind), 30_000)
    write_files(files)
    return paths | {"shards": files[0].path}


def metadata_of(s: Structure, kind: str, vocabulary: str) -> dict[str, Any]:
    """All keys of a model's file."""
    keys = {
        "general.architecture": "lazyneuron",
        "general.name": "fuzz",
        "general.quantization_version": 2,
        **s.to_metadata(),
    }
    if s.predictor != "none":
        shares = ("active_share", "predicted_share", "recall", "precision", "energy_kept")
        keys |= {f"lazyneuron.predictor.{name}": [0.5] * s.block_count for name in shares}
        keys |= {"lazyneuron.predictor.energy": 0.99, "lazyneuron.predictor.type": [kind] * s.block_count}
        keys |= {"lazyneuron.calibration.tokens": 100, "lazyneuron.calibration.corpus": "text"}
    return keys | (sentencepiece(s.vocab_size) if vocabulary == "spm" else byte_level(s.vocab_size))


def sentencepiece(n: int) -> dict[str, Any]:
    """Keys of a SentencePiece vocabulary of `n` tokens: three special ones, all bytes, then pieces."""
    pieces = ["\u2581", *"etaoinshr", "\u2581t", "he", "\u2581the", "in", "er", "\u2581a", "on", "\u2581in"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    filled = [*pieces, "<|user|>", *(f"[PAD{i}]" for i in range(n))][: n - len(tokens)]
    types += [
        _USER_DEFINED if text.startswith("<") else _UNUSED if text.startswith("[") else _NORMAL for text in filled
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.tokens": tokens + filled,
        "tokenizer.ggml.scores": [-float(i) for i in range(n)],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    }


def byte_alphabet() -> list[str]:
    """GPT-2's letter for each byte."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]


def byte_level(n: int) -> dict[str, Any]:
    """Keys of a byte-level BPE vocabulary of `n` tokens: all bytes, merges, one special token, fillers."""
    merges = ["h e", "t he", "i n", "e r", "\u0120 t", "\u0120t he", "o n", "\u0120 a"]
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    filled = [f"[PAD{i}]" for i in range(n - len(tokens))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": tokens + filled,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [*[_NORMAL] * (len(tokens) - 1), _CONTROL, *[_UNUSED] * len(filled)],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _streams(s: Structure, kind: str) -> list[NewTensor]:
    rng = np.random.default_rng(len(kind))
    return [_stream(name, shape, kind, rng) for name, shape in required_tensors(s).items()]


def _stream(name: str, shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> NewTensor:
    part = name.rpartition(".")[2]
    each = math.prod(shape[1:])  # experts, where the shape is one of neurons
    if part in INDICES:
        index = np.concatenate([rng.permutation(shape[0]) for _ in range(each)])
        return _made(name, shape, "i32", index.astype(np.int32).view(np.uint8))
    if part in _FREQUENCIES:
        falling = np.tile(np.linspace(0.75, 0.25, shape[0], dtype=np.float32), each)
        return _made(name, shape, "f32", falling.view(np.uint8))
    if part in SIGNS:
        return _made(name, shape, "i8", rng.choice(np.array([0, 255, 15], np.uint8), math.prod(shape)))
    plain = len(shape) == 1 or name == "position_embd.weight" or name.endswith((*ROUTERS, *PREDICTOR_BIASES))
    used = "f32" if plain else fitting(kind, shape[0])
    center = 1.0 if part == "weight" and ("norm" in name or name.startswith("rope_freqs")) else 0.0
    kinds = center + rng.choice(np.array([-0.25, 0.0, 0.25], np.float32), (8, shape[0]))  # eight different rows
    if part == EXPERT_FREQ:
        kinds = np.full((1, *shape), 0.5, np.float32)
    values = kinds[rng.integers(0, 8, each)] if len(shape) > 1 else kinds[0]
    return _made(name, shape, used, encode(values, used))


def _made(name: str, shape: tuple[int, ...], kind: str, data: Any) -> NewTensor:
    return NewTensor(name, shape, NUMBERS[kind], data.nbytes, [data])
