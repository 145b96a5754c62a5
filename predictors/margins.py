"""How far scores lie above a predictor's typical error, and what fires there: histograms per neuron, from which every
threshold can be judged.

A margin is a score turned into an estimate of the pre-activation and divided by that estimate's spread: above 0 the
neuron is expected to fire.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.calibrate import LayerSamples
from predictors.matrices import Floats
from predictors.predictor import Candidate

STEP = 1 / 8
EDGES: Floats = np.arange(-6, 6 + STEP, STEP, dtype=np.float32)  # the margins that a threshold can have
_BINS = len(EDGES) + 1
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Scale:
    """Turns scores into margins: (slope x score + intercept) / spread, each float32 [n_ff]."""

    slope: Floats
    intercept: Floats
    spread: Floats

    @property
    def error(self) -> Floats:
        """Spread in units of the score, float32 [n_ff]."""
        error: Floats = self.spread / self.slope
        return error

    def bias(self, thresholds: Floats) -> Floats:
        """What to add to scores so that they are above 0 where margins are above `thresholds` [n_ff]."""
        bias: Floats = ((self.intercept - thresholds * self.spread) / self.slope).astype(np.float32)
        return bias

    def __getitem__(self, at: slice) -> Scale:
        return Scale(self.slope[at], self.intercept[at], self.spread[at])

    @classmethod
    def empty(cls, n_ff: int) -> Scale:
        """To be filled."""
        return cls(*(np.empty(n_ff, np.float32) for _ in range(3)))


@dataclass(frozen=True)
class Margins:
    """What happens between each margin of EDGES and the next, per neuron and token: float32 [n_ff, len(EDGES)]; the
    totals [n_ff] count every margin.
    """

    predicted: Floats  # share of tokens whose margin is there
    hits: Floats  # share of tokens at which it is there and the neuron fires
    energy: Floats  # of those, per token
    fired: Floats  # share of tokens, whatever the margin
    total: Floats  # energy per token, whatever the margin

    @classmethod
    def empty(cls, n_ff: int) -> Margins:
        """To be filled."""
        shapes = [(n_ff, len(EDGES))] * 3 + [(n_ff,)] * 2
        return cls(*(np.empty(shape, np.float32) for shape in shapes))


def measure(layer: LayerSamples, candidates: list[Candidate]) -> list[tuple[Scale, Margins, Margins]]:
    """For each candidate its scale and margins on the validation part, and the margins on the test part."""
    n, parts = layer.ffn.n_ff, (layer.validation, layer.test)
    found = [(Scale.empty(n), Margins.empty(n), Margins.empty(n)) for _ in candidates]
    prepared = [[c.prepare(part.x) for part in parts] for c in candidates]
    for first, end in layer.chunks(max(len(part) for part in parts)):
        at = slice(first, end)
        for k, part in enumerate(parts):
            responses = layer.responses(part, first, end)
            active = np.flatnonzero(responses.fired)
            energy = responses.energy.ravel()[active]
            goal = responses.gate - np.float32(layer.ffn.threshold)
            for c, x, (scale, *margins) in zip(candidates, prepared, found, strict=True):
                scores = c.scores(x[k], first, end)
                if k == 0:
                    _fill(scale, at, scale_of(goal, scores, c.unit_slope))
                _fill(margins[k], at, _margins(scores, scale[at], active, energy))
    return found


def _fill(whole: Scale | Margins, at: slice, part: Scale | Margins) -> None:
    for name, values in vars(part).items():
        getattr(whole, name)[at] = values


def scale_of(goal: Floats, scores: Floats, unit_slope: bool) -> Scale:
    """Least squares of pre-activations [n_tokens, n] on scores, per neuron."""
    mean, centre = scores.mean(0), goal.mean(0)
    if unit_slope:
        slope, error = np.ones_like(mean), goal - scores
    else:
        centred = scores - mean
        slope = (centred * (goal - centre)).mean(0) / np.maximum((centred**2).mean(0), _TINY)
        # Scores that say nothing of a neuron, or the contrary, are worth nothing: all its margins become the same.
        slope = np.maximum(slope, 1e-6 * goal.std(0) + _TINY).astype(np.float32)
        error = goal - slope * scores
    intercept = centre - slope * mean
    error -= intercept
    spread = np.sqrt(np.einsum("ij,ij->j", error, error) / np.float32(len(error)))
    return Scale(slope, intercept, np.maximum(spread, 1e-6 * np.abs(centre) + _TINY))


def _margins(scores: Floats, scale: Scale, active: npt.NDArray[np.int64], energy: Floats) -> Margins:
    """Margins of scores [n_tokens, n].

    active: where a neuron fires, as positions in the flattened scores; energy: of each of those.
    """
    n_tokens, n = scores.shape
    z = scores * (scale.slope / scale.spread / STEP)
    z += (scale.intercept / scale.spread - EDGES[0]) / STEP + 1
    bins = np.clip(z, 0, _BINS - 1, out=z).astype(np.intp)
    bins += np.arange(n) * _BINS

    def histogram(at: npt.NDArray[np.intp], weights: Floats | None = None) -> tuple[Floats, Floats]:
        counts = np.bincount(at, weights, n * _BINS).reshape(n, _BINS) / n_tokens
        return counts[:, 1:].astype(np.float32), counts.sum(1).astype(np.float32)

    fired = bins.ravel()[active]
    (predicted, _), (hits, share), (kept, total) = histogram(bins.ravel()), histogram(fired), histogram(fired, energy)
    return Margins(predicted, hits, kept, share, total)
