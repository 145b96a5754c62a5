"""How far scores lie above a predictor's typical error, and what fires there: histograms per neuron, from which every threshold can be judged.

A margin is a score turned into an estimate of the pre-activation and divided by that estimate's spread: above 0 the neuron is expected to fire.
Knows nothing of bytes or of how scores are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.calibrate import LayerSamples
from predictors.kind import Candidate
from predictors.quantized import Floats

STEP = 1 / 8
EDGES: Floats = np.arange(-8, 8 + STEP, STEP, dtype=np.float32)  # the margins that a threshold can have
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


@dataclass(frozen=True)
class Margins:
    """What happens above each margin of EDGES, per neuron and token: float32 [n_ff, len(EDGES)]; the totals [n_ff] count every margin."""

    predicted: Floats  # share of tokens whose margin is above
    hits: Floats  # share of tokens at which it is above and the neuron fires
    energy: Floats  # of those, per token
    fired: Floats  # share of tokens, whatever the margin
    total: Floats  # energy per token, whatever the margin


def measure(layer: LayerSamples, candidates: list[Candidate]) -> list[tuple[Scale, Margins, Margins]]:
    """For each candidate its scale and margins on the validation part, and the margins on the test part."""
    parts = (layer.validation, layer.test)
    prepared = [[c.prepare(part.x) for part in parts] for c in candidates]
    pieces: list[list[tuple[Scale, Margins, Margins]]] = [[] for _ in candidates]
    for first, end in layer.chunks(max(len(part) for part in parts)):
        scales: list[Scale] = []
        margins: list[list[Margins]] = []
        for k, part in enumerate(parts):
            activity = layer.activity(part, first, end)
            scores = [c.scores(p[k], first, end) for c, p in zip(candidates, prepared, strict=True)]
            if k == 0:
                goal = activity.gate - np.float32(layer.structure.activation_threshold)
                scales = [_scale(goal, s, c.unit_slope) for c, s in zip(candidates, scores, strict=True)]
            margins.append(
                [_margins(s, scale, activity.fired, activity.energy) for s, scale in zip(scores, scales, strict=True)]
            )
        for i, piece in enumerate(zip(scales, *margins, strict=True)):
            pieces[i].append(piece)
    return [_joined(piece) for piece in pieces]


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


def _margins(scores: Floats, scale: Scale, fired: npt.NDArray[np.bool_], energy: Floats) -> Margins:
    n_tokens, n = scores.shape
    z = (scores * scale.slope + scale.intercept) / scale.spread
    bins = np.clip((z - EDGES[0]) * (1 / STEP) + 1, 0, _BINS - 1).astype(np.int32)
    bins += np.arange(n, dtype=np.int32) * _BINS
    active, size = bins[fired], n * _BINS

    def above(at: npt.NDArray[np.int32], weights: Floats | None = None) -> Floats:
        counts = np.bincount(at.ravel(), weights, size).reshape(n, _BINS) / n_tokens
        from_there: Floats = counts[:, ::-1].cumsum(1)[:, ::-1].astype(np.float32)
        return from_there

    predicted, hits, kept = above(bins), above(active), above(active, energy[fired])
    return Margins(predicted[:, 1:], hits[:, 1:], kept[:, 1:], hits[:, 0], kept[:, 0])


def _joined(pieces: list[tuple[Scale, Margins, Margins]]) -> tuple[Scale, Margins, Margins]:
    scales, validation, test = zip(*pieces, strict=True)
    scale = Scale(*(np.concatenate([getattr(s, n) for s in scales]) for n in ("slope", "intercept", "spread")))
    names = ("predicted", "hits", "energy", "fired", "total")
    both = [Margins(*(np.concatenate([getattr(m, n) for m in part]) for n in names)) for part in (validation, test)]
    return scale, both[0], both[1]
