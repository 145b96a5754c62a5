"""A GGUF file taken apart into what it is made of, and put together again with whatever was changed; independent of the project's reader and writer.

Counts, lengths and offsets may be given that are wrong.
"""

from __future__ import annotations

import copy
import struct
from dataclasses import dataclass, field

from gguf import GGML_QUANT_SIZES

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BLOCKS = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}  # by format: elements and bytes of a block


@dataclass
class Entry:
    """A key. items: the value as bytes, one for a single value. count: of an array, where another is to be written."""

    key: bytes
    kind: int
    items: list[bytes]
    array: bool = False
    count: int | None = None


@dataclass
class Tensor:
    """A tensor. offset, n_dims: where others are to be written than follow from the data."""

    name: bytes
    ne: list[int]
    kind: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


@dataclass
class Parts:
    """A whole file."""

    magic: bytes
    version: int
    entries: list[Entry]
    tensors: list[Tensor]
    alignment: int = 64
    n_entries: int | None = None
    n_tensors: int | None = None
    tail: bytes = field(default=b"")

    def copy(self) -> Parts:
        """Another one, to be changed."""
        return copy.copy(self).__with(list(map(copy.copy, self.entries)), list(map(copy.copy, self.tensors)))

    def __with(self, entries: list[Entry], tensors: list[Tensor]) -> Parts:
        self.entries, self.tensors = entries, tensors
        return self


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def text(self) -> bytes:
        return self.take(self.number("<Q"))

    def item(self, kind: int) -> bytes:
        return self.text() if kind == STRING else self.take(struct.calcsize(SCALARS[kind]))


def parse(data: bytes) -> Parts:
    """Take a whole, undamaged file apart."""
    r = _Reader(data)
    magic, version, n_tensors, n_entries = r.take(4), r.number("<I"), r.number("<Q"), r.number("<Q")
    entries = []
    for _ in range(n_entries):
        key, kind = r.text(), r.number("<I")
        array = kind == ARRAY
        kind, n = (r.number("<I"), r.number("<Q")) if array else (kind, 1)
        entries.append(Entry(key, kind, [r.item(kind) for _ in range(n)], array))
    infos = []
    for _ in range(n_tensors):
        name = r.text()
        ne = [r.number("<Q") for _ in range(r.number("<I"))]
        infos.append((name, ne, r.number("<I"), r.number("<Q")))
    alignment = next((struct.unpack("<I", e.items[0])[0] for e in entries if e.key == b"general.alignment"), 32)
    start = r.at + -r.at % alignment
    tensors = [Tensor(name, ne, kind, data[start + at : start + at + _size(ne, kind)]) for name, ne, kind, at in infos]
    return Parts(magic, version, entries, tensors, alignment)


def _size(ne: list[int], kind: int) -> int:
    elements, nbytes = BLOCKS[kind]
    total = 1
    for n in ne:
        total *= n
    return total // elements * nbytes


def u64(value: int) -> bytes:
    """Eight bytes of any number."""
    return struct.pack("<Q", value & (1 << 64) - 1)


def text(raw: bytes) -> bytes:
    """A string as GGUF has it."""
    return struct.pack("<Q", len(raw)) + raw


def _value(e: Entry) -> bytes:
    body = b"".join(map(text, e.items)) if e.kind == STRING else b"".join(e.items)
    if not e.array:
        return struct.pack("<I", e.kind) + body
    return struct.pack("<II", ARRAY, e.kind) + u64(len(e.items) if e.count is None else e.count) + body


def header(p: Parts) -> bytes:
    """All before the tensors' data, without the padding."""
    n_tensors = len(p.tensors) if p.n_tensors is None else p.n_tensors
    n_entries = len(p.entries) if p.n_entries is None else p.n_entries
    out = [p.magic, struct.pack("<I", p.version & 0xFFFFFFFF), u64(n_tensors), u64(n_entries)]
    out += [text(e.key) + _value(e) for e in p.entries]
    offset = 0
    for t in p.tensors:
        n_dims = len(t.ne) if t.n_dims is None else t.n_dims
        out += [text(t.name), struct.pack("<I", n_dims & 0xFFFFFFFF), *map(u64, t.ne), struct.pack("<i", t.kind)]
        out.append(u64(offset if t.offset is None else t.offset))
        offset += len(t.data) + -len(t.data) % p.alignment
    return b"".join(out)


def build(p: Parts) -> bytes:
    """The file."""
    head = header(p)
    body = [t.data + bytes(-len(t.data) % p.alignment) for t in p.tensors]
    return head + bytes(-len(head) % p.alignment) + b"".join(body) + p.tail
