"""What every kind of predictor offers to those that choose among fits and store them.

Knows no kind by name, and nothing of thresholds: a candidate gives scores, others decide from which score on a neuron
is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from predictors.calibrate import LayerSamples
from predictors.hot_order import Order
from predictors.matrices import Floats, Tensor


@dataclass(frozen=True)
class FitOptions:
    """types: ggml types that predictor matrices may have. seed: of random numbers. threads: for torch."""

    types: tuple[str, ...]
    seed: int = 0
    threads: int = 1


class Candidate(Protocol):
    """A predictor fitted to one layer, in the numbers that would be stored, but for its bias."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but `predictor_out.bias`; rows of the last one are neurons, in the order of the file."""
        ...

    @property
    def rank(self) -> int:
        """As the file says it, 1 or more."""
        ...

    @property
    def type(self) -> str:
        """In which numbers it is stored, for reports."""
        ...

    @property
    def unit_slope(self) -> bool:
        """Whether scores estimate pre-activations but for a constant per neuron; else they only rise with them."""
        ...

    def prepare(self, x: Floats) -> Floats:
        """What is computed once per token, from inputs float32 [n_tokens, n_embd]."""
        ...

    def scores(self, prepared: Floats, first: int, end: int) -> Floats:
        """Scores of the neurons first .. end - 1, as the runtime computes them: float32 [n_tokens, end - first]."""
        ...


@dataclass(frozen=True)
class Proposal:
    """A candidate that is made when it is wanted: for some of the layer's neurons, to be judged by them, or for all.

    make: from the neurons' numbers (None: all of them), of which row k of the candidate is number k.
    """

    make: Callable[[Order | None], Candidate]


# A way to predict: proposes candidates for one layer, in no particular order; none where the layer's shape does not
# allow any.
Kind = Callable[[LayerSamples, FitOptions], Iterator[Proposal]]


def some_rows(rows: Tensor, neurons: Order | None) -> Tensor:
    """The rows of some neurons, or all."""
    if neurons is None:
        return rows
    chosen = rows.reordered(neurons)
    return replace(chosen, shape=(*rows.shape[:-1], len(neurons)))
