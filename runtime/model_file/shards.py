"""The files that a model is split into: their names, and whether they belong together (llama.cpp's `split.*` keys)."""

from __future__ import annotations

import re
from typing import Any

from runtime.errors import UserError
from runtime.model_file.container import GgufPart
from runtime.model_file.structure import ARCHITECTURE

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MODEL = f"{ARCHITECTURE}.split.model"  # tells shards of different models apart; llama.cpp's files have none
KEYS = (NUMBER, COUNT, TENSORS, MODEL)

_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_TOGETHER = "copy or download all shards into one folder again, each with its own name"


def shard_name(stem: str, number: int, count: int) -> str:
    """What llama.cpp calls shard `number` (from 0) of `count` of the model `stem`."""
    return f"{stem}-{number + 1:05}-of-{count:05}.gguf"


def parse_name(name: str) -> tuple[str, int, int] | None:
    """Stem, number (from 0) and count of a shard by its file name; None for any other file."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2]) - 1, int(found[3])) if found else None


def open_shards(first: GgufPart) -> list[GgufPart]:
    """All files of the model whose only or first file is `first`, in order.

    Raises UserError when one is missing, damaged, out of its place or of another model, and when `first` is not the
    first.
    """
    count, number = _integer(first, COUNT, 1), _integer(first, NUMBER, 0)
    named = parse_name(first.path.name)
    if number > 0:
        begin = shard_name(named[0], 0, count) if named else "the one that ends in -00001-of-..."
        raise UserError(f"`{first.path}`: shard {number + 1} of {count}", f"give the first one: {begin}")
    if count <= 1:
        return [first]
    if named is None or named[1:] != (0, count):
        wanted = shard_name("NAME", 0, count)
        raise UserError(f"`{first.path}`: the first of {count} shards, expected a name such as {wanted}", _TOGETHER)
    paths = [first.path.with_name(shard_name(named[0], i, count)) for i in range(count)]
    for i, path in enumerate(paths):
        if not path.is_file():
            raise UserError(
                f"`{first.path}`: shard {i + 1} of {count} is missing: no `{path.name}` beside it", _TOGETHER
            )
    parts = [first]
    for i, path in enumerate(paths[1:], 1):
        parts.append(GgufPart(path))
        _check_place(parts[-1], i, first.metadata)
    _check_tensors(parts)
    return parts


def _integer(part: GgufPart, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if not isinstance(value, int):
        raise UserError(f"`{part.path}`: `{key}` is {value!r}, expected a whole number", _TOGETHER)
    return value


def _check_place(part: GgufPart, number: int, first: dict[str, Any]) -> None:
    """That the keys of shard `number` say what its name says, and agree with the first one's."""
    keys, expected = part.metadata, f"shard {number + 1} of {first[COUNT]}"
    if NUMBER not in keys or COUNT not in keys:
        raise UserError(f"`{part.path}`: a model of its own, expected {expected}", _TOGETHER)
    found = f"shard {_integer(part, NUMBER, 0) + 1} of {_integer(part, COUNT, 1)}"
    if found != expected:
        raise UserError(f"`{part.path}`: holds {found}, expected {expected}", _TOGETHER)
    if any(str(keys.get(key)) != str(first.get(key)) for key in (TENSORS, MODEL)):
        raise UserError(f"`{part.path}`: a shard of another model", _TOGETHER)


def _check_tensors(parts: list[GgufPart]) -> None:
    """That no tensor is in two shards, and that all are there."""
    home: dict[str, GgufPart] = {}
    for part in parts:
        for name in part.tensors:
            if name in home:
                raise UserError(f"`{part.path}`: tensor `{name}` is also in `{home[name].path.name}`", _TOGETHER)
            home[name] = part
    expected = _integer(parts[0], TENSORS, len(home))
    if len(home) != expected:
        raise UserError(f"`{parts[0].path}`: {len(home)} tensors in all shards, expected {expected}", _TOGETHER)
