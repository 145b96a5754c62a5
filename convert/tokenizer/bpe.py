"""Byte-level BPE tokenizers: `tokenizer.json` of the `tokenizers` library, or GPT-2's `vocab.json` with `merges.txt`.

libllama implements a fixed set of pre-tokenizers under names (`tokenizer.ggml.pre`); which of them a tokenizer is
follows from the structure in its file, never from the model's name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.config import Config, read_json
from runtime.errors import UserError

_GENERIC = ("", "PreTrainedTokenizer", "TokenizersBackend")  # classes that take a tokenizer.json as it is
_DIGITS = "<digits>"
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + _DIGITS
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _SPLIT.replace(_DIGITS, r"\p{N}{1,3}"), _SPLIT.replace(_DIGITS, r"\p{N}")
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
    # libllama has it under several names, such as `pixtral` for Nemotron-H and Nemotron 3: they are one.
    PreTokenizer("llama-bpe", (("Split", _LLAMA3), _BYTES_ONLY), ignore_merges=True),
    PreTokenizer("dbrx", (("Split", _LLAMA3), _BYTES_ONLY)),
    # libllama composes nothing: the runtime does, where the file says so.
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
    its pre-tokenizer. nfc: whether texts are composed first.
    """

    vocab: dict[str, int]
    merges: list[str]
    pre: str
    nfc: bool = False


def read_byte_level(tokenizer: Config) -> ByteLevelBPE:
    """Read a `tokenizer.json`. Raises UserError for anything but a byte-level BPE that libllama reproduces."""
    model = tokenizer.inside("model")
    _check_model(model)
    normalizer = _normalizer(tokenizer)
    return ByteLevelBPE(
        vocab=model.get("vocab", dict),
        merges=[_merge(entry) for entry in model.get("merges", list)],
        pre=_pre_tokenizer(tokenizer, model.get("ignore_merges", bool, False), normalizer),
        nfc=normalizer == "NFC",
    )


def vocab_and_merges(folder: Path, config: Config) -> Config:
    """GPT-2's pair of files in `folder` as a tokenizer.json; `config` is its tokenizer_config.json."""
    tokenizer_class = config.get("tokenizer_class", str, "GPT2Tokenizer").removesuffix("Fast")
    prefixed = config.get("add_prefix_space", bool, False)
    if tokenizer_class != "GPT2Tokenizer" or prefixed:
        raise UserError(
            f"{config.where}: vocab.json belongs to a `{tokenizer_class}`{' with add_prefix_space' * prefixed}, "
            "expected a plain `GPT2Tokenizer`",
            "save the tokenizer as tokenizer.json with transformers",
        )
    # Not splitlines: other separators may be part of a token.
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    vocab = read_json(folder / "vocab.json")
    model = {"type": "BPE", "vocab": dict(vocab.values), "merges": merges}
    return Config(
        vocab.where,
        {"model": model, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
    )


def check_prefix(config: Config) -> None:
    """Raise UserError where the class in a tokenizer_config.json puts a space before texts, whatever its tokenizer.json
    says.
    """
    name = config.get("tokenizer_class", str, "").removesuffix("Fast")
    if name not in _GENERIC and config.get("add_prefix_space", bool, False):
        raise UserError(
            f"{config.where}: `{name}` with add_prefix_space, expected byte-level BPE without one",
            "libllama puts no space before such texts",
        )


def _check_model(model: Config) -> None:
    kind = model.get("type", str, "BPE")
    if kind != "BPE":
        raise UserError(f"{model.where}: the tokenizer is a {kind} model, expected BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key, str, ""):
            raise UserError(f"{model.where}: the tokenizer has a `{key}`, expected byte-level BPE without one")


def _merge(entry: Any) -> str:
    return entry if isinstance(entry, str) else " ".join(entry)


def _normalizer(tokenizer: Config) -> str | None:
    """The type of the one step that there is, however it is wrapped; None for none."""
    steps = list(flat(tokenizer.values.get("normalizer")))
    return None if not steps else steps[0]["type"] if len(steps) == 1 else "Sequence"


def flat(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, taken out of the sequences that hold them."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["normalizers" if "normalizers" in step else "pretokenizers"]:
            yield from flat(inner)
    else:
        yield step


def _pre_tokenizer(tokenizer: Config, ignore_merges: bool, normalizer: str | None) -> str:
    found = tokenizer.values.get("pre_tokenizer")
    try:
        steps = tuple(map(_step, flat(found)))
    except (KeyError, TypeError, AttributeError, ValueError):
        steps = ()
    for known in PRE_TOKENIZERS:
        if known.steps == steps and known.ignore_merges == ignore_merges and normalizer in known.normalizers:
            return known.name
    raise UserError(
        f"{tokenizer.where}: unknown pre-tokenizer {json.dumps(found)[:300]} (normalizer {normalizer}, "
        f"ignore_merges {ignore_merges}), expected one of {', '.join(p.name for p in PRE_TOKENIZERS)}",
        "a new one is a row in convert/tokenizer/bpe.py, if libllama implements it",
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


def added_by(post_processor: dict[str, Any]) -> tuple[str | None, str | None]:
    """Names of the special tokens that a post-processor puts before a text, and behind it."""
    for processor in post_processor.get("processors", [post_processor]):
        if processor.get("type") == "TemplateProcessing" and processor.get("single"):
            first, last = processor["single"][0], processor["single"][-1]
            return (first.get("SpecialToken") or {}).get("id"), (last.get("SpecialToken") or {}).get("id")
    return None, None


def decoded(token: str) -> str:
    """The text of a token in GPT-2's alphabet; "" for one that is no whole characters."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token)).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return ""


def _alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _alphabet()
