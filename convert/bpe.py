"""Byte-level BPE tokenizers: `tokenizer.json` of the `tokenizers` library, or GPT-2's `vocab.json` with `merges.txt`.

libllama implements a fixed set of pre-tokenizers under names (`tokenizer.ggml.pre`); which of them a tokenizer is
follows from the structure in its file, never from the model's name. Knows nothing of GGUF beyond those names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.config import Config, read_json
from runtime.errors import UserError

_DIGITS = "<digits>"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + _DIGITS
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _SPLIT.replace(_DIGITS, r"\p{N}{1,3}"), _SPLIT.replace(_DIGITS, r"\p{N}")
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_JAIS2 = _LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + (
    r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One of libllama's pre-tokenizers: the steps of a tokenizer.json that it equals, and the options beside them."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    ignore_merges: bool = False
    normalizers: tuple[str | None, ...] = (None,)


_BYTE_LEVEL = ("ByteLevel", "regex")
_BYTES_ONLY = ("ByteLevel",)

PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_BYTE_LEVEL,)),
    PreTokenizer("llama-bpe", (("Split", _LLAMA3), _BYTES_ONLY), ignore_merges=True),
    # libllama composes nothing; text that is not in NFC already gets other tokens than in transformers.
    PreTokenizer("qwen2", (("Split", _QWEN2), _BYTES_ONLY), normalizers=(None, "NFC")),
    PreTokenizer("jais-2", (("Split", _JAIS2), _BYTES_ONLY)),
    PreTokenizer("smollm", (("Digits", "individual"), _BYTE_LEVEL)),
    PreTokenizer(
        "falcon", (("Punctuation", "Contiguous"), _BYTE_LEVEL, ("Digits", "runs"), ("Split", "[0-9][0-9][0-9]"))
    ),
)


@dataclass(frozen=True)
class ByteLevelBPE:
    """A vocabulary in GPT-2's byte alphabet (text -> id), its merges in order ("left right"), and libllama's name for
    its pre-tokenizer.
    """

    vocab: dict[str, int]
    merges: list[str]
    pre: str
    add_bos: bool


def read_tokenizer_json(path: Path) -> ByteLevelBPE:
    """Read a `tokenizer.json`. Raises UserError for anything but a byte-level BPE that libllama reproduces."""
    tokenizer = read_json(path)
    model = tokenizer.inside("model")
    _check_model(model, path)
    return ByteLevelBPE(
        vocab=model.get("vocab", dict),
        merges=[_merge(entry) for entry in model.get("merges", list)],
        pre=_pre_tokenizer(tokenizer, model.get("ignore_merges", bool, False)),
        add_bos=_starts_with_special(tokenizer),
    )


def read_vocab_and_merges(folder: Path, config: Config) -> ByteLevelBPE:
    """Read GPT-2's pair of files in `folder`; `config` is its tokenizer_config.json."""
    tokenizer_class = config.get("tokenizer_class", str, "GPT2Tokenizer").removesuffix("Fast")
    prefixed = config.get("add_prefix_space", bool, False)
    if tokenizer_class != "GPT2Tokenizer" or prefixed:
        raise UserError(
            f"{config.where}: vocab.json belongs to a `{tokenizer_class}`{' with add_prefix_space' * prefixed}, "
            "expected a plain `GPT2Tokenizer`",
            "save the tokenizer as tokenizer.json with transformers",
        )
    lines = (
        (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    )  # not splitlines: other separators may be part of a token
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    return ByteLevelBPE(vocab=dict(read_json(folder / "vocab.json").values), merges=merges, pre="gpt-2", add_bos=False)


def _check_model(model: Config, path: Path) -> None:
    kind = model.get("type", str, "BPE")
    if kind != "BPE":
        raise UserError(f"`{path}`: the tokenizer is a {kind} model, expected byte-level BPE")
    if model.get("byte_fallback", bool, False):
        raise UserError(
            f"`{path}`: the tokenizer is SentencePiece BPE with byte fallback, expected byte-level BPE",
            "put the original tokenizer.model beside it: that file has the scores",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key, str, ""):
            raise UserError(f"`{path}`: the tokenizer has a `{key}`, expected byte-level BPE without one")


def _merge(entry: Any) -> str:
    return entry if isinstance(entry, str) else " ".join(entry)


def _pre_tokenizer(tokenizer: Config, ignore_merges: bool) -> str:
    found = tokenizer.values.get("pre_tokenizer") or {}
    normalizer = (tokenizer.values.get("normalizer") or {}).get("type")
    try:
        steps = tuple(_step(step) for step in found.get("pretokenizers", [found]))
    except (KeyError, TypeError, AttributeError, ValueError):
        steps = ()
    for known in PRE_TOKENIZERS:
        if known.steps == steps and known.ignore_merges == ignore_merges and normalizer in known.normalizers:
            return known.name
    raise UserError(
        f"{tokenizer.where}: unknown pre-tokenizer {json.dumps(found)[:300]} (normalizer {normalizer}, "
        f"ignore_merges {ignore_merges}), expected one of {', '.join(p.name for p in PRE_TOKENIZERS)}",
        "a new one is a row in convert/bpe.py, if libllama implements it",
    )


def _step(step: dict[str, Any]) -> tuple[str, ...]:
    """A pre-tokenizer step in the notation of `PRE_TOKENIZERS`. Raises ValueError for options that no row has."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return _BYTE_LEVEL if step.get("use_regex", True) else _BYTES_ONLY
    if kind == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
        return (kind, step["pattern"]["Regex"])
    if kind == "Digits":
        return (kind, "individual" if step["individual_digits"] else "runs")
    if kind == "Punctuation":
        return (kind, step.get("behavior", "Isolated"))
    raise ValueError(kind)


def _starts_with_special(tokenizer: Config) -> bool:
    """Whether the post-processor puts a special token before a text."""
    post = tokenizer.values.get("post_processor") or {}
    for processor in post.get("processors", [post]):
        single = processor.get("single") or [{}]
        if processor.get("type") == "TemplateProcessing" and "SpecialToken" in single[0]:
            return True
    return False
