"""SentencePiece's `tokenizer.model`, read by the sentencepiece library: its pieces with scores and types, and its ids.

What the library does not tell (which pieces are user-defined, what it does to a text first) it shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from runtime.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"  # what stands for a space in pieces
_FATAL = 3  # the library's level of messages on stderr; what it refuses it raises as well
_PROBES = ("a", "a b", "ＡＢﬁ①", "e\u0301 é", "a  b", "a   b ", "a\tb\nc", "a\u00a0b\u3000c\u200bd")


@dataclass(frozen=True)
class StoredPiece:
    """One vocabulary entry."""

    text: str
    score: float
    kind: int


class SentencePiece:
    """A BPE model with byte fallback, as Llama's: `pieces` by id, and ids of texts.

    add_dummy_prefix: whether a text is read as if a space stood before it.
    Raises UserError for a file that is no SentencePiece model, or one of another kind.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self._model = _load(data, path)
        self.add_dummy_prefix = _normalized(self._model, "a").startswith(SPACE)
        problems = list(_problems(self._model, self.add_dummy_prefix))
        if problems:
            raise UserError(
                f"`{path}`: the SentencePiece model is {' and '.join(problems)}, "
                "expected a BPE model with byte fallback and no normalization"
            )
        self.pieces = tuple(_pieces(self._model))
        # Messages of protocol buffers are merged by putting one behind the other: only this field changes.
        changed = sentencepiece.SentencePieceNormalizer(
            model_proto=data, add_dummy_prefix=False, escape_whitespaces=True, remove_extra_whitespaces=False
        )
        self._without_prefix = _load(data + changed.serialized_model_proto(), path)

    def encode(self, text: str, prefix: bool) -> list[int]:
        """The ids of `text`, with a space before it or not; no token is added."""
        if not prefix:
            return list(self._without_prefix.encode(text))
        return list(self._model.encode(text) if self.add_dummy_prefix else self._without_prefix.encode(" " + text))


def _load(data: bytes, path: Path) -> Any:
    sentencepiece.set_min_log_level(_FATAL)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=data)
        if not data or not model.get_piece_size():
            raise ValueError("no pieces")
    except (RuntimeError, OSError, ValueError, UnicodeDecodeError):
        raise UserError(
            f"`{path}`: not a SentencePiece model, or cut off",
            "fetch the file again from where the checkpoint came from",
        ) from None
    return model


def _normalized(model: Any, text: str) -> str:
    return str(model.normalize(text))


def _problems(model: Any, prefix: bool) -> Iterator[str]:
    changed = [text for text in _PROBES if _normalized(model, text) != SPACE * prefix + text.replace(" ", SPACE)]
    if "a b" in changed:
        yield "one that keeps spaces unescaped"
    elif "a  b" in changed:
        yield "one that removes extra spaces"
    if any("  " not in text for text in changed if text != "a b"):
        yield "one that rewrites characters (normalization)"
    if not _is_bpe(model):
        yield "a unigram, word or character model"
    if sum(map(model.is_byte, range(model.get_piece_size()))) != 256:
        yield "one without byte fallback"


def _is_bpe(model: Any) -> bool:
    """Whether merges can be dropped (which word and character models do not know) and there are no other ways than one
    (as in unigram models).
    """
    try:
        model.sample_encode_as_ids("a", -1, 1.0)
    except RuntimeError:
        return False
    try:
        model.nbest_encode_as_ids("a", 2)
    except RuntimeError:
        return True
    return False


def _pieces(model: Any) -> Iterator[StoredPiece]:
    for i in range(model.get_piece_size()):
        yield StoredPiece(model.id_to_piece(i), model.get_score(i), _kind(model, i))


def _kind(model: Any, i: int) -> int:
    for kind, is_so in (
        (UNKNOWN, model.is_unknown),
        (CONTROL, model.is_control),
        (BYTE, model.is_byte),
        (UNUSED, model.is_unused),
    ):
        if is_so(i):
            return kind
    text = model.id_to_piece(i)
    # With every merge dropped, only user-defined pieces stay whole. A single character stays whole as well, and is
    # never cut.
    whole = len(text) > 1 and i in model.sample_encode_as_ids(text.replace(SPACE, " "), -1, 1.0)
    return USER_DEFINED if whole else NORMAL


def byte_token(byte: int) -> str:
    """What SentencePiece calls the token of a byte."""
    return f"<0x{byte:02X}>"
