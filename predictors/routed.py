"""Which experts some tokens chose, and which of these tokens an expert's neurons see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Routed:
    """The choices of n tokens. ids: the experts that each of them uses, int32 [n, used]; shares: what the experts'
    results are multiplied with, float32 [n, used]; count: how many experts there are.

    A place is a token's choice of one expert: number token x used + k.
    """

    ids: Ids
    shares: Floats
    count: int

    @cached_property
    def _sorted(self) -> tuple[Places, Places]:
        """All places, expert by expert and in the order of the tokens; where each expert's begin, [count + 1]."""
        flat = self.ids.reshape(-1)
        order = np.argsort(flat, kind="stable")
        first: Places = np.searchsorted(flat[order], np.arange(self.count + 1))
        return order, first

    def places(self, expert: int) -> Places:
        """Where the expert was chosen, in the order of the tokens."""
        order, first = self._sorted
        return order[int(first[expert]) : int(first[expert + 1])]

    def tokens(self, expert: int) -> Places:
        """The tokens that chose the expert."""
        tokens: Places = self.places(expert) // self.ids.shape[1]
        return tokens

    def weights(self, expert: int) -> Floats:
        """What the expert's result is multiplied with, for each of its tokens."""
        return self.shares.reshape(-1)[self.places(expert)]

    @property
    def chosen(self) -> Counts:
        """How many tokens chose each expert, int64 [count]."""
        chosen: Counts = np.diff(self._sorted[1]).astype(np.int64, copy=False)
        return chosen
