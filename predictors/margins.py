"""How far scores lie above a predictor's typical error, and what fires there: histograms per neuron, from which every
threshold can be judged.

A margin is a score turned into an estimate of the pre-activation and divided by that estimate's spread: above 0 the
neuron is expected to fire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictors.calibrate import LayerSamples, Responses, TokenSamples
from predictors.matrices import Floats
from predictors.predictor import Candidate
from runtime.bindings.counting import count_margins, moments

STEP = 1 / 8
FEWEST_TOKENS = 32  # an expert that fewer tokens of the validation part chose is computed whole
_ALWAYS = np.float32(1e9)  # a margin above every threshold, that of no candidate too
EDGES: Floats = np.arange(-6, 6 + STEP, STEP, dtype=np.float32)  # the margins that a threshold can have
Range = tuple[int, int]  # neurons: the first, and the one behind the last
_BINS = len(EDGES) + 1
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Scale:
    """Turns scores into margins: (slope x score + intercept) / spread, each float32 [n_ff]. Of neurons that were seen
    too little, all margins are above every threshold.
    """

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

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Of which neurons something is known, bool [n_ff]: the others are always to be candidates."""
        known: npt.NDArray[np.bool_] = self.intercept < _ALWAYS
        return known

    @classmethod
    def always(cls, n_ff: int) -> Scale:
        """Of neurons that were seen too little."""
        return cls(np.ones(n_ff, np.float32), np.full(n_ff, _ALWAYS), np.ones(n_ff, np.float32))

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

    predicted: Floats  # share of all tokens whose margin is there
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
    parts = (layer.validation, layer.test)
    measured = _measured(layer, candidates, parts, list(layer.chunks(max(len(part) for part in parts))))
    return [(scale, validation, test) for scale, (validation, test) in measured]


def measure_some(
    layer: LayerSamples, candidates: list[Candidate], ranges: Sequence[Range]
) -> list[tuple[Scale, Margins]]:
    """For each candidate, of the neurons in these ranges alone, its scale and margins on the validation part."""
    return [(scale, margins) for scale, (margins,) in _measured(layer, candidates, (layer.validation,), ranges)]


def _measured(
    layer: LayerSamples, candidates: list[Candidate], parts: Sequence[TokenSamples], ranges: Sequence[Range]
) -> list[tuple[Scale, list[Margins]]]:
    """Scales by the first part, margins on all; the candidates' rows are those of the ranges, one after the other."""
    n = sum(end - first for first, end in ranges)
    found = [(Scale.empty(n), [Margins.empty(n) for _ in parts]) for _ in candidates]
    prepared = [[c.prepare(part.x) for part in parts] for c in candidates]
    at = 0
    for first, end in ranges:
        rows = slice(at, at := at + end - first)
        for k, part in enumerate(parts):
            responses, tokens = layer.responses(part, first, end), layer.tokens(part, first)
            goal = responses.gate - np.float32(layer.ffn.threshold)
            for c, x, (scale, margins) in zip(candidates, prepared, found, strict=True):
                scores = c.scores(x[k][tokens], rows.start, rows.stop)
                if k == 0:
                    few = part.routed is not None and len(scores) < FEWEST_TOKENS
                    own = Scale.always(end - first) if few else scale_of(goal, scores, c.unit_slope)
                    _fill(scale, rows, own)
                _fill(margins[k], rows, _margins(scores, scale[rows], responses, len(part)))
    return found


def _fill(whole: Scale | Margins, at: slice, part: Scale | Margins) -> None:
    for name, values in vars(part).items():
        getattr(whole, name)[at] = values


def scale_of(goal: Floats, scores: Floats, unit_slope: bool) -> Scale:
    """Least squares of pre-activations [n_tokens, n] on scores, per neuron."""
    mean, centre, scores_2, goal_2, products = moments(scores, goal) / len(scores)
    own, wanted, both = scores_2 - mean**2, np.maximum(goal_2 - centre**2, 0), products - mean * centre
    if unit_slope:
        slope = np.ones_like(mean)
    else:
        # Scores that say nothing of a neuron, or the contrary, are worth nothing: all its margins become the same.
        slope = np.maximum(both / np.maximum(own, _TINY), 1e-6 * np.sqrt(wanted) + _TINY)
    spread = np.sqrt(np.maximum(wanted - 2 * slope * both + slope**2 * own, 0))
    spread = np.maximum(spread, 1e-6 * np.abs(centre) + _TINY)
    return Scale(*(values.astype(np.float32) for values in (slope, centre - slope * mean, spread)))


def _margins(scores: Floats, scale: Scale, responses: Responses, n_tokens: int) -> Margins:
    """Margins of scores [tokens, n] and what the neurons do there, as shares of `n_tokens` tokens."""
    slope, offset = scale.slope / scale.spread / STEP, (scale.intercept / scale.spread - EDGES[0]) / STEP + 1
    counted = count_margins(scores, responses.fired, responses.energy, slope, offset, _BINS)
    predicted, hits, kept = ((found / n_tokens).astype(np.float32) for found in counted)
    return Margins(predicted[:, 1:], hits[:, 1:], kept[:, 1:], hits.sum(1), kept.sum(1))
