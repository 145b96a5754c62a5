"""What every kind of predictor offers to those that choose among fits and store them.

Knows no kind by name, and nothing of thresholds: a candidate gives scores, others decide from which score on a neuron is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from predictors.calibrate import LayerSamples
from predictors.quantized import Floats, Tensor


@dataclass(frozen=True)
class FitOptions:
    """types: ggml types that predictor matrices may have. seed: of whatever a fit draws. threads: for torch."""

    types: tuple[str, ...]
    seed: int = 0
    threads: int = 1


class Candidate(Protocol):
    """A predictor fitted to one layer, in the numbers that would be stored, but for its bias.

    tensors: without `predictor_out.bias`; rows of the last one are neurons, in the order of the file. rank: 1 or more.
    type: what the choice was between, for reports. unit_slope: whether scores are estimates of pre-activations (less the threshold that these have to pass).
    """

    tensors: tuple[Tensor, ...]
    rank: int
    type: str
    unit_slope: bool

    def prepare(self, x: Floats) -> Floats:
        """What is computed once per token, from inputs float32 [n_tokens, n_embd]."""
        ...

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Scores of the neurons first .. end - 1, as the runtime computes them: float32 [n_tokens, end - first]."""
        ...


class Kind(Protocol):
    """A way to predict: fits candidates to one layer."""

    def __call__(self, layer: LayerSamples, options: FitOptions) -> Iterator[Candidate]:
        """Candidates, in no particular order; none where the layer's shape does not allow any."""
        ...
