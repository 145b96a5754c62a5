"""Arguments of the Python interface: each function returns its value in plain Python form, or raises one UserError that
names the argument.

Numbers of numpy are numbers, and a single stop text or function stands for a list of it. Truth values are no numbers.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from runtime.errors import UserError

Function = TypeVar("Function", bound=Callable[..., Any])


def integer(name: str, value: Any, expected: str = "a whole number") -> int:
    """A whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise _wrong(name, value, expected)
    return int(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    found = integer(name, value, f"a whole number from {low} to {high}")
    if not low <= found <= high:
        raise _wrong(name, value, f"{low} to {high}")
    return found


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise _wrong(name, value, f"a number from {low:g} to {high:g}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not low <= found <= high:  # NaN is neither
        raise _wrong(name, value, f"{low:g} to {high:g}")
    return found


def boolean(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def limit(name: str, value: Any) -> int | None:
    """The most of something; None and -1: no limit."""
    found = None if value is None else whole(name, value, -1, (1 << 31) - 1)
    return None if found == -1 else found


def token_ids(name: str, values: Any, n_vocab: int, expected: str = "a list of token ids") -> list[int]:
    """Ids of a vocabulary of `n_vocab` tokens: a list, a tuple, an array of one dimension, or what else gives whole
    numbers in order.
    """
    found = None if isinstance(values, (str, Set)) else _listed(values)
    if found is None:
        raise _wrong(name, values, expected)
    return [_token_id(name, value, n_vocab) for value in found]


def _token_id(name: str, value: Any, n_vocab: int) -> int:
    try:
        token = operator.index(value)
    except TypeError:
        token = None
    if token is None or isinstance(value, bool):
        raise UserError(f"{name}: a token id is {shown(value)}, expected a whole number")
    if not 0 <= token < n_vocab:
        raise UserError(f"{name}: token id {shown(token)}, expected 0 to {n_vocab - 1}")
    return token


def texts(name: str, values: Any) -> tuple[str, ...]:
    """Texts of one character or more: several, one, or None for none."""
    if values is None:
        return ()
    if isinstance(values, str):
        values = (values,)
    found = _listed(values)
    if found is None:
        raise _wrong(name, values, "a text or a list of texts")
    for value in found:
        if not isinstance(value, str) or not value:
            raise UserError(f"{name}: {shown(value)} is among its texts, expected texts of one character or more")
    return tuple(map(str, found))


def integers(name: str, values: Any) -> int | tuple[int, ...] | None:
    """Whole numbers: one, several, or None for none."""
    if values is None or isinstance(values, Integral):
        return None if values is None else integer(name, values)
    found = None if isinstance(values, str) else _listed(values)
    if found is None:
        raise _wrong(name, values, "a whole number or a list of them")
    return tuple(integer(name, value) for value in found)


def path(name: str, value: Any, expected: str = "a path") -> Path:
    """A path, or a text that is one."""
    if not isinstance(value, str | Path):
        raise _wrong(name, value, expected)
    return Path(value)


def function(name: str, value: Function | None) -> Function | None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise _wrong(name, value, "a function")
    return value


def functions(name: str, values: Iterable[Function] | Function | None) -> tuple[Function, ...]:
    """Functions: several, one, or None for none."""
    if values is None:
        return ()
    if callable(values):
        return (values,)
    found = _listed(values)
    if found is None:
        raise _wrong(name, values, "a list of functions")
    for value in found:
        if not callable(value):
            raise UserError(f"{name}: {shown(value)} is among them, expected functions")
    return found


def _listed(values: Any) -> tuple[Any, ...] | None:
    """What comes one after the other; None where nothing does, or where it is no list of separate things."""
    if isinstance(values, bytes | bytearray | memoryview | Mapping):
        return None
    try:
        return tuple(values)
    except TypeError:
        return None


def _wrong(name: str, value: Any, expected: str) -> UserError:
    return UserError(f"{name} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """Some characters on one line, however long the value is."""
    try:
        plain = isinstance(value, Real) and not isinstance(value, int)
        return " ".join((str(value) if plain else reprlib.repr(value)).split())
    except ValueError:  # Python refuses to spell whole numbers of thousands of digits
        return "a number of thousands of digits"
