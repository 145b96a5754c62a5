"""SentencePiece's `tokenizer.model`: the few fields of its protocol buffer that a GGUF vocabulary needs.

Read without the `protobuf` package: the wire format (https://protobuf.dev/programming-guides/encoding) takes less code
than a generated module, and piece types such as *user-defined* are visible only in the file. Field numbers are those of
sentencepiece_model.proto. Knows nothing of GGUF.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(
    1, 7
)  # ModelProto.SentencePiece.Type, the same numbers as in GGUF
UNIGRAM, BPE, WORD, CHAR = range(1, 5)  # TrainerSpec.ModelType

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePiece:
    """A tokenizer model: its pieces by id and how it treats text before looking for pieces."""

    pieces: tuple[Piece, ...]
    algorithm: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    charsmap: bytes


def read_sentencepiece(path: Path) -> SentencePiece:
    """Read a `tokenizer.model`. Raises UserError when the file is something else or damaged."""
    try:
        return _parse(path.read_bytes())
    except (ValueError, struct.error, IndexError):
        raise UserError(
            f"`{path}`: not a SentencePiece model, or cut off",
            "fetch the file again from where the checkpoint came from",
        ) from None


def _parse(data: bytes) -> SentencePiece:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == _PIECES:
            pieces.append(_piece(_expect_bytes(value)))
        elif number == _TRAINER:
            trainer = dict(_fields(_expect_bytes(value)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(_expect_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePiece(
        pieces=tuple(pieces),
        algorithm=int(trainer.get(3, UNIGRAM)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        charsmap=_expect_bytes(normalizer.get(2, b"")),
    )


def _piece(data: bytes) -> Piece:
    values = dict(_fields(data))
    (score,) = struct.unpack("<f", _expect_bytes(values.get(2, bytes(4))))
    return Piece(_expect_bytes(values.get(1, b"")).decode("utf-8"), score, int(values.get(3, NORMAL)))


def _expect_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("wrong wire type")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of every field of a message: varints as int, everything else as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if length < 0 or at + length > len(data):
            raise ValueError("damaged message")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("damaged number")
