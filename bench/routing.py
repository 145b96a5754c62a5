"""How often a router of a synthetic model chooses each expert, and the rows that make it so.

An expert's product is a normal variable of variance 1 around a mean of its own, and the means are normally spread: some
experts are chosen several times as often as others. Pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from bench.pool import Floats
from runtime.bindings.ffn_shape import Experts

SKEW = 0.5  # spread of the experts' means, in standard deviations of a product
_DRAWS = 1 << 14  # choices that frequencies are counted from
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Routing:
    """Per expert, the most wanted first, float64 [count]: the mean of its product, and the share of tokens that use
    it.
    """

    means: npt.NDArray[np.float64]
    frequencies: npt.NDArray[np.float64]


def plan_routing(experts: Experts) -> Routing:
    """Experts that are wanted unequally."""
    n, rng = experts.count, np.random.default_rng(0)
    means = np.array([SKEW * _NORMAL.inv_cdf(1 - (i + 0.5) / n) for i in range(n)])
    drawn = rng.standard_normal((_DRAWS, n)) + means
    chosen = np.argpartition(-drawn, experts.used - 1, 1)[:, : experts.used]
    return Routing(means, np.bincount(chosen.reshape(-1), minlength=n) / _DRAWS)


def router_rows(
    rng: np.random.Generator, means: npt.NDArray[np.float64], width: int, constant: int, seen: tuple[float, float]
) -> Floats:
    """A router's matrix, float32 [count, width], for what it sees: the value of the first coordinate, and the standard
    deviation of those from `constant` on.
    """
    first, deviation = seen
    rows = rng.standard_normal((len(means), width), np.float32)
    rows *= np.float32(1 / (math.sqrt(width - constant) * deviation))
    rows[:, :constant] = 0
    rows[:, 0] = means / first
    return rows
