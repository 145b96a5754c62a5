"""Which of a layer's candidates are worth measuring on all neurons: each is judged on some first.

A layer's neurons are alike, so an eighth of them tells two candidates apart; thresholds, which each neuron has of its
own, come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from predictors.calibrate import LayerSamples
from predictors.choose_candidate import Cost, Doubles, sketch
from predictors.margins import Range, measure_some
from predictors.predictor import Proposal
from runtime.base.phases import phase
from runtime.bindings.ffn_shape import FfnShape

FEWEST = 2048  # neurons of a layer that is judged by some of them
_SHARE = 8  # one of so many is
_TOGETHER = 256  # neurons side by side
_OF_EXPERTS = 64  # where there are experts: of more of these
_TOLERANCE = 0.005  # what may be lost by leaving a candidate out, at any price, of the time that the best one takes
_AT_ONCE = 8  # candidates that are measured together


def finalists(layer: LayerSamples, proposals: Sequence[Proposal], cost: Cost) -> list[Proposal]:
    """Those of which, at every price, one is the best or nearly so."""
    if layer.ffn.n_ff < FEWEST or len(proposals) < 3:
        return list(proposals)
    ranges = spread(layer.ffn)
    neurons = np.concatenate([np.arange(*r, dtype=np.int32) for r in ranges])
    values: list[Doubles] = []
    coming = iter(proposals)
    while batch := list(islice(coming, _AT_ONCE)):
        with phase("candidates"):
            candidates = [proposal.make(neurons) for proposal in batch]
        with phase("margins"):
            measured = measure_some(layer, candidates, ranges)
        with phase("judging"):
            shares = layer.ffn.n_ff / len(neurons)
            values += [sketch(c, m, cost, shares) for c, m in zip(candidates, measured, strict=True)]
    return [proposals[k] for k in covering(np.array(values))]


def spread(ffn: FfnShape) -> list[Range]:
    """Some of the neurons, in ranges that lie evenly among all, each in one expert: in a file they may be sorted."""
    together, length = _OF_EXPERTS if ffn.experts else _TOGETHER, ffn.expert_length
    n = max(1, ffn.n_ff // _SHARE // together)
    step = ffn.n_ff // n
    firsts = [i * step for i in range(n)]
    return [(first, min(first + min(together, step), (first // length + 1) * length)) for first in firsts]


def covering(values: Doubles) -> list[int]:
    """Few rows such that in every column the least value of these is at most _TOLERANCE above the least of all.

    Each in turn is the row that serves most of the columns that are not served yet.
    """
    good = values <= values.min(0) * (1 + _TOLERANCE)
    chosen: list[int] = []
    left = np.ones(values.shape[1], np.bool_)
    while left.any():
        chosen.append(int(np.argmax((good & left).sum(1))))
        left &= ~good[chosen[-1]]
    return sorted(chosen)
