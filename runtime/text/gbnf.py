"""llama.cpp's grammar notation (GBNF), read into rules over bytes.

    root ::= "yes" | number        # a comment
    number ::= [0-9]{1,3} ("." [0-9]+)?

Grammars come from clients. So nesting, repetition and size have bounds, and what is wrong is one UserError.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime.bindings.byte_grammar import END, OR, RULE, SET
from runtime.errors import UserError

_LONGEST = 1 << 20  # characters of a grammar
_DEEPEST = 64  # parentheses
_MOST_TIMES = 2000  # as in llama.cpp
_MOST_ELEMENTS = 200_000
_LAST = 0x10FFFF
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "/": "/"}
_CODES = {"x": 2, "u": 4, "U": 8}

Element = tuple[int, int]
Ranges = list[tuple[int, int]]


@dataclass
class Rules:
    """Rules over bytes. alternatives: those of each rule, the whole text's first; sets: of bytes."""

    alternatives: list[list[list[Element]] | None] = field(default_factory=lambda: [None])
    sets: dict[bytes, int] = field(default_factory=dict)
    size: int = 0

    def new(self, alternatives: list[list[Element]] | None = None) -> int:
        """Another rule."""
        self.alternatives.append(None)
        if alternatives is not None:
            self.define(len(self.alternatives) - 1, alternatives)
        return len(self.alternatives) - 1

    def define(self, rule: int, alternatives: list[list[Element]]) -> None:
        """Say what a rule is. Raises UserError where all of them become too large."""
        self.count(sum(len(one) + 1 for one in alternatives))
        self.alternatives[rule] = alternatives

    def count(self, elements: int) -> None:
        """Elements that are about to be made. Raises UserError for too many."""
        self.size += elements
        if self.size > _MOST_ELEMENTS:
            raise UserError(f"grammar: it needs more than {_MOST_ELEMENTS} elements", "use fewer repetitions")

    def bytes_of(self, text: str) -> list[Element]:
        """A literal."""
        return [(SET, self._set([(byte, byte)])) for byte in text.encode()]

    def characters(self, ranges: Ranges) -> list[Element]:
        """One character of these ranges."""
        sequences = [one for low, high in _merged(ranges) for one in _utf8(low, high)]
        ascii_ = [one[0] for one in sequences if len(one) == 1]
        longer = [[(SET, self._set([part])) for part in one] for one in sequences if len(one) > 1]
        first = [[(SET, self._set(ascii_))]] if ascii_ else []
        if len(first) + len(longer) == 1:
            return (first + longer)[0]
        if not first and not longer:
            return [(SET, self._set([]))]  # no character: nothing matches
        return [(RULE, self.new(first + longer))]

    def repeated(self, item: list[Element], least: int, most: int | None) -> list[Element]:
        """`item` from `least` to `most` times, None for any number."""
        self.count((most or least or 1) * 2)
        one: list[Element] = item if len(item) == 1 else [(RULE, self.new([item]))]
        if most is None:
            again = self.new()
            self.define(again, [[*one, (RULE, again)], []])
            return [*one * least, (RULE, again)]
        rest: list[Element] = []
        for _ in range(most - least):
            rest = [(RULE, self.new([[*one, *rest], []]))]
        return [*one * least, *rest]

    def arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """As the native library takes them: code, rules, sets."""
        code: list[Element] = []
        begins = []
        for alternatives in self.alternatives:
            begins.append(len(code))
            assert alternatives is not None
            for i, one in enumerate(alternatives):
                code.extend([(OR, 0)] * (i > 0))
                code.extend(one)
            code.append((END, 0))
        sets = np.frombuffer(b"".join(self.sets) or bytes(256), np.uint8).reshape(-1, 256)
        return np.array(code, np.int32), np.array(begins, np.int32), sets

    def _set(self, parts: list[tuple[int, int]]) -> int:
        members = bytearray(256)
        for low, high in parts:
            members[low : high + 1] = b"\1" * (high + 1 - low)
        return self.sets.setdefault(bytes(members), len(self.sets))


def parse(text: str) -> Rules:
    """The rules of a grammar whose whole text is `root`. Raises UserError with the place of a mistake."""
    if len(text) > _LONGEST:
        raise UserError(f"grammar: {len(text)} characters, expected at most {_LONGEST}")
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise UserError("grammar: half of a surrogate pair is no character")
    return _Parser(text).rules()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self._rules = Rules()
        self._names: dict[str, int] = {"root": 0}
        self._undefined: dict[int, int] = {0: 0}  # rule -> where it is named

    def rules(self) -> Rules:
        self._skip(lines=True)
        while self._at < len(self._text):
            self._rule()
        for rule, at in sorted(self._undefined.items()):
            name = next(name for name, number in self._names.items() if number == rule)
            raise self._wrong(f"no rule `{name[:40]}`", at)
        return self._rules

    def _rule(self) -> None:
        at = self._at
        rule = self._named()
        self._skip()
        if not self._take("::="):
            raise self._wrong("expected ::=")
        if rule not in self._undefined:
            raise self._wrong("a rule for the second time", at)
        del self._undefined[rule]
        self._skip(lines=True)
        self._rules.define(rule, self._alternatives(nested=False))
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._wrong("expected the end of the line")
        self._skip(lines=True)

    def _alternatives(self, nested: bool) -> list[list[Element]]:
        found = [self._sequence(nested)]
        while self._take("|"):
            self._skip(lines=True)
            found.append(self._sequence(nested))
        return found

    def _sequence(self, nested: bool) -> list[Element]:
        found: list[Element] = []
        while (item := self._item(nested)) is not None:
            self._skip(nested)
            while (times := self._times(nested)) is not None:
                item = self._rules.repeated(item, *times)
                self._skip(nested)
            self._rules.count(len(item))
            found += item
        return found

    def _item(self, nested: bool) -> list[Element] | None:
        if self._take('"'):
            return self._rules.bytes_of(self._literal())
        if self._take("["):
            return self._rules.characters(self._class())
        if self._take("."):
            return self._rules.characters([(0, _LAST)])
        if self._take("("):
            return self._group()
        if self._at < len(self._text) and self._text[self._at] in "<!":
            raise self._wrong("tokens by name are not supported, expected their texts")
        # A name that is followed by ::= begins the next rule; in parentheses that is a mistake, found there.
        if _NAME.match(self._text, self._at):
            return [(RULE, self._named())]
        return None

    def _group(self) -> list[Element]:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"more than {_DEEPEST} parentheses within each other")
        self._skip(lines=True)
        rule = self._rules.new(self._alternatives(nested=True))
        if not self._take(")"):
            raise self._wrong("expected )")
        self._depth -= 1
        return [(RULE, rule)]

    def _times(self, nested: bool) -> tuple[int, int | None] | None:
        for sign, times in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return times
        if not self._take("{"):
            return None
        found = re.compile(r"\s*(\d{1,9})\s*(,?)\s*(\d{1,9})?\s*\}").match(self._text, self._at)
        if not found:
            raise self._wrong("expected {2}, {2,} or {2,5}")
        least = int(found[1])
        most = int(found[3]) if found[3] else None if found[2] else least
        if max(least, most or 0) > _MOST_TIMES or (most is not None and most < least) or (found[3] and not found[2]):
            raise self._wrong(f"repetitions from 0 to {_MOST_TIMES} are expected")
        self._at = found.end()
        return least, most

    def _literal(self) -> str:
        found = []
        while not self._take('"'):
            found.append(self._character())
        return "".join(found)

    def _class(self) -> Ranges:
        inverse = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = high = ord(self._character())
            if self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                high = ord(self._character())
            if low > high:
                raise self._wrong("a range that ends before it begins")
            ranges.append((low, high))
        return inverted(ranges) if inverse else ranges

    def _character(self) -> str:
        if self._at >= len(self._text):
            raise self._wrong("the grammar ends within a text")
        sign = self._text[self._at]
        self._at += 1
        if sign != "\\":
            return sign
        escape = self._text[self._at : self._at + 1]
        self._at += 1
        if escape in _CODES:
            digits = self._text[self._at : self._at + _CODES[escape]]
            hexadecimal = re.fullmatch(rf"[0-9a-fA-F]{{{_CODES[escape]}}}", digits)
            if not hexadecimal or int(digits, 16) > _LAST or 0xD800 <= int(digits, 16) <= 0xDFFF:
                raise self._wrong("expected the hexadecimal digits of a character")
            self._at += len(digits)
            return chr(int(digits, 16))
        if escape not in _ESCAPES:
            raise self._wrong("unknown escape", self._at - 2)
        return _ESCAPES[escape]

    def _named(self) -> int:
        found = _NAME.match(self._text, self._at)
        if not found:
            raise self._wrong("expected a name")
        name = found[0]
        if name not in self._names:
            self._names[name] = self._rules.new()
            self._undefined[self._names[name]] = self._at
        self._at = found.end()
        return self._names[name]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _skip(self, lines: bool = False) -> None:
        found = (_SPACE_AND_LINES if lines else _SPACE).match(self._text, self._at)
        assert found
        self._at = found.end()

    def _wrong(self, what: str, at: int | None = None) -> UserError:
        place = self._at if at is None else at
        line = self._text.count("\n", 0, place) + 1
        column = place - (self._text.rfind("\n", 0, place) + 1) + 1
        return UserError(f"grammar, line {line}, column {column}: {what}")


def inverted(ranges: Ranges) -> Ranges:
    """All other characters."""
    found, low = [], 0
    for first, last in _merged(ranges):
        if low < first:
            found.append((low, first - 1))
        low = last + 1
    return [*found, (low, _LAST)] if low <= _LAST else found


def _merged(ranges: Ranges) -> Ranges:
    found: Ranges = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _utf8(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Sequences of byte ranges that spell the characters from low to high; surrogates are none."""
    for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xD800, 0xDFFF), (0xE000, 0xFFFF)):
        if low <= last < high:
            return _utf8(low, last) + _utf8(last + 1, high)
        if first == 0xD800 and first <= low <= high <= last:
            return []
    if high <= 0x7F:
        return [[(low, high)]]
    for i in range(1, 4):
        rest = (1 << (6 * i)) - 1
        if low & ~rest != high & ~rest:
            if low & rest:
                return _utf8(low, low | rest) + _utf8((low | rest) + 1, high)
            if high & rest != rest:
                return _utf8(low, (high & ~rest) - 1) + _utf8(high & ~rest, high)
    return [list(zip(chr(low).encode(), chr(high).encode(), strict=True))]
