"""Tokens to pieces of text as they come: whole characters, cut where a stop text begins."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Pieces:
    """The text of tokens that come one by one.

    stops: texts that end it. text: all so far, cut before the first of them. stopped: the one that was met, or None.
    Neither depends on how the tokens divide the text: a stop text that begins earlier, and may still come, is waited
    for.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._stops, self._sure = tuple(stops), 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """What is sure to be shown, now that a token's bytes follow; "" where nothing is, yet."""
        return self._more(self._decoder.decode(data), final=False)

    def end(self) -> str:
        """What was held back, since no token follows."""
        return self._more(self._decoder.decode(b"", final=True), final=True)

    def _more(self, new: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        text, sure = self.text + new, self._sure
        end = len(text)
        first = min(((at, stop) for stop in self._stops if (at := text.find(stop, sure)) >= 0), default=None)
        begun = end if final else min((end - _overlap(text, stop) for stop in self._stops), default=end)
        if first and first[0] <= begun:
            end, self.stopped = first
            text = text[:end]
        else:
            end = min(first[0] if first else end, begun)
        self.text, self._sure = text, end
        return text[sure:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
