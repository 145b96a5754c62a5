"""What a field of a request may hold: each check returns the value in plain form, or raises ApiError with the field's
name, and describes itself as a JSON schema.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtime.base.arguments import shown
from runtime.serve.errors import wrong

Schema = dict[str, Any]


class Check(Protocol):
    """A check of one value."""

    def __call__(self, name: str, value: Any) -> Any:
        """The value; name: of the field, for the error."""

    @property
    def schema(self) -> Schema:
        """What is accepted."""


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, name: str, value: Any) -> float:
        """The number."""
        expected = f"expected a number{_range(self.low, self.high)}"
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong(name, f"{shown(value)}, {expected}")
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not self.low <= found <= self.high:
            raise wrong(name, f"{shown(value)}, {expected}")
        return found

    @property
    def schema(self) -> Schema:
        """A number."""
        return {"type": "number", **_bounds(self.low, self.high)}


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; 3.0 is one, as some clients spell it."""

    low: float = -math.inf
    high: float = math.inf

    def __call__(self, name: str, value: Any) -> int:
        """The number."""
        expected = f"expected a whole number{_range(self.low, self.high)}"
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise wrong(name, f"{shown(value)}, {expected}")
        return value

    @property
    def schema(self) -> Schema:
        """An integer."""
        return {"type": "integer", **_bounds(self.low, self.high)}


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def __call__(self, name: str, value: Any) -> bool:
        """The truth value."""
        if not isinstance(value, bool):
            raise wrong(name, f"{shown(value)}, expected true or false")
        return value

    @property
    def schema(self) -> Schema:
        """A boolean."""
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """A text; among: only one of these."""

    among: tuple[str, ...] = ()

    def __call__(self, name: str, value: Any) -> str:
        """The text."""
        if not isinstance(value, str):
            raise wrong(name, f"{shown(value)}, expected a text")
        if self.among and value not in self.among:
            raise wrong(name, f"{shown(value)}, expected one of {', '.join(self.among)}")
        return value

    @property
    def schema(self) -> Schema:
        """A string."""
        return {"type": "string", **({"enum": list(self.among)} if self.among else {})}


@dataclass(frozen=True)
class Texts:
    """A text, or a list of at most `most`; empty ones are left out."""

    most: int = 64

    def __call__(self, name: str, value: Any) -> tuple[str, ...]:
        """The texts."""
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise wrong(name, f"{shown(value)}, expected a text or a list of texts")
        if len(found) > self.most:
            raise wrong(name, f"{len(found)} texts, expected at most {self.most}")
        return tuple(text for text in found if text)

    @property
    def schema(self) -> Schema:
        """A string or an array of them."""
        text = {"type": "string"}
        return {"oneOf": [text, {"type": "array", "items": text, "maxItems": self.most}]}


@dataclass(frozen=True)
class Keyed:
    """An object."""

    def __call__(self, name: str, value: Any) -> dict[str, Any]:
        """The object."""
        if not isinstance(value, dict):
            raise wrong(name, f"{shown(value)}, expected an object")
        return value

    @property
    def schema(self) -> Schema:
        """An object."""
        return {"type": "object"}


@dataclass(frozen=True)
class Listing:
    """A list of objects. items: what they are, as a JSON schema; least: how many there are to be. Both are only told:
    what objects hold is looked at later.
    """

    items: Schema = field(default_factory=lambda: {"type": "object"})
    least: int = 0

    def __call__(self, name: str, value: Any) -> list[dict[str, Any]]:
        """The list."""
        if not isinstance(value, list):
            raise wrong(name, f"{shown(value)}, expected a list of objects")
        for i, item in enumerate(value):
            if not isinstance(item, dict):
                raise wrong(f"{name}[{i}]", f"{shown(item)}, expected an object")
        return value

    @property
    def schema(self) -> Schema:
        """An array of objects."""
        return {"type": "array", "items": self.items, **({"minItems": self.least} if self.least else {})}


@dataclass(frozen=True)
class Ids:
    """A list of token ids; whether the vocabulary has them is seen later."""

    def __call__(self, name: str, value: Any) -> list[int]:
        """The ids."""
        if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
            raise wrong(name, f"{shown(value)}, expected a list of token ids")
        return value

    @property
    def schema(self) -> Schema:
        """An array of integers."""
        return {"type": "array", "items": {"type": "integer"}}


@dataclass(frozen=True)
class Anything:
    """A value that is looked at later. form: what it is to be, as a JSON schema."""

    form: Schema = field(default_factory=dict)

    def __call__(self, name: str, value: Any) -> Any:
        """The value."""
        return value

    @property
    def schema(self) -> Schema:
        """Its form."""
        return self.form


def _range(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" of {low:g} or more"
    return f" from {low:g} to {high:g}"


def _bounds(low: float, high: float) -> Schema:
    lowest = {} if math.isinf(low) else {"minimum": low}
    return lowest if math.isinf(high) else {**lowest, "maximum": high}
