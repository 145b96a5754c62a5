"""Targets of the converter: damaged checkpoints, file by file, and files that torch saved.

One small checkpoint of each kind of tokenizer is made without torch; a family's config.json needs no weights to be read.
"""

from __future__ import annotations

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
from convert.metadata import general_metadata
from convert.plan import Types, make_plan
from convert.tokenizer import convert_tokenizer
from fuzz import mutate, mutate_json
from fuzz.bases import VOCAB, byte_alphabet, byte_level, sentencepiece
from fuzz.models import runs
from fuzz.worker import Files, Target

D, FF, HEADS = 32, 64, 2
_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu", "hidden_size": D, "intermediate_size": FF,
    "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float32", "head_dim": 16, "attention_bias": False,
}  # fmt: skip
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
}  # fmt: skip
_WORDS = tuple(dict.fromkeys([*LLAMA, *_OTHERS, "llama3", "yarn", "linear", "default", "dynamic", "longrope", "relu", "silu", "type", "rope_type", "factor", "low_freq_factor", "gptq", "awq"]))  # fmt: skip


def weights(config: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of a Llama of this config."""
    rng, kv = np.random.default_rng(0), config["num_key_value_heads"] * 16
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, D),
        "lm_head.weight": (VOCAB, D),
        "model.norm.weight": (D,),
    }
    layer = "model.layers.0."
    shapes |= {f"{layer}self_attn.{part}_proj.weight": (n, D) for part, n in {"q": D, "k": kv, "v": kv, "o": D}.items()}
    shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    shapes |= {
        f"{layer}mlp.gate_proj.weight": (FF, D),
        f"{layer}mlp.up_proj.weight": (FF, D),
        f"{layer}mlp.down_proj.weight": (D, FF),
    }
    return {name: rng.choice(np.array([-0.25, 0.25, 1.0], np.float16), shape) for name, shape in shapes.items()}


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _message(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def sentencepiece_model(n: int) -> bytes:
    """A `tokenizer.model` of `n` pieces, as sentencepiece_model.proto has it."""
    keys = sentencepiece(n)
    names = ("tokens", "scores", "token_type")
    rows = zip(*(keys[f"tokenizer.ggml.{name}"] for name in names), strict=True)
    pieces = [_message(1, t.encode()) + b"\x15" + struct.pack("<f", s) + b"\x18" + _varint(k) for t, s, k in rows]
    trainer = b"\x18\x02" + b"\x20" + _varint(n) + b"\x98\x02\x01"  # BPE, vocab_size, byte_fallback
    normalizer = _message(1, b"identity") + b"\x18\x01\x20\x00\x28\x01"
    return b"".join(_message(1, piece) for piece in pieces) + _message(2, trainer) + _message(3, normalizer)


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE as the `tokenizers` library saves it."""
    keys = byte_level(VOCAB)
    tokens = [t for t in keys["tokenizer.ggml.tokens"] if not t.startswith("[PAD")]
    end = len(tokens) - 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": end, "content": "<|endoftext|>", "special": True, **flags}, {"id": end + 1, "content": "<|user|>", "special": False, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {"<|endoftext|>": special}},
        "decoder": byte,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False, "vocab": {t: i for i, t in enumerate(tokens[:-1])}, "merges": keys["tokenizer.ggml.merges"]},
    }  # fmt: skip


TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "unk_token": "<unk>", "pad_token": None,
    "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "legacy": True, "clean_up_tokenization_spaces": False,
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}},
    "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
}  # fmt: skip
GENERATION: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": [2, 4],
    "pad_token_id": 0,
    "max_length": 64,
    "temperature": 0.6,
    "do_sample": True,
}
CARD = b"---\nlicense: mit\nlanguage:\n- en\n- no\nbase_model: user/repo\nlicense_link: LICENSE\n---\n# A model\n"


def small_files() -> Files:
    """What is beside the weights of the SentencePiece checkpoint."""
    dump = lambda value: json.dumps(value).encode()  # noqa: E731
    return {
        "config.json": dump(LLAMA),
        "generation_config.json": dump(GENERATION),
        "tokenizer.model": sentencepiece_model(VOCAB),
        "tokenizer_config.json": dump(TOKENIZER_CONFIG),
        "special_tokens_map.json": dump({"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}}),
        "added_tokens.json": dump({"<|user|>": sentencepiece(VOCAB)["tokenizer.ggml.tokens"].index("<|user|>")}),
        "README.md": CARD,
    }


def byte_level_files() -> Files:
    """The same of the byte-level one."""
    whole = tokenizer_json()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "add_prefix_space": False}
    return {"tokenizer.json": json.dumps(whole).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def vocab_and_merges() -> Files:
    """GPT-2's two files."""
    model = tokenizer_json()["model"]
    return {
        "vocab.json": json.dumps(model["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *model["merges"]]).encode(),
    }


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


# --- what is done with them -------------------------------------------------------------------------------------------


def _planned(folder: Path) -> bool:
    make_plan(open_checkpoint(folder), Types())
    return True


def _described(folder: Path) -> bool:
    config = read_json(folder / "config.json")
    describe(find_arch(config), config)
    return True


def _tokenizer(folder: Path) -> bool:
    convert_tokenizer(folder, VOCAB)
    return True


def _card(folder: Path) -> bool:
    general_metadata(folder, "", "f16")
    return True


def _converted(folder: Path) -> bool:
    """A whole conversion; what it accepts has to run."""
    convert(folder, folder / "out/model.gguf", type="q8_0", calibration="none", threads=1)
    return runs(folder / "out/model.gguf")


def checkpoint_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """All of them."""
    small, (header, data) = small_files(), safetensors(weights(LLAMA))
    whole = small | {"model.safetensors": _joined(json.dumps(header).encode(), data)}
    architectures = [name for arch in families().values() for name in arch.architectures]

    def config(rng: Random) -> bytes:
        values = dict(LLAMA)
        if rng.randrange(3):
            values |= {"architectures": [rng.choice(architectures)]} | dict(
                rng.sample(sorted(_OTHERS.items()), rng.choice((1, 3, 12)))
            )
            values["activation_function"] = values["activation"] = "relu"
        return mutate_json.damaged(rng, json.dumps(values).encode(), _WORDS)

    def header_of(rng: Random) -> bytes:
        damaged = mutate_json.damaged(
            rng, json.dumps(header).encode(), ("F16", "F32", "BF16", "F8_E4M3", "I64", "BOOL", "F4", "dtype", "shape")
        )
        size = None if rng.randrange(6) else rng.choice((mutate.whole(rng), len(damaged) + rng.choice((-1, 1, 100))))
        return _joined(damaged, data if rng.randrange(6) else data[: rng.randrange(len(data))], size)

    def index_files(rng: Random) -> Files:
        shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        names = list(header)[1:]
        half, tensors = len(names) // 2, weights(LLAMA)
        files = {
            s: _joined(json.dumps(h).encode(), d)
            for s, part in zip(shards, (names[:half], names[half:]), strict=True)
            for h, d in [safetensors({n: tensors[n] for n in part})]
        }
        index = {"metadata": {"total_size": 1}, "weight_map": {n: shards[i >= half] for i, n in enumerate(names)}}
        words = (
            *shards,
            "../model.safetensors",
            "/etc/passwd",
            "config.json",
            "model.safetensors",
            "weights/a.safetensors",
            ".",
            "",
        )
        return files | {
            "config.json": small["config.json"],
            "model.safetensors.index.json": mutate_json.damaged(rng, json.dumps(index).encode(), words),
        }

    def tokenizer_files(rng: Random) -> Files:
        """One or two files beside a tokenizer of any kind, damaged."""
        kind = rng.randrange(4)
        base = (
            {n: d for n, d in small.items() if n != "README.md"}
            if kind < 2
            else byte_level_files()
            if kind == 2
            else vocab_and_merges()
        )
        base = {"config.json": small["config.json"], "generation_config.json": small["generation_config.json"]} | base
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(sorted(base))
            base[name] = _damaged_file(rng, name, base[name])
        return base

    def all_files(rng: Random) -> Files:
        """A whole checkpoint with one file damaged."""
        files = dict(whole)
        if rng.randrange(3) == 0:
            files = {n: d for n, d in files.items() if n != "tokenizer.model"} | byte_level_files()
        name = rng.choice(sorted(files))
        files[name] = (
            config(rng)
            if name == "config.json"
            else header_of(rng)
            if name == "model.safetensors"
            else _damaged_file(rng, name, files[name])
        )
        return files

    def target(name: str, make: Callable[[Random], Files], use: Callable[[Path], bool], share: float = 1.0) -> Target:
        return Target(name, lambda index: make(rng_of(name, index)), use, share)

    plain = {"config.json": small["config.json"]}
    return [
        target("config", lambda rng: {"config.json": config(rng)}, _described, 3),
        target("safetensors", lambda rng: plain | {"model.safetensors": header_of(rng)}, _planned, 2),
        target("index", index_files, _planned, 0.5),
        target("tokenizer", tokenizer_files, _tokenizer, 2),
        target("card", lambda rng: {"README.md": _damaged_file(rng, "README.md", CARD)}, _card, 0.3),
        target("convert", all_files, _converted),
    ]


_TOKENIZER_WORDS = (
    "<s>", "</s>", "<unk>", "<|user|>", "<|endoftext|>", "content", "special", "Sequence", "NFC", "NFKC", "Prepend", "Replace", "ByteLevel", "Split", "Digits",
    "Punctuation", "BPE", "Unigram", "WordPiece", "Metaspace", "TemplateProcessing", "Regex", "String", "Isolated", "0", "1", "300", *byte_alphabet()[:8],
)  # fmt: skip


def _damaged_file(rng: Random, name: str, data: bytes) -> bytes:
    if name.endswith(".json"):
        return mutate_json.damaged(rng, data, _TOKENIZER_WORDS)
    if name == "README.md" and rng.randrange(2):
        new = rng.choice(
            (
                "&a [*a, *a]",
                "!!python/object/apply:os.system [ls]",
                "{a: &x [1], b: *x}",
                "no",
                "[" * 2000,
                "2001-01-01",
                "0x1f",
                "- " * 500 + "a",
                ".inf",
                "'\\0'",
                '"\\ud800"',
                "? a\n: b",
                "<<: {a: b}",
                "&a [[*a]]",
            )
        )
        lines = data.decode("utf-8", "replace").split("\n")
        at = rng.randrange(len(lines))
        return "\n".join(
            [
                *lines[:at],
                rng.choice((new, f"license: {new}", f"language: {new}", f"base_model: {new}")),
                *lines[at + rng.randrange(2) :],
            ]
        ).encode()
    return mutate.damaged(rng, data)
