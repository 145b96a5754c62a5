"""One sequence of tokens in an engine's cache, of which nothing is computed twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from runtime.compute.batch import Batch
from runtime.compute.counters import Counters
from runtime.engine import Engine


class CachedSequence:
    """A sequence that continues from the longest prefix whose keys and values are there. number: its own in the
    engine.
    """

    def __init__(self, engine: Engine, number: int = 0) -> None:
        self.engine, self.number = engine, number
        self._ids: list[int] = []  # whose keys and values are in the cache; changed on the worker

    def clear(self) -> None:
        """Forget it."""
        self.engine.exclusively(lambda: self._keep(0))

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of `ids` need not be computed again: the known prefix, without the last id, whose logits are
        wanted.
        """
        return self.engine.exclusively(lambda: self._reusable(ids))

    def logits(
        self, ids: Sequence[int], every: bool = False, counters: Counters | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits after the last of `ids`, float32 [1, n_vocab]; every: at each of them, [n, n_vocab], all computed
        anew.

        counters: what the FFNs did is added to them.
        """
        # What is known is asked where it is changed: another thread's batch, or one whose caller was interrupted,
        # may still be running.
        return self.engine.exclusively(lambda: self._logits(ids, every, counters))

    def _logits(self, ids: Sequence[int], every: bool, counters: Counters | None) -> npt.NDArray[np.float32]:
        start = 0 if every else self._reusable(ids)
        self._keep(start)
        new = ids[start:]
        batch = Batch.of(new, start, self.number, range(len(new)) if every else None)
        logits = self.engine.compute(batch, {self.number: counters} if counters else None)
        self._ids += new
        return logits

    def _keep(self, length: int) -> None:
        del self._ids[length:]
        self.engine.cells.trim(self.number, length)

    def _reusable(self, ids: Sequence[int]) -> int:
        known = list(ids[: min(len(self._ids), len(ids) - 1)])
        if self._ids[: len(known)] == known:
            return len(known)
        return next(n for n, (a, b) in enumerate(zip(self._ids, known, strict=False)) if a != b)
