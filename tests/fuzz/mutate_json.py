"""Damage to JSON that knows its structure: values of other types and at borders, keys lost, doubled and renamed, nesting without end."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from fuzz import mutate

# Texts that no value of Python's becomes.
_RAW = (
    "[" * 100_000, '{"a":' * 5_000, "1" * 5_000, "1e400", "-0", "NaN", "Infinity", '"\\ud800"', '"\\u0000"', "{}", "[]", "null", '""',
    "1.0", "0.1e-400", "[" * 50 + "]" * 50, "true", "12345678901234567890",
)  # fmt: skip
_MARK = "@raw@"


def value(rng: Random, words: Sequence[str] = ()) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8)
    if kind < 2:
        return mutate.whole(rng)
    if kind == 2:
        return mutate.real(rng)
    if kind == 3:
        return rng.choice((None, True, False))
    if kind < 6:
        return mutate.text(rng, words)
    size = rng.choice((0, 1, 2, 5))
    if kind == 6:
        return [value(rng, words) for _ in range(size)]
    return {mutate.text(rng, words): value(rng, words) for _ in range(size)}


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in list(items):
        yield tree, key
        yield from _places(child)


def _change(rng: Random, tree: Any, words: Sequence[str]) -> None:
    top = [(tree, key) for key in (tree if isinstance(tree, dict) else range(len(tree)))]
    places = top if rng.randrange(2) else list(_places(tree))
    if not places:
        return
    holder, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind < 4:
        holder[key] = value(rng, words)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        other, at = rng.choice(places)
        if at in other if isinstance(other, dict) else at < len(other):
            holder[key] = copy.deepcopy(other[at])
    elif kind == 6 and isinstance(holder, dict):
        holder[mutate.text(rng, [*words, *map(str, tree)])] = holder.pop(key)
    elif kind == 7:
        holder[key] = f"{_MARK}{rng.randrange(len(_RAW))}{_MARK}"
    elif kind == 8 and isinstance(holder, list):
        holder[key:key] = [value(rng, words) for _ in range(rng.choice((1, 2, 30)))]
    elif isinstance(holder[key], bool) or not isinstance(holder[key], int | float):
        holder[key] = [holder[key]] if rng.randrange(2) else str(holder[key])
    else:
        holder[key] = rng.choice(
            (holder[key] + 1, holder[key] - 1, float(holder[key]), -holder[key], str(holder[key]), 2 * holder[key])
        )


def damaged(rng: Random, data: bytes, words: Sequence[str] = ()) -> bytes:
    """A JSON document with one to three faults of structure, or with faults in its bytes."""
    kind = rng.randrange(10)
    if kind == 0:
        return mutate.damaged(rng, data)
    if kind == 1:
        return rng.choice(
            (
                b"\xef\xbb\xbf" + data,
                data.decode("utf-8", "replace").encode("utf-16"),
                data + data,
                data[::-1],
                rng.choice(_RAW).encode(),
            )
        )
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):  # damaged before
        return mutate.damaged(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if isinstance(tree, dict | list) and tree:
            _change(rng, tree, words)
    text = json.dumps(tree, ensure_ascii=bool(rng.randrange(2)))
    for i, raw in enumerate(_RAW):
        text = text.replace(f'"{_MARK}{i}{_MARK}"', raw)
    return text.encode("utf-8", "surrogatepass")
