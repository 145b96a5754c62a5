"""Multiple-choice knapsacks by dynamic programming: of each block one entry of its table of bytes and seconds.

Knows nothing of blocks but their tables. docs/hybrid.md explains what is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_UNITS = 65536  # all that could be on a device, in units of the dynamic programme: bounds its time and memory

Seconds = npt.NDArray[np.float64]
Sizes = npt.NDArray[np.int64]


class Solver:
    """The dynamic programme over the blocks' tables of bytes and seconds. room: the most bytes that it can be asked
    for.
    """

    def __init__(self, tables: Sequence[tuple[Sizes, Seconds]], room: int) -> None:
        self.room = room
        self._floors = [int(sizes.min()) for sizes, _ in tables]
        above = [sizes - floor for (sizes, _), floor in zip(tables, self._floors, strict=True)]
        self._unit = _unit(above)
        self.slack = sum(int((-sizes % self._unit).max()) for sizes in above)
        counted = [(-(-sizes // self._unit), seconds) for sizes, (_, seconds) in zip(above, tables, strict=True)]
        self.programme = _Programme(counted, max(0, room // self._unit))

    def units(self, first: int, room: int) -> int:
        """Units that `room` bytes leave to choose about, with blocks `first`.. resident; negative where they do not
        fit.
        """
        return (room - sum(self._floors[first:])) // self._unit


def _unit(sizes: Sequence[Sizes]) -> int:
    """Bytes of a unit: the same for every budget, so that more budget never means a worse choice.

    The greatest common divisor if that makes at most MAX_UNITS of everything, else a divisor of most blocks of neurons
    if one is small enough, else as small as possible.
    """
    least = max(1, -(-sum(int(s.max()) for s in sizes) // MAX_UNITS))
    divisor = math.gcd(*(int(size) for s in sizes for size in s)) or 1
    steps = math.gcd(*(int(abs(s[1] - s[0])) for s in sizes if len(s) > 1))
    if divisor >= least:
        return divisor
    fitting = (steps // n for n in range(steps // least, 0, -1) if steps % n == 0)
    unit = next(fitting, least)
    return unit if unit < 2 * least else least


class _Programme:
    """Dynamic programme over blocks, last first: least seconds of blocks i.. with at most u units of neurons, for every
    i and u.
    """

    def __init__(self, tables: Sequence[tuple[Any, Seconds]], n_units: int) -> None:
        self._tables = [_undominated(sizes, seconds) for sizes, seconds in tables]
        n_units = min(n_units, sum(int(max(size for size, _, _ in table)) for table in self._tables))
        best = np.zeros(n_units + 1)
        self._best, self._chosen = [best], []
        for table in reversed(self._tables):
            best, chosen = _extended(best, table)
            self._best.append(best)
            self._chosen.append(chosen)
        self._best.reverse()
        self._chosen.reverse()

    def seconds(self, first: int, room: int) -> float:
        """Of blocks `first`.. within `room` units."""
        best = self._best[first]
        return float(best[min(room, len(best) - 1)])

    def choices(self, first: int, room: int) -> list[int]:
        """Index of the chosen cut of each block from `first` on."""
        left = min(room, len(self._best[0]) - 1)
        found = []
        for table, chosen in zip(self._tables[first:], self._chosen[first:], strict=True):
            size, _, index = table[chosen[left]]
            found.append(index)
            left -= size
        return found


_Table = list[tuple[int, float, int]]


def _undominated(sizes: Sizes, seconds: Seconds) -> _Table:
    """(units, seconds, index of the cut), by size, without cuts that are neither smaller nor faster than another."""
    kept: _Table = []
    for i in np.lexsort((seconds, sizes)).tolist():
        if not kept or seconds[i] < kept[-1][1]:
            kept.append((int(sizes[i]), float(seconds[i]), i))
    return kept


def _extended(best: Seconds, table: _Table) -> tuple[Seconds, npt.NDArray[np.int32]]:
    """`best` with one more block, and the entry of its table that each number of units chooses."""
    extended = np.full(len(best), np.inf)
    chosen = np.zeros(len(best), np.int32)
    for entry, (size, seconds, _) in enumerate(table):
        if size >= len(best):
            break
        candidate = best[: len(best) - size] + seconds
        better = candidate < extended[size:]
        np.copyto(extended[size:], candidate, where=better)
        np.copyto(chosen[size:], entry, where=better)
    return extended, chosen
