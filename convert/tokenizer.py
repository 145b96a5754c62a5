"""A checkpoint's tokenizer as GGUF key-value pairs (`tokenizer.ggml.*`, `tokenizer.chat_template`).

Two kinds: SentencePiece BPE (`tokenizer.model`) and byte-level BPE (`tokenizer.json`, or `vocab.json` with
`merges.txt`). libllama does the tokenizing later, so whatever it would do differently is refused here.
Knows nothing of tensors or architectures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import bpe, spm
from convert.config import Config, read_json_if_any
from runtime.errors import UserError

# GGUF's names of the special tokens and their ids.
_SPECIAL_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",
    "pad": "padding_token_id",
}
_ADDED_SCORE = -1000.0  # of tokens that no merge may produce
_REFETCH = "fetch the tokenizer's files again from where the checkpoint came from"


@dataclass
class Vocabulary:
    """Tokens by id with their GGUF types and scores, plus what is particular to the tokenizer's kind."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    metadata: dict[str, Any]
    add_bos: bool


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before the rest of a text is split."""

    text: str
    special: bool


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer in `folder` as GGUF key-value pairs, for a model with `vocab_size` rows of embeddings.

    Missing ids become unused `[PAD<id>]` tokens. Raises UserError when there is no tokenizer, one of another kind, one
    that libllama would not reproduce, or one with more tokens than the model.
    """
    config = read_json_if_any(folder / "tokenizer_config.json")
    try:
        vocabulary = _read(folder, config, vocab_size)
        added = dict(_added_tokens(folder, config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"`{folder}`: the tokenizer's files are malformed ({type(error).__name__}: {error})", _REFETCH
        ) from None
    _check_ids(added, vocab_size, folder)
    _add_tokens(vocabulary, added)
    _extend(vocabulary, vocab_size - 1)
    return {
        **vocabulary.metadata,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        **_special_ids(folder, config, vocabulary.tokens),
        "tokenizer.ggml.add_bos_token": config.get("add_bos_token", bool, vocabulary.add_bos),
        "tokenizer.ggml.add_eos_token": config.get("add_eos_token", bool, False),
        **_chat_template(folder, config),
    }


def _read(folder: Path, config: Config, vocab_size: int) -> Vocabulary:
    if (folder / "tokenizer.model").exists():
        model = spm.read_sentencepiece(folder / "tokenizer.model")
        _check_sentencepiece(model, folder / "tokenizer.model")
        _check_ids(range(len(model.pieces)), vocab_size, folder)
        return _sentencepiece(model)
    byte_level = _read_byte_level(folder, config)
    _check_ids(byte_level.vocab.values(), vocab_size, folder)
    return _byte_level(byte_level)


def _read_byte_level(folder: Path, config: Config) -> bpe.ByteLevelBPE:
    if (folder / "tokenizer.json").exists():
        return bpe.read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return bpe.read_vocab_and_merges(folder, config)
    raise UserError(
        f"`{folder}`: no tokenizer in it", "expected tokenizer.model, tokenizer.json, or vocab.json with merges.txt"
    )


def _sentencepiece(model: spm.SentencePiece) -> Vocabulary:
    vocabulary = Vocabulary(
        tokens=[piece.text for piece in model.pieces],
        types=[piece.kind for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        metadata={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        },
        add_bos=True,  # the default of HF's Llama tokenizer, whose configs often leave it out
    )
    vocabulary.metadata["tokenizer.ggml.scores"] = vocabulary.scores  # byte-level BPE has merges instead
    return vocabulary


def _check_sentencepiece(model: spm.SentencePiece, path: Path) -> None:
    problems = {
        "a unigram model": model.algorithm == spm.UNIGRAM,
        "a word or character model": model.algorithm in (spm.WORD, spm.CHAR),
        "one that rewrites characters (normalization)": bool(model.charsmap),
        "one that removes extra spaces": model.remove_extra_whitespaces,
        "one that keeps spaces unescaped": not model.escape_whitespaces,
        "one without byte fallback": sum(piece.kind == spm.BYTE for piece in model.pieces) != 256,
    }
    found = [problem for problem, is_so in problems.items() if is_so]
    if found:
        raise UserError(
            f"`{path}`: the SentencePiece model is {' and '.join(found)}, "
            "expected a BPE model with byte fallback and no normalization"
        )


def _byte_level(model: bpe.ByteLevelBPE) -> Vocabulary:
    vocabulary = Vocabulary(
        tokens=[],
        types=[],
        scores=[],
        metadata={
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": model.pre,
            "tokenizer.ggml.merges": model.merges,
            "tokenizer.ggml.add_space_prefix": False,
        },
        add_bos=model.add_bos,
    )
    for text, token_id in sorted(model.vocab.items(), key=lambda item: item[1]):
        _extend(vocabulary, token_id)
        _set(vocabulary, token_id, text, spm.NORMAL, 0.0)
    return vocabulary


def _added_tokens(folder: Path, config: Config) -> Iterator[tuple[int, AddedToken]]:
    """Added tokens by id, from each of the places where Hugging Face keeps them; later ones are the more specific."""
    for text, token_id in read_json_if_any(folder / "added_tokens.json").values.items():
        yield int(token_id), AddedToken(text, special=False)
    for entry in read_json_if_any(folder / "tokenizer.json").get("added_tokens", list, []):
        yield int(entry["id"]), AddedToken(entry["content"], bool(entry.get("special")))
    for token_id, entry in config.get("added_tokens_decoder", dict, {}).items():
        yield int(token_id), AddedToken(entry["content"], bool(entry.get("special")))


def _check_ids(ids: Iterable[int], vocab_size: int, folder: Path) -> None:
    highest = max(ids, default=0)
    if highest >= vocab_size or min(ids, default=0) < 0:
        raise UserError(
            f"`{folder}`: the tokenizer has token id {highest}, expected ids below `vocab_size` {vocab_size}",
            "the tokenizer belongs to another checkpoint, or tokens were added to it without resizing the embeddings",
        )


def _add_tokens(vocabulary: Vocabulary, added: dict[int, AddedToken]) -> None:
    for token_id, token in sorted(added.items()):
        _extend(vocabulary, token_id)
        if vocabulary.tokens[token_id] == token.text and vocabulary.types[token_id] not in (spm.NORMAL, spm.UNUSED):
            continue  # the model file's own type is more exact, e.g. *unknown* for <unk>
        kind = spm.CONTROL if token.special else spm.USER_DEFINED
        _set(vocabulary, token_id, token.text, kind, _ADDED_SCORE)


def _extend(vocabulary: Vocabulary, token_id: int) -> None:
    """Make room up to and including `token_id`, with unused tokens in the gaps."""
    for missing in range(len(vocabulary.tokens), token_id + 1):
        vocabulary.tokens.append(f"[PAD{missing}]")
        vocabulary.types.append(spm.UNUSED)
        vocabulary.scores.append(_ADDED_SCORE)


def _set(vocabulary: Vocabulary, token_id: int, text: str, kind: int, score: float) -> None:
    vocabulary.tokens[token_id] = text
    vocabulary.types[token_id] = kind
    vocabulary.scores[token_id] = score


def _special_ids(folder: Path, config: Config, tokens: list[str]) -> dict[str, int]:
    """Ids of the special tokens: named by the tokenizer's own files, else by config.json."""
    names = {**read_json_if_any(folder / "special_tokens_map.json").values, **config.values}
    model = read_json_if_any(folder / "config.json").values
    ids: dict[str, int] = {}
    for short, key in _SPECIAL_KEYS.items():
        named = names.get(f"{short}_token")
        text = named.get("content") if isinstance(named, dict) else named
        fallback = model.get(f"{short}_token_id")
        if isinstance(text, str) and text in tokens:
            ids[f"tokenizer.ggml.{key}"] = tokens.index(text)
        elif type(fallback) is int and 0 <= fallback < len(tokens):
            ids[f"tokenizer.ggml.{key}"] = fallback
    return ids


def _chat_template(folder: Path, config: Config) -> dict[str, str]:
    jinja = folder / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.exists() else config.values.get("chat_template")
    if isinstance(template, list):  # several named ones
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return {"tokenizer.chat_template": template} if isinstance(template, str) and template else {}
