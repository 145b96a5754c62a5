"""One sequence of tokens in an engine's cache, of which nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from runtime.base_engine import BaseEngine
from runtime.compute.batch import Batch
from runtime.compute.counters import Counters
from runtime.draft_length import DraftLength
from runtime.options import DRAFT_MAX, SettledOptions

_FEW = DRAFT_MAX + 1  # tokens at once, whose logits have the same bits as one by one


class CachedSequence:
    """A sequence that continues from the longest prefix whose keys and values are there. number: its own in the
    engine.
    """

    def __init__(self, engine: BaseEngine, number: int = 0) -> None:
        self.engine, self.number = engine, number
        self._ids: list[int] = []  # whose keys and values are in the cache; changed on the worker
        self.draft_length: DraftLength | None = None  # what was learned of drafts, for the next generation too

    def clear(self) -> None:
        """Forget it."""
        self.engine.exclusively(lambda: self._keep(0))

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be computed again: the known prefix, without the last id, whose logits are
        wanted.
        """
        return self.engine.exclusively(lambda: self._reusable(ids))

    def logits(self, ids: Sequence[int], last: int = 1, counters: Counters | None = None) -> npt.NDArray[np.float32]:
        """Logits after each of the last `last` of `ids`, which are computed anew: float32 [last, n_vocab].

        counters: what the FFNs did is added to them.
        """
        # What is known is asked where it is changed: another thread's batch, or one whose caller was interrupted,
        # may still be running.
        return self.engine.exclusively(lambda: self._logits(ids, last, counters))

    def _logits(self, ids: Sequence[int], last: int, counters: Counters | None) -> npt.NDArray[np.float32]:
        start = self._reusable(ids, last)
        self._keep(start)
        if last == 1 and len(ids) - start > 1 and not self.engine.cells.can_trim:
            start = self._boundary(ids, start, counters)
        new = ids[start:]
        batch = Batch.of(new, start, self.number, range(len(new) - last, len(new)))
        logits = self.engine.compute(batch, {self.number: counters} if counters else None)
        self._ids += new
        return logits

    def _boundary(self, ids: Sequence[int], start: int, counters: Counters | None) -> int:
        """Compute all but the last of `ids`, and make this a length that the sequence can be taken back to."""
        end = len(ids) - 1
        batch = Batch.of(ids[start:end], start, self.number, ())
        self.engine.compute(batch, {self.number: counters} if counters else None)
        self._ids += ids[start:end]
        self.engine.cells.save(self.number)
        return end

    def catch_up(self, ids: Sequence[int]) -> None:
        """Let all but the last of `ids` be known. What is missing is computed as few tokens at once, which give what
        they give one by one.

        That is so with Mamba blocks alone, after something else was computed between two batches of drafts.
        """
        self.engine.exclusively(lambda: self._catch_up(ids))

    def _catch_up(self, ids: Sequence[int]) -> None:
        start, end = self._reusable(ids), len(ids) - 1
        self._keep(start)
        for first in range(start, end, _FEW):
            new = ids[first : min(first + _FEW, end)]
            self.engine.compute(Batch.of(new, first, self.number, ()))
            self._ids += new

    def drafts(
        self,
        ids: Sequence[int],
        n: int,
        run: SettledOptions,
        choose: Callable[[npt.NDArray[np.float32]], int],
        counters: Counters,
    ) -> list[int]:
        """The next n tokens after `ids`, as another way of running the model would have them; nothing of them is kept.

        choose: a token, by logits float32 [n_vocab]. counters: as in `logits`.
        """
        return self.engine.exclusively(lambda: self._drafts(list(ids), n, run, choose, counters))

    def _drafts(
        self,
        ids: list[int],
        n: int,
        run: SettledOptions,
        choose: Callable[[npt.NDArray[np.float32]], int],
        counters: Counters,
    ) -> list[int]:
        known, end = self._reusable(ids), len(ids)
        self._keep(known)
        at = known
        with self.engine.cells.held(self.number):
            try:
                while len(ids) < end + n:
                    batch = Batch.of(ids[at:], at, self.number)
                    at = len(ids)
                    ids.append(choose(self.engine.compute(batch, {self.number: counters}, run)[0]))
            finally:
                self._keep(known)
        return ids[end:]

    def _keep(self, length: int) -> None:
        cells = self.engine.cells
        cells.trim(self.number, length)
        del self._ids[cells.length(self.number) :]

    def _reusable(self, ids: Sequence[int], last: int = 1) -> int:
        known = list(ids[: min(len(self._ids), len(ids) - last)])
        alike = len(known)
        if self._ids[:alike] != known:
            alike = next(n for n, (a, b) in enumerate(zip(self._ids, known, strict=False)) if a != b)
        return self.engine.cells.reachable(self.number, alike)
