"""Whole numbers between bounds, as the right side of a rule."""

from __future__ import annotations

import math
from collections.abc import Mapping

from runtime.errors import UserError

_DIGITS = 15  # without a bound


def integer_rule(bounds: Mapping[str, float]) -> str:
    """Decimal whole numbers between `minimum`, `maximum` and the exclusive ones. Raises UserError where none is."""
    largest = 10**_DIGITS
    low = max(math.ceil(bounds.get("minimum", -largest + 1)), math.floor(bounds.get("exclusiveMinimum", -largest)) + 1)
    high = min(math.floor(bounds.get("maximum", largest - 1)), math.ceil(bounds.get("exclusiveMaximum", largest)) - 1)
    if low > high:
        raise UserError("schema: no whole number is between its bounds")
    parts = []
    if low < 0:
        parts += [f'"-" {one}' for one in _between(max(1, -high), -low)]
    if high >= 0:
        parts += _between(max(0, low), high)
    return " | ".join(parts)


def _between(low: int, high: int) -> list[str]:
    """Numbers from low to high, none negative, by their lengths."""
    found = []
    while len(str(low)) < len(str(high)):
        end = 10 ** len(str(low)) - 1
        found += _same_length(str(low), str(end))
        low = end + 1
    return found + _same_length(str(low), str(high))


def _same_length(low: str, high: str) -> list[str]:
    if not low:
        return ['""']
    if set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}:
        return [f"[{low[0]}-{high[0]}]" + (f" [0-9]{{{len(low) - 1}}}" if low[1:] else "")]
    if low[0] == high[0]:
        return [f'"{low[0]}" ({" | ".join(_same_length(low[1:], high[1:]))})']
    found = [f'"{low[0]}" ({" | ".join(_same_length(low[1:], "9" * len(low[1:])))})']
    first, last = int(low[0]) + 1, int(high[0]) - 1
    if first <= last:
        found.append(f"[{first}-{last}] [0-9]{{{len(low) - 1}}}")
    return [*found, f'"{high[0]}" ({" | ".join(_same_length("0" * len(high[1:]), high[1:]))})']
