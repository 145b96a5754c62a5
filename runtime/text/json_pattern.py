"""Regular expressions of JSON schemas (`pattern`), in the notation of grammars: for texts within JSON strings.

The common part of ECMA's and Python's: characters, classes, groups, alternatives, repetition, and `^` and `$` at the
ends. What is not anchored may stand anywhere in the text, as JSON Schema says.
"""

from __future__ import annotations

import re

from runtime.errors import UserError
from runtime.text.gbnf import inverted

Ranges = list[tuple[int, int]]

_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [*_DIGITS, (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACES: Ranges = [(9, 13), (32, 32)]
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACES}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11}
_PLAIN = "^$\\.*+?()[]{}|/-"
_ANY: Ranges = inverted([(10, 10), (13, 13), (0x2028, 0x2029)])
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f"}
_DEEPEST = 32
_LONGEST = 4096


def pattern_rule(pattern: str, anything: str) -> str:
    """The right side of a rule for what is between the quotes of a JSON string of this pattern.

    anything: name of a rule for any text there. Raises UserError for what is not supported, or no expression.
    """
    if len(pattern) > _LONGEST:
        raise UserError(f"schema: a `pattern` of {len(pattern)} characters, expected at most {_LONGEST}")
    return _Pattern(pattern, anything).rule()


class _Pattern:
    def __init__(self, text: str, anything: str) -> None:
        self._text, self._at, self._depth, self._anything = text, 0, 0, anything

    def rule(self) -> str:
        found = self._alternatives()
        if self._at < len(self._text):
            raise self._wrong("an unexpected )")
        return found

    def _alternatives(self) -> str:
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        return " | ".join(found)

    def _sequence(self) -> str:
        """At the outermost level what is not anchored gets any text at its ends."""
        outermost, begins, ends = not self._depth, False, False
        parts: list[str] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            if ends:
                raise self._wrong("`$` within it")
            if self._take("^"):
                if not outermost or parts or begins:
                    raise self._wrong("`^` within it")
                begins = True
            elif self._take("$"):
                if not outermost:
                    raise self._wrong("`$` within it")
                ends = True
            else:
                parts.append(self._item() + self._times())
        if outermost:
            parts = [*([] if begins else [self._anything]), *parts, *([] if ends else [self._anything])]
        return " ".join(parts) if parts else '""'

    def _item(self) -> str:
        if self._take("("):
            return self._group()
        if self._take("["):
            return _one_of(self._class())
        if self._take("."):
            return _one_of(_ANY)
        if self._text[self._at] in "*+?{":
            raise self._wrong("nothing to repeat")
        return _one_of(self._character())

    def _group(self) -> str:
        if self._take("?") and not self._take(":"):
            raise self._wrong("a group that looks around, or has a name")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"more than {_DEEPEST} groups within each other")
        found = self._alternatives()
        if not self._take(")"):
            raise self._wrong("a ( without its )")
        self._depth -= 1
        return f"({found})"

    def _times(self) -> str:
        found = re.compile(r"[*+?]|\{\d{1,4}(?:,\d{0,4})?\}").match(self._text, self._at)
        if not found:
            if self._text.startswith("{", self._at):
                raise self._wrong("a repetition that is none")
            return ""
        self._at = found.end()
        self._take("?")  # as few as possible: the same texts
        if self._text[self._at : self._at + 1] in ("*", "+", "{"):
            raise self._wrong("a repetition of a repetition")
        return found[0]

    def _class(self) -> Ranges:
        inverse, ranges = self._take("^"), list[tuple[int, int]]()
        while not self._take("]"):
            low = self._character()
            after = self._text[self._at + 1 : self._at + 2]
            if self._text[self._at : self._at + 1] == "-" and after not in ("]", ""):
                self._at += 1
                high = self._character()
                if len(low) != 1 or low[0][0] != low[0][1] or len(high) != 1 or high[0][0] < low[0][0]:
                    raise self._wrong("a range that is none")
                ranges.append((low[0][0], high[0][1]))
            else:
                ranges += low
        return inverted(ranges) if inverse else ranges

    def _character(self) -> Ranges:
        if self._at >= len(self._text):
            raise self._wrong("it ends early")
        sign = self._text[self._at]
        self._at += 1
        if sign != "\\":
            return [(ord(sign), ord(sign))]
        kind = self._text[self._at : self._at + 1]
        self._at += 1
        if kind.lower() in _CLASSES:
            ranges = _CLASSES[kind.lower()]
            return ranges if kind.islower() else inverted(ranges)
        if kind in _CONTROLS:
            return [(_CONTROLS[kind],) * 2]
        digits = re.compile(r"[0-9a-fA-F]{4}" if kind == "u" else r"[0-9a-fA-F]{2}").match(self._text, self._at)
        if kind in ("u", "x") and digits:
            self._at = digits.end()
            return [(int(digits[0], 16),) * 2]
        if kind and (kind in _PLAIN or (not kind.isalnum() and kind.isascii())):
            return [(ord(kind),) * 2]
        raise self._wrong(f"`\\{kind}`")

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _wrong(self, what: str) -> UserError:
        return UserError(f"schema: the `pattern` {self._text[:60]!r} is not supported: {what}")


def _one_of(ranges: Ranges) -> str:
    """One character of these ranges, as JSON spells it in a string."""
    spelled = inverted([*inverted(ranges), (0, 31), (34, 34), (92, 92), (0xD800, 0xDFFF)])
    parts = ["[" + "".join(f"{_code(low)}-{_code(high)}" for low, high in spelled) + "]"] if spelled else []
    parts += [f'"\\\\{short[1]}"' if short[1] not in '"\\' else f'"\\\\\\{short[1]}"' for sign, short in _SHORT.items()
              if any(low <= ord(sign) <= high for low, high in ranges)]  # fmt: skip
    if not parts:
        raise UserError("schema: a `pattern` has a class without characters that a text may have")
    return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"


def _code(character: int) -> str:
    return f"\\U{character:08X}"
