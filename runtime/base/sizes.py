"""Amounts of memory and of disk as people write them: one parser for all options and arguments.

GiB, MiB and KiB are powers of 1024; GB, MB and KB, or G, M and K alone, are powers of 1000, as in gguf-split and on the
Hub. A number without a unit counts GiB where an option says so, and is refused everywhere else.
"""

from __future__ import annotations

import re
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from runtime.errors import UserError

_SIZE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kmgt])(i)?b?|(b))?\s*", re.IGNORECASE | re.ASCII)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_LONGEST = 40  # characters
_MOST_GIB = 1024  # without a unit: more than any device has, so that megabytes or bytes are meant
_MOST = 1 << 63
_UNITS = "G and M are 10^9 and 10^6 bytes, GiB and MiB are 2^30 and 2^20"


def parse_size(text: str, what: str) -> int:
    """Bytes of "45G", "500 MB", "1.5GiB" or "1000B"; what: the option, in errors. Raises UserError for anything
    else.
    """
    text = str(text)  # from Python it may be a number, which has no unit
    number, unit = _parsed(text, f"{what} `{_shown(text)}`, expected a size such as 45G or 500M")
    if not unit:
        plain = text.strip()
        raise UserError(f"{what} `{plain}` has no unit, expected {plain}G or {plain}M", _UNITS)
    return _whole(number * unit, text, what)


def parse_budgets(value: str | float | None) -> tuple[int, ...]:
    """Bytes of memory on each device: "6", 6 and "6GiB" are six GiB, "800MiB" is in MiB; with commas, several; () for
    None. Raises UserError.
    """
    what = "memory budget"
    expected = f"{what} `{_shown(value)}`, expected GiB, e.g. 6, or 800MiB; several devices: 6,4"
    if value is None:
        return ()
    if isinstance(value, Real) and not isinstance(value, bool):
        value = str(value) if isinstance(value, Integral) else f"{float(value):.9f}".rstrip("0")
    if not isinstance(value, str):
        raise UserError(expected, _UNITS)
    return tuple(_budget(part, what, expected) for part in value.split(","))


def parse_budget(value: str | float) -> int:
    """Bytes of one amount of memory: 6 and "6" are six GiB, "800MiB" is in MiB. Raises UserError."""
    found = parse_budgets(value)
    if len(found) != 1:
        raise UserError(f"memory budget `{_shown(value)}`, expected one amount, e.g. 6, or 800MiB", _UNITS)
    return found[0]


def _budget(text: str, what: str, expected: str) -> int:
    number, unit = _parsed(text, expected)
    plain = text.strip()
    if not unit and number >= _MOST_GIB:
        raise UserError(
            f"{what} `{plain}` is in GiB, expected less than {_MOST_GIB}", f"{plain}MiB is in MiB; {_UNITS}"
        )
    return _whole(number * (unit or 1 << 30), text, what)


def _parsed(text: str, expected: str) -> tuple[Decimal, int]:
    """A number and its unit in bytes, 0 where there is none."""
    found = _SIZE.fullmatch(text) if len(text) <= _LONGEST else None
    if not found:
        raise UserError(expected, _UNITS)
    number, letter, binary, single = found.groups()
    unit = (1024 if binary else 1000) ** _POWERS[letter.lower()] if letter else int(bool(single))
    return Decimal(number), unit


def _whole(size: Decimal, text: str, what: str) -> int:
    if size >= _MOST:
        raise UserError(f"{what} `{text.strip()}`, expected less than 8 EiB")
    return round(size)  # as the report writes a size, its last digit may fall short of the byte


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
