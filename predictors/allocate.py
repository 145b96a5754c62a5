"""How the layers of a model share one budget of output energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from predictors.choose_candidate import GAIN, PRICES, Cost, Doubles, Judged

Choice = tuple[Judged, int] | None


@dataclass(frozen=True)
class LayerOptions:
    """What one layer may do: be computed exactly, or with one of some candidates."""

    candidates: Sequence[Judged]
    cost: Cost
    fired: float  # share of the neurons that fire

    @property
    def total(self) -> float:
        """Energy per token on the validation part."""
        return self.candidates[0].validation.total if self.candidates else 0.0

    @property
    def exact(self) -> float:
        """Time without a predictor, as in Cost.exact_time."""
        return self.cost.exact_time(self.fired)

    def bests(self) -> npt.NDArray[np.int64]:
        """The candidate that is best at each of PRICES, counted; its time and what the energy it loses is worth."""
        best: npt.NDArray[np.int64] = np.argmin([j.time + self.worth(j) for j in self.candidates], axis=0)
        return best

    def worth(self, judged: Judged) -> Doubles:
        """What the energy that a candidate loses is worth at each of PRICES."""
        lost: Doubles = np.maximum(0.0, self.total - judged.validation.energy)
        return PRICES * self.cost.dense * lost

    def worth_keeping(self) -> LayerOptions:
        """Without the candidates that are best at no price."""
        return replace(self, candidates=[self.candidates[k] for k in np.unique(self.bests())])


@dataclass(frozen=True)
class _Path:
    """What one layer does at each of PRICES, [len(PRICES)].

    best: the candidate; pays: whether it saves enough to be used; wins: whether it also is worth what it loses.
    """

    options: LayerOptions
    best: npt.NDArray[np.int64]
    time: Doubles
    energy: Doubles
    pays: npt.NDArray[np.bool_]
    wins: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, options: LayerOptions) -> _Path:
        never = np.zeros(len(PRICES), np.bool_)
        if not options.candidates:
            return cls(
                options, np.zeros(len(PRICES), np.int64), np.zeros(len(PRICES)), np.zeros(len(PRICES)), never, never
            )
        best, each = options.bests(), np.arange(len(PRICES))
        time, energy, worth = (
            np.array(found)[best, each]
            for found in zip(
                *((j.time, j.validation.energy, options.worth(j)) for j in options.candidates), strict=True
            )
        )
        pays = time < (1 - GAIN) * options.exact
        return cls(options, best, time, energy, pays, pays & (time + worth < (1 - GAIN) * options.exact))

    @property
    def lasts(self) -> int:
        """The number of prices at which the predictor wins."""
        return int(self.wins.sum())


def allocate(layers: Sequence[LayerOptions], energy: float) -> list[Choice]:
    """For each layer its candidate and price, or None for exact, such that a share `energy` of all layers' output
    energy is kept.

    One price for all: energy is measured relative to the residual stream, and what is lost of that costs about the same
    in every layer (docs/predictors.md), so layers that predict well give more than those that do not. A layer that
    turns exact gives back energy that the others cannot always use; so it is also tried to keep the predictors of those
    that would turn last, at a higher price for all.
    """
    paths = [_Path.of(layer) for layer in layers]
    found = [choice for n in range(len(paths) + 1) if (choice := _at_least(energy, paths, n)) is not None]
    if energy >= 1 or not found:
        return [None for _ in layers]
    _, price, used = min(found, key=lambda choice: choice[0])
    return [
        (path.options.candidates[path.best[price]], price) if predicted else None
        for path, predicted in zip(paths, used, strict=True)
    ]


def _at_least(energy: float, paths: Sequence[_Path], n_exact: int) -> tuple[float, int, list[bool]] | None:
    """Time, price and which layers have predictors, where only the `n_exact` layers that turn first are exact although
    a predictor would pay; None if no price will do.
    """
    early = set(np.argsort([path.lasts for path in paths], kind="stable")[:n_exact].tolist())
    used = np.array([path.wins if i in early else path.pays for i, path in enumerate(paths)])
    totals = np.array([[path.options.total] for path in paths])
    kept = np.where(used, [path.energy for path in paths], totals).sum(0)
    enough = np.flatnonzero(kept >= energy * totals.sum())
    if not len(enough):
        return None
    price = int(enough[0])
    time = sum(path.time[price] if u[price] else path.options.exact for path, u in zip(paths, used, strict=True))
    return float(time), price, used[:, price].tolist()
