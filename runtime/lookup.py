"""Drafts for nothing: how a text went on where its last tokens stood before."""

from __future__ import annotations

from collections.abc import Sequence

_GRAMS = (4, 3, 2)  # tokens in common, the most telling first


class Lookup:
    """An index of the short sequences of tokens in one text that only grows."""

    def __init__(self) -> None:
        self._known = 1  # tokens, each of whose sequences before it are in the index
        self._ends: dict[tuple[int, ...], int] = {}  # where each stood last, but for the text's very end

    def drafts(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to n tokens that followed where the last tokens of a text stood before; the latest such place counts."""
        self._grow(ids)
        for length in _GRAMS:
            end = self._ends.get(tuple(ids[-length:])) if len(ids) > length else None
            if end is not None:
                # Where it overlaps the text's end, what follows repeats.
                period = len(ids) - end
                return [ids[end + k % period] for k in range(n)]
        return []

    def _grow(self, ids: Sequence[int]) -> None:
        """Take in what is new: all sequences that something follows."""
        for end in range(self._known, len(ids)):
            for length in _GRAMS:
                if end >= length:
                    self._ends[tuple(ids[end - length : end])] = end
        self._known = max(self._known, len(ids))
