"""JSON files of a checkpoint, read with checked types."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.base.stand_ins import refuse_stand_in
from runtime.errors import UserError

T = TypeVar("T")
REQUIRED: Any = object()  # as a default: a missing value is an error
_CORRECT = "correct the file, or fetch it again from where it came from"
_LARGEST = 1 << 63  # of integers: none in a checkpoint comes near, and arithmetic with larger ones ends nowhere


@dataclass(frozen=True)
class Config:
    """The object in a JSON file (or one inside it); `where` names it in errors. A null counts as a missing value."""

    where: str
    values: Mapping[str, Any]

    def get(self, name: str, kind: type[T], default: Any = REQUIRED) -> T:
        """The value called `name`; an int is accepted where a float is expected.

        Floats are finite, ints fit into 64 bits.

        Raises UserError when it has another type, or is missing and there is no default.
        """
        value: Any = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise UserError(
                    f"{self.where}: no `{name}`",
                    "the file is incomplete: fetch it again from where the checkpoint came from",
                )
            return default  # type: ignore[no-any-return]
        fits = abs(value) < _LARGEST if type(value) is int else not isinstance(value, float) or math.isfinite(value)
        if kind is float and type(value) is int and fits:
            value = float(value)
        if type(value) is not kind or not fits:
            raise UserError(
                f"{self.where}: `{name}` is {shown(value)}, expected {_NAMES.get(kind, kind.__name__)}", _CORRECT
            )
        return value

    def positive(self, name: str, kind: type[T], default: Any = REQUIRED) -> T:
        """Like `get`, for a number that must be above zero."""
        value: Any = self.get(name, kind, default)
        if value <= 0:
            raise UserError(f"{self.where}: `{name}` is {value}, expected more than 0", _CORRECT)
        return value  # type: ignore[no-any-return]

    def list_of(self, name: str, kind: type[T], default: Any = REQUIRED) -> list[T]:
        """The list called `name`, each of whose values `get` would accept."""
        values = self.get(name, list, default)
        elements = Config(self.where, {f"{name}[{i}]": value for i, value in enumerate(values)})
        return [elements.get(key, kind) for key in elements.values]

    def inside(self, name: str) -> Config:
        """The object called `name`; an empty one when it is missing."""
        return Config(f"{self.where}: {name}", self.get(name, dict, {}))


_NAMES: dict[type, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def shown(value: Any) -> str:
    """A value of a JSON file, for an error."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # of another format than JSON; an integer of thousands of digits
        text = f"of type {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path) -> Config:
    """The object in the file `path`, in UTF-8 or UTF-16, with or without a byte order mark.

    Raises UserError when there is no such file, no JSON object in it, or one that has a key twice.
    """
    if not path.is_file():
        inner = [found.parent for at in ("*", "snapshots/*") for found in sorted(path.parent.glob(f"{at}/{path.name}"))]
        raise UserError(
            f"`{path.parent}`: no {path.name} in it",
            f"there is one in {', '.join(f'`{folder}`' for folder in inner[:3])}"
            if inner
            else "expected a folder with a Hugging Face checkpoint, or a Hub id such as user/repo",
        )
    refuse_stand_in(path)
    try:
        values = json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{path}`: not valid JSON ({error})", "fetch the file again: it may be cut off") from None
    if not isinstance(values, dict):
        raise UserError(f"`{path}`: {type(values).__name__}, expected a JSON object")
    return Config(f"`{path}`", values)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict.

    A key that is there twice is refused: readers of JSON do not agree which value counts.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} is there twice in one object")
    return values


def read_json_if_any(path: Path) -> Config:
    """Like `read_json`, but an empty object when there is no such file."""
    return read_json(path) if path.is_file() else Config(f"`{path}`", {})
