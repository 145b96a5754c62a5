"""Files of tokenizers and the small files beside them, whole and damaged; made without any tokenizer library."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from convert.metadata import general_metadata
from convert.tokenizer import vocabulary
from fuzz import mutate, mutate_json
from fuzz.bases import VOCAB, byte_alphabet, byte_level, sentencepiece
from fuzz.worker import Files, Target, seeded

# A Llama's config.json, with the end tokens that a tokenizer may have to take from it.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "relu", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": [2, 3], "torch_dtype": "float32", "head_dim": 16, "attention_bias": False,
}  # fmt: skip


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


@functools.cache
def _small_files() -> Files:
    dump = lambda value: json.dumps(value).encode()  # noqa: E731
    return {
        "config.json": dump(CONFIG),
        "generation_config.json": dump(GENERATION),
        "tokenizer.model": sentencepiece_model(VOCAB),
        "tokenizer_config.json": dump(TOKENIZER_CONFIG),
        "special_tokens_map.json": dump({"bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"}}),
        "added_tokens.json": dump({"<|user|>": sentencepiece(VOCAB)["tokenizer.ggml.tokens"].index("<|user|>")}),
        "README.md": CARD,
    }


def small_files() -> Files:
    """What is beside the weights of a SentencePiece checkpoint."""
    return dict(_small_files())


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


_WORDS = (
    "<s>", "</s>", "<unk>", "<|user|>", "<|endoftext|>", "content", "special", "Sequence", "NFC", "NFKC", "Prepend", "Replace", "ByteLevel", "Split", "Digits",
    "Punctuation", "BPE", "Unigram", "WordPiece", "Metaspace", "TemplateProcessing", "Regex", "String", "Isolated", "0", "1", "300", *byte_alphabet()[:8],
)  # fmt: skip
_YAML = (
    "&a [*a, *a]", "!!python/object/apply:os.system [ls]", "{a: &x [1], b: *x}", "no", "[" * 300, "2001-01-01", "0x1f", "- " * 500 + "a", ".inf", "'\\0'",
    '"\\ud800"', "? a\n: b", "<<: {a: b}", "&a [[*a]]",
)  # fmt: skip


def damaged_file(rng: Random, name: str, data: bytes) -> bytes:
    """One of these files with faults of its own format."""
    if name.endswith(".json"):
        return mutate_json.damaged(rng, data, _WORDS)
    if name != "README.md" or rng.randrange(2):
        return mutate.damaged(rng, data)
    lines, new = data.decode().split("\n"), rng.choice(_YAML)
    at = rng.randrange(len(lines))
    line = rng.choice((new, f"license: {new}", f"language: {new}", f"base_model: {new}"))
    return "\n".join([*lines[:at], line, *lines[at + rng.randrange(2) :]]).encode()


def _damaged_tokenizer(rng: Random) -> Files:
    """A tokenizer of any kind with one or two of its files damaged."""
    small, kind = small_files(), rng.randrange(4)
    kinds = (small, small, byte_level_files(), vocab_and_merges())
    files = {name: small[name] for name in ("config.json", "generation_config.json")} | kinds[kind]
    files.pop("README.md", None)
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(files))
        files[name] = damaged_file(rng, name, files[name])
    return files


def _tokenizer(folder: Path) -> bool:
    """The vocabulary is made. That its ids are the source's takes a second to see, and is looked at for one of twenty inputs."""
    looked_at = zlib.crc32(b"".join(path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file())) % 20 == 0
    with contextlib.nullcontext() if looked_at else mock.patch.object(vocabulary, "check_ids"):
        vocabulary.convert_tokenizer(folder, VOCAB)
    return True


def _card(folder: Path) -> bool:
    general_metadata(folder, "", "f16")
    return True


def tokenizer_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """Tokenizers, and the model card."""
    return [
        seeded(rng_of, "tokenizer", _damaged_tokenizer, _tokenizer, 2),
        seeded(rng_of, "card", lambda rng: {"README.md": damaged_file(rng, "README.md", CARD)}, _card, 0.3),
    ]
