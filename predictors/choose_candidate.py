"""Which predictor a layer gets, and from which score on a neuron is computed: the least time to read its bytes for a
share of the output energy.

Lagrangian: at a price (what one would read for a unit of energy) every neuron has a best threshold, and every layer a
best candidate, independently of all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from predictors.margins import EDGES, Margins, Scale
from predictors.matrices import Floats
from predictors.predictor import Candidate

Doubles = npt.NDArray[np.float64]
Shares = TypeVar("Shares", float, npt.NDArray[np.float64])
PRICES: Doubles = np.geomspace(1e-6, 1e9, 361)  # in units of the layer's dense bytes per unit of relative energy
GAIN = 0.03  # a predictor has to save this share of the time that `exact` takes to read its bytes
SCATTERED = (
    1.5  # time to read a byte of rows picked one by one, in units of a byte of all rows in turn (docs/predictors.md)
)
_SHRINKAGE = 0.2
_NEVER = 1e6  # a margin that no score reaches


@dataclass(frozen=True)
class Cost:
    """Bytes of one neuron: gate: of the row that decides whether it fires; rest: of its up and down rows.

    n_ff: the neurons that a token may use, a share `reach` of all. fixed: bytes of the FFN's biases.
    """

    gate: float
    rest: float
    n_ff: int
    fixed: float = 0.0
    reach: float = 1.0

    def exact(self, fired: float) -> float:
        """Bytes per token in `exact` mode when a share `fired` of the neurons fires."""
        return self.fixed + self.n_ff * (self.gate + fired * self.rest)

    def exact_time(self, fired: float) -> float:
        """What `exact` takes, in bytes that could be read in turn meanwhile."""
        return self.fixed + self.n_ff * (self.gate + SCATTERED * fired * self.rest)

    @property
    def dense(self) -> float:
        """Bytes per token in `dense` mode."""
        return self.exact(1.0)


@dataclass(frozen=True)
class Curve:
    """What a rule of thresholds achieves at each of PRICES; shares of the neurons that a token may use, float64
    [len(PRICES)].

    energy: per token.
    """

    predicted: Doubles
    hits: Doubles
    energy: Doubles
    fired: float
    total: float


@dataclass(frozen=True)
class Rule:
    """Thresholds at every price.

    size: float64 [n_ff], a neuron's energy relative to the others', infinite where nothing is known of it; worth: what
    a token at an edge brings for its bytes, never falling.
    """

    size: Doubles
    worth: Doubles  # [len(EDGES)]

    def edges(self, price: int) -> npt.NDArray[np.int64]:
        """The edge from which each neuron is worth its bytes at PRICES[price], [n_ff]; len(EDGES): never."""
        edges: npt.NDArray[np.int64] = (self.prices() > price).sum(1)
        return edges

    def prices(self) -> npt.NDArray[np.int64]:
        """The price from which each neuron is worth its bytes at each edge, [n_ff, len(EDGES)]; len(PRICES): never."""
        logs = [np.log(np.maximum(x, 1e-30)) for x in (self.size, self.worth)]
        steps = (-np.log(PRICES[0]) - np.add.outer(*logs)) / np.log(PRICES[1] / PRICES[0])
        prices: npt.NDArray[np.int64] = np.ceil(np.clip(steps, 0, len(PRICES))).astype(np.int64)
        return prices


@dataclass(frozen=True)
class Judged:
    """A candidate with thresholds for every price, and what they achieve.

    time: on the validation part as in Cost.exact_time, [len(PRICES)].
    """

    candidate: Candidate
    scale: Scale
    rule: Rule
    validation: Curve
    test: Curve
    time: Doubles

    def bias(self, price: int) -> Floats:
        """`predictor_out.bias` at PRICES[price], float32 [n_ff]."""
        thresholds = np.append(EDGES, np.float32(_NEVER))[self.rule.edges(price)]
        return self.scale.bias(thresholds)


def judge(candidate: Candidate, measured: tuple[Scale, Margins, Margins], cost: Cost) -> Judged:
    """Thresholds for every price from the validation margins, and what they achieve there and on the test margins."""
    scale, validation, test = measured
    rule = thresholds(validation, cost, scale.known)
    prices = rule.prices()
    curves = [_curve(m, prices, cost) for m in (validation, test)]
    time = predicted_bytes(candidate, cost, SCATTERED * curves[0].predicted, SCATTERED * curves[0].hits)
    return Judged(candidate, scale, rule, curves[0], curves[1], time)


def sketch(candidate: Candidate, measured: tuple[Scale, Margins], cost: Cost, share: float) -> Doubles:
    """What a candidate takes and loses at each of PRICES, in bytes, by the margins of one of `share` neurons."""
    scale, validation = measured
    rule = thresholds(validation, cost, scale.known)
    curve = _curve(validation, rule.prices(), cost)
    time = predicted_bytes(candidate, cost, SCATTERED * curve.predicted, SCATTERED * curve.hits)
    lost: Doubles = PRICES * cost.dense * np.maximum(0.0, curve.total - curve.energy) * share
    return time + lost


def predicted_bytes(candidate: Candidate, cost: Cost, predicted: Shares, hits: Shares) -> Shares:
    """Bytes per token of an FFN and its predictor, by the shares of neurons that are candidates and that fire among
    them.
    """
    *shared, rows = candidate.tensors  # which may be some of the layer's
    own = sum(t.nbytes for t in shared) + rows.nbytes / rows.shape[-1] * cost.n_ff + 4 * cost.n_ff
    return own + cost.fixed + cost.n_ff * (cost.gate * predicted + cost.rest * hits)


def thresholds(m: Margins, cost: Cost, known: npt.NDArray[np.bool_]) -> Rule:
    """The best thresholds for given margins. known: bool [n_ff], of which neurons they say something.

    Energy at a margin is modelled as (the neuron's own size) x (a function of the margin, the same for the layer's
    neurons): few enough parameters for few tokens.
    """
    predicted, hits, energy = (a if known.all() else a[known] for a in (m.predicted, m.hits, m.energy))
    size = np.full(len(known), np.inf)
    size[known], shape = _factors(predicted, energy)
    nbytes = cost.gate + cost.rest * _ratio(hits.sum(0), predicted.sum(0))
    return Rule(size, np.maximum.accumulate(shape / (SCATTERED * nbytes)) * cost.dense)


def _ratio(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Doubles:
    ratio: Doubles = np.divide(a, b, out=np.zeros(a.shape), where=b > 0)
    return ratio


def _factors(count: Floats, energy: Floats) -> tuple[Doubles, Doubles]:
    """Energy per count as an outer product: sizes [n_ff], shrunk towards the layer's mean where a neuron was seen
    little, times a function of the edge.
    """
    size = np.ones(len(count))
    for _ in range(3):
        shape = _ratio(energy.sum(0, dtype=np.float64), size @ count)
        expected = count @ shape
        prior = _SHRINKAGE * expected.sum() / max(len(count), 1)
        size = (energy.sum(1) + prior) / (expected + prior)
    return size, shape


def _curve(m: Margins, prices: npt.NDArray[np.int64], cost: Cost) -> Curve:
    """What is achieved where each neuron is computed from these prices on, [n_ff, len(EDGES)]."""
    n, size = len(m.fired) * cost.reach, len(PRICES) + 1

    def so_far(found: Floats) -> Doubles:
        at_price = np.bincount(prices.ravel(), found.ravel(), size).astype(np.float64)
        return at_price.cumsum()[:-1]

    return Curve(
        so_far(m.predicted) / n,
        so_far(m.hits) / n,
        so_far(m.energy),
        float(m.fired.mean()) / cost.reach,
        float(m.total.sum()),
    )
