"""JSON files of a checkpoint, read with checked types.

Knows nothing of what the values mean: whoever asks says which type is expected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import UserError

T = TypeVar("T")
REQUIRED: Any = object()  # as a default: a missing value is an error


@dataclass(frozen=True)
class Config:
    """The object in a JSON file (or one inside it); `where` names it in errors. A null counts as a missing value."""

    where: str
    values: Mapping[str, Any]

    def get(self, name: str, kind: type[T], default: Any = REQUIRED) -> T:
        """The value called `name`; an int is accepted where a float is expected.

        Raises UserError when it has another type, or is missing and there is no default.
        """
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise UserError(
                    f"{self.where}: no `{name}`",
                    "the file is incomplete: fetch it again from where the checkpoint came from",
                )
            return default  # type: ignore[no-any-return]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise UserError(
                f"{self.where}: `{name}` is {json.dumps(value)[:80]}, expected {_NAMES.get(kind, kind.__name__)}"
            )
        return value

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


def read_json(path: Path) -> Config:
    """The object in the file `path`. Raises UserError when there is no such file, or no JSON object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"`{path.parent}`: no {path.name} in it",
            "expected a folder with a Hugging Face checkpoint, or a Hub id such as user/repo",
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"`{path}`: not valid JSON ({error})", "fetch the file again: it may be cut off") from None
    if not isinstance(values, dict):
        raise UserError(f"`{path}`: {type(values).__name__}, expected a JSON object")
    return Config(f"`{path}`", values)


def read_json_if_any(path: Path) -> Config:
    """Like `read_json`, but an empty object when there is no such file."""
    return read_json(path) if path.exists() else Config(f"`{path}`", {})
