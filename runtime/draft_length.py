"""How many tokens to draft, and how: by what batches were seen to cost, and how many drafts were accepted.

Nothing here can change a token, only how long it takes: numbers may be rough, and a disturbed measurement does no harm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

_SAMPLES = 7  # of a time, of which the median counts
_MEMORY = 0.97  # what a trial weighs after the next one
_PRIOR, _PRIOR_WEIGHT = 0.8, 3.0  # how often a draft is accepted, before any was seen
_SLOPE = 0.3  # what another token in a batch costs, of one alone, before that was seen
_LENGTHS = (1, 2, 3, 4, 6, 8, 11, 15)  # few, since each has a graph of its own
_RARELY = 16  # drafts, of which one is made otherwise than what seems best
_PAUSES = (16, 256)  # tokens without a draft, where drafts do not pay: at first, and at most


@dataclass
class Times:
    """Seconds of batches by their number of tokens."""

    seen: dict[int, deque[float]] = field(default_factory=dict)

    def add(self, n: int, seconds: float) -> None:
        """A batch of n tokens took so long."""
        self.seen.setdefault(n, deque(maxlen=_SAMPLES)).append(seconds)

    def of(self, n: int) -> float:
        """What a batch of n tokens takes: as seen, or by what was seen of others. One of one token must have been."""
        if n in self.seen:
            return median(self.seen[n])
        known = sorted(self.seen)
        below = max(k for k in known if k < n)
        above = min((k for k in known if k > n), default=0)
        base = median(self.seen[below])
        if above:
            slope = (median(self.seen[above]) - base) / (above - below)
        else:
            slope = (base - median(self.seen[1])) / (below - 1) if below > 1 else _SLOPE * base
        return base + max(slope, 0.0) * (n - below)


@dataclass
class Arm:
    """One way of drafting. seconds: of one drafted token; None before that was measured."""

    name: Hashable
    accepted: float = _PRIOR * _PRIOR_WEIGHT
    tried: float = _PRIOR_WEIGHT
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    @property
    def acceptance(self) -> float:
        """How often a draft is accepted whose predecessors were, 0 to 1."""
        return self.accepted / self.tried

    def judge(self, drafted: int, accepted: int) -> None:
        """So many were drafted, and so many of them, the first ones, accepted."""
        trials = accepted + (accepted < drafted)
        decay = _MEMORY**trials
        self.accepted = self.accepted * decay + accepted
        self.tried = self.tried * decay + trials


class DraftLength:
    """Chooses among `arms`, and lengths up to `longest`."""

    def __init__(self, arms: Iterable[Hashable], longest: int) -> None:
        self.arms = {name: Arm(name) for name in arms}
        self.batches = Times()
        self._lengths = [n for n in _LENGTHS if n < longest] + [longest]
        self._drafts = 0
        self._pause, self._left = _PAUSES[0], 0
        self._shapes: set[tuple[Hashable, int, int]] = set()

    def choose(self, at_most: int, usable: Sequence[Hashable]) -> tuple[Hashable, int]:
        """The arm, of the `usable` ones, and how many tokens to draft with it; none, where one token by itself is
        expected to be faster.
        """
        arms = [self.arms[name] for name in usable]
        # Never more than twice as many as were seen: what was not may cost anything.
        most = min(at_most, 2 * max(self.batches.seen, default=0) - 1)
        lengths = [n for n in self._lengths if n <= most]
        if 1 not in self.batches.seen or not arms or not lengths:
            return None, 0
        if self._left > 0:
            self._left -= 1
            return None, 0
        arm, n, gain = max(((arm, n, self.gain(arm, n)) for arm in arms for n in lengths), key=lambda found: found[2])
        self._drafts += 1
        if gain <= 1:
            # From time to time it is tried all the same: texts differ, and so does what a machine does besides.
            self._left, self._pause = self._pause, min(2 * self._pause, _PAUSES[1])
            return arm.name, min(n, 3)
        self._pause = _PAUSES[0]
        if self._drafts % _RARELY == 0:
            arm = arms[self._drafts // _RARELY % len(arms)]
            n = max(lengths, key=lambda k: self.gain(arm, k))
        return arm.name, n

    def is_new(self, kind: Hashable, n: int, n_cells: int) -> bool:
        """Whether n tokens at once, with so many cells, are computed for the first time: then a graph has to be built,
        and the time says nothing.
        """
        shape = kind, n, n_cells
        known = shape in self._shapes
        self._shapes.add(shape)
        return not known

    def gain(self, arm: Arm, n: int) -> float:
        """How many times as fast as one by one tokens come, if n are drafted."""
        a = min(arm.acceptance, 0.999)
        tokens = (1 - a ** (n + 1)) / (1 - a)
        seconds = n * self._drafting(arm) + self.batches.of(n + 1)
        return tokens * self.batches.of(1) / seconds

    def _drafting(self, arm: Arm) -> float:
        """Seconds of one drafted token; as others' where this arm has drafted none yet, then as half a token's."""
        if arm.seconds:
            return median(arm.seconds)
        others = [median(other.seconds) for other in self.arms.values() if other.seconds]
        return min(others, default=self.batches.of(1) / 2)
