"""Damage that knows no format: bytes, numbers, texts. All of it follows from the `Random` that is given."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from random import Random

WHOLE = (0, 1, 2, -1, 3, 7, 8, 31, 32, 33, 63, 64, 127, 128, 255, 256, 257, 299, 300, 301, 4095, 65535, 65536)
LARGE = (
    *(sign * (1 << bits) + off for bits in (24, 27, 31, 32, 48, 62, 63, 64) for sign in (1, -1) for off in (-1, 0, 1)),
)
REAL = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-38, 3.4e38, 1e308, float("inf"), float("-inf"), float("nan"), 1e9, 2.5)
TEXTS = (
    "", " ", "\0", "a", "\n", "\u2581", "</s>", "<s>", "<0x00>", "<0xZZ>", "../../x", "/etc/passwd", "%n%s", "{}", "{{ 1 }}",
    "\ufeff", "\u202e", "\x1b]0;x\x07", "\U0001f600", "none", "null", "true", "nan", "-1", "1e999", "a" * 300, "{" * 5000, "\u00e9" * 100,
)  # fmt: skip


def whole(rng: Random) -> int:
    """A whole number at some border, or any."""
    kind = rng.randrange(4)
    return rng.choice(WHOLE) if kind < 2 else rng.choice(LARGE) if kind == 2 else rng.randrange(-300, 70_000)


def real(rng: Random) -> float:
    """A number at some border, or any."""
    return rng.choice(REAL) if rng.randrange(3) else struct.unpack("<f", rng.randbytes(4))[0]


def text(rng: Random, words: Sequence[str] = ()) -> str:
    """A text that hurts, or one of `words`."""
    if words and rng.randrange(2):
        return rng.choice(words)
    if rng.randrange(4):
        return rng.choice(TEXTS)
    return "".join(
        chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), 0xE000 + rng.randrange(0x2000))))
        for _ in range(rng.randrange(12))
    )


def flip(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def overwrite(rng: Random, data: bytes) -> bytes:
    at, new = rng.randrange(len(data)), rng.randbytes(rng.choice((1, 1, 2, 4, 8, 16)))
    return data[:at] + new + data[at + len(new) :]


def number(rng: Random, data: bytes) -> bytes:
    """A number of 1 to 8 bytes in place of others."""
    width = rng.choice((1, 2, 4, 8))
    new = (whole(rng) & (1 << 8 * width) - 1).to_bytes(width, rng.choice(("little", "big")))
    at = rng.randrange(len(data))
    return data[:at] + new + data[at + width :]


def insert(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 4, 9, 64))) + data[at:]


def delete(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 2, 4, 8, 40, 400)) :]


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def splice(rng: Random, data: bytes) -> bytes:
    """A part of the data once more, somewhere else."""
    at, size, to = rng.randrange(len(data)), rng.choice((1, 4, 16, 100, 1000)), rng.randrange(len(data))
    return data[:to] + data[at : at + size] + data[to + rng.choice((0, size)) :]


_BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (
    flip,
    flip,
    overwrite,
    number,
    number,
    insert,
    delete,
    splice,
    cut,
)


def damaged(rng: Random, data: bytes, head: int = 0) -> bytes:
    """The data with one to four faults; three of four within the first `head` bytes, where that is not 0."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = head if head and rng.randrange(4) else len(data)
        part = data[:end]
        data = (rng.choice(_BYTES)(rng, part) if part else rng.randbytes(3)) + data[end:]
    return data
