"""How far scores lie above a predictor's typical error, and what fires there: histograms per neuron, from which every threshold can be judged.

A margin is a score turned into an estimate of the pre-activation and divided by that estimate's spread: above 0 the neuron is expected to fire.
Knows nothing of bytes or of how scores are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.calibrate import Activity, LayerSamples
from predictors.kind import Candidate
from predictors.quantized import Floats

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
    """What happens above each margin of EDGES, per neuron and token: float32 [n_ff, len(EDGES)]; the totals [n_ff] count every margin."""

    predicted: Floats  # share of tokens whose margin is above
    hits: Floats  # share of tokens at which it is above and the neuron fires
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
    n, parts = layer.structure.feed_forward_length, (layer.validation, layer.test)
    found = [(Scale.empty(n), Margins.empty(n), Margins.empty(n)) for _ in candidates]
    prepared = [[c.prepare(part.x) for part in parts] for c in candidates]
    for first, end in layer.chunks(max(len(part) for part in parts)):
        at = slice(first, end)
        for k, part in enumerate(parts):
            activity = layer.activity(part, first, end)
            goal = activity.gate - np.float32(layer.structure.activation_threshold)
            for c, x, (scale, *margins) in zip(candidates, prepared, found, strict=True):
                scores = c.scores(x[k], first, end)
                if k == 0:
                    _fill(scale, at, _scale(goal, scores, c.unit_slope))
                _fill(margins[k], at, _margins(scores, scale[at], activity))
    return found


def _fill(whole: Scale | Margins, at: slice, part: Scale | Margins) -> None:
    for name, values in vars(part).items():
        getattr(whole, name)[at] = values


def _scale(goal: Floats, scores: Floats, unit_slope: bool) -> Scale:
    """Least squares of pre-activations [n_tokens, n] on scores, per neuron."""
    mean, centre = scores.mean(0), goal.mean(0)
    if unit_slope:
        slope = np.ones_like(mean)
    else:
        centred = scores - mean
        slope = (centred * (goal - centre)).mean(0) / np.maximum((centred**2).mean(0), _TINY)
        # Scores that say nothing of a neuron, or the contrary, are worth nothing: all its margins become the same.
        slope = np.maximum(slope, 1e-6 * goal.std(0) + _TINY).astype(np.float32)
    intercept = centre - slope * mean
    spread = np.maximum((goal - slope * scores - intercept).std(0), 1e-6 * np.abs(centre) + _TINY)
    return Scale(slope, intercept, spread)


def _margins(scores: Floats, scale: Scale, activity: Activity) -> Margins:
    n_tokens, n = scores.shape
    z = (scores * scale.slope + scale.intercept) / scale.spread
    bins = np.clip((z - EDGES[0]) * (1 / STEP) + 1, 0, _BINS - 1).astype(np.int32)
    bins += np.arange(n, dtype=np.int32) * _BINS
    active, size = bins[activity.fired], n * _BINS

    def above(at: npt.NDArray[np.int32], weights: Floats | None = None) -> Floats:
        counts = np.bincount(at.ravel(), weights, size).reshape(n, _BINS) / n_tokens
        from_there: Floats = counts[:, ::-1].cumsum(1)[:, ::-1].astype(np.float32)
        return from_there

    predicted, hits, kept = above(bins), above(active), above(active, activity.energy[activity.fired])
    return Margins(predicted[:, 1:], hits[:, 1:], kept[:, 1:], hits[:, 0], kept[:, 0])
