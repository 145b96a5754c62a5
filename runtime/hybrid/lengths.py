"""What a device can hold of the experts of one block: of each the same number of its hottest neurons, or more of the
experts that do most of the work.

Pure arithmetic on arrays. docs/hybrid.md says why two lengths, and how a device computes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_SIZES = 16  # numbers of experts with the longer prefix that are tried, at most, beside none and all
_LENGTHS = 13  # lengths of which two are chosen

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Longer:
    """Of these experts a device holds the neurons up to `end`, of the others fewer.

    share: of the experts that a token uses, how many are among these on average.
    """

    end: int
    experts: tuple[int, ...]
    share: float = 1.0


@dataclass(frozen=True)
class LongerCut:
    """A way to hold more neurons of some experts than of the others, in bytes. first: the prefix of the others, one of
    the block's cuts. hot: stored on the device. read: by the device for one token.

    cold: by the CPU, on average; spread: its standard deviation, since tokens use other experts.
    """

    first: int
    longer: Longer
    hot: int
    read: float
    cold: float
    spread: float = 0.0


def colder(read: Floats) -> Floats:
    """Bytes that the CPU reads of an expert without its first k neurons, for k from 0 to all: [experts, length + 1].

    read: bytes of each neuron for one token, on average, [experts, length].
    """
    after: Floats = np.zeros((read.shape[0], read.shape[1] + 1))
    after[:, :-1] = np.cumsum(read[:, ::-1], axis=1)[:, ::-1]
    return after


def longer_cuts(
    read: Floats, shares: Floats, cuts: Sequence[int], used: int, neuron: float, always: float = 0.0
) -> tuple[LongerCut, ...]:
    """Ways to hold a prefix of every expert and a longer one of some, of each size the ones that may be fastest.

    read: as in `colder`. shares: of tokens that use each expert, [experts]. cuts: lengths of prefixes, 0 first. used:
    experts of a token. neuron: bytes of one on the device. always: bytes that the CPU reads besides.
    The experts with the longer prefix are those whose neurons between both lengths save the CPU most.
    """
    count, rest = len(read), colder(read)
    sizes = range(step := -(-count // _SIZES), count, step)
    if not sizes:
        return ()
    found = []
    lengths = _few(cuts)
    for a, first in enumerate(lengths):
        for end in lengths[a + 1 :]:
            order = np.argsort(rest[:, end] - rest[:, first], kind="stable")
            cold, spread = _left(rest[order, first], rest[order, end], shares[order])
            for n in sizes:
                # Each token's product with the longer part is as wide as it can be for any token.
                device = neuron * (used * first + min(used, n) * (end - first))
                hot = round(neuron * (count * first + n * (end - first)))
                found.append((hot, device, float(cold[n]) + always, float(spread[n]), first, end, order[:n]))
    return tuple(
        LongerCut(first, _longer(end, experts, shares), hot, device, cold, spread)
        for hot, device, cold, spread, first, end, experts in _undominated(found)
    )


def expected_max(fixed: Floats, mean: Floats, spread: Floats) -> Floats:
    """What the larger of a number and a normally distributed one is on average, element by element."""
    wide = np.maximum(spread, 1e-300)
    z = np.clip((mean - fixed) / wide, -38, 38)
    above = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.tolist()])
    normal: Floats = fixed + (mean - fixed) * above + spread * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return np.where(spread > 0, normal, np.maximum(fixed, mean))


_Found = tuple[int, float, float, float, int, int, npt.NDArray[np.int64]]


def _left(shorter: Floats, longer: Floats, shares: Floats) -> tuple[Floats, Floats]:
    """Bytes that the CPU reads for one token, and their standard deviation, where the first n experts have the longer
    prefix, for each n from 0 on.

    shorter, longer: bytes of each expert with either, on average over all tokens.
    """
    cold = shorter.sum() + np.append(0.0, np.cumsum(longer - shorter))
    # Hajek's variance of a sum over so many experts, each drawn as often as it is used.
    weight = shares * np.maximum(0.0, 1 - shares)
    used = np.maximum(shares, 1e-12)

    def summed(power: int) -> Floats:
        a, b = (weight * (read / used) ** power for read in (shorter, longer))
        total: Floats = a.sum() + np.append(0.0, np.cumsum(b - a))
        return total

    variance = summed(2) - summed(1) ** 2 / (weight.sum() or 1.0)
    return cold, np.sqrt(np.maximum(0.0, variance))


def _few(cuts: Sequence[int]) -> list[int]:
    """The cuts, or some of them at equal distances, with none and all."""
    step = -(-len(cuts) // _LENGTHS)
    return sorted({*cuts[::step], cuts[-1]})


def _longer(end: int, experts: npt.NDArray[np.int64], shares: Floats) -> Longer:
    share = float(shares[experts].sum() / (shares.sum() or 1.0))
    return Longer(end, tuple(sorted(experts.tolist())), share)


def _undominated(found: Sequence[_Found]) -> Iterator[_Found]:
    """By size, those that no other of the same size equals in all that the device and the CPU read: whatever their
    speeds, the others are not faster.
    """
    least: dict[int, tuple[float, float]] = {}
    for one in sorted(found, key=lambda one: one[:4]):
        hot, _, cold, spread = one[:4]
        known = least.get(hot, (math.inf, math.inf))
        if cold < known[0] or spread < known[1]:
            least[hot] = min(cold, known[0]), min(spread, known[1])
            yield one
