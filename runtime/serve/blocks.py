"""An answer as its blocks, in order: texts, and calls of tools, as forms have them that know more than one text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from runtime.serve.tools import Call, CallReader, Part, Tools


@dataclass(frozen=True)
class Opened:
    """A block begins: a text, or a call."""

    index: int
    call: Call | None = None


@dataclass(frozen=True)
class Added:
    """More of a text."""

    index: int
    text: str


@dataclass(frozen=True)
class Closed:
    """A block has ended. block: all of it."""

    index: int
    block: Part


Change: TypeAlias = Opened | Added | Closed


class Blocks:
    """Blocks out of pieces of what a model writes; however it is cut, they are the same.

    found: all so far, the one that still grows among them.
    """

    def __init__(self, tools: Tools | None) -> None:
        self._reader = CallReader(tools)
        self._open = False  # whether the last block is a text that may go on
        self.found: list[Part] = []

    @property
    def calls(self) -> list[Call]:
        """The calls so far."""
        return self._reader.calls

    def push(self, text: str) -> list[Change]:
        """What another piece changes."""
        return [change for part in self._reader.push(text) for change in self._take(part)]

    def end(self) -> list[Change]:
        """What the end of the answer changes: there is at least one block then, if only an empty text."""
        changes = [change for part in self._reader.end() for change in self._take(part)]
        if not self.found:
            self.found, self._open = [""], True
            changes.append(Opened(0))
        return changes + self._close()

    def _take(self, part: Part) -> list[Change]:
        if isinstance(part, Call):
            changes = self._close()
            self.found.append(part)
            i = len(self.found) - 1
            return [*changes, Opened(i, part), Closed(i, part)]
        changes = []
        if not self._open:
            self._open = True
            self.found.append("")
            changes.append(Opened(len(self.found) - 1))
        i, so_far = len(self.found) - 1, self.found[-1]
        assert isinstance(so_far, str)
        self.found[i] = so_far + part
        return [*changes, Added(i, part)]

    def _close(self) -> list[Change]:
        if not self._open:
            return []
        self._open = False
        return [Closed(len(self.found) - 1, self.found[-1])]


def blocks_of(text: str, tools: Tools | None) -> Blocks:
    """The blocks of an answer that has ended."""
    blocks = Blocks(tools)
    blocks.push(text)
    blocks.end()
    return blocks
