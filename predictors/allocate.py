"""How the layers of a model share one budget of output energy.

Knows judged candidates of every layer; knows nothing of how they were fitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from predictors.choose import GAIN, PRICES, Cost, Judged


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
        """Bytes per token without a predictor."""
        return self.cost.exact(self.fired)

    def best(self, price: int) -> Judged | None:
        """The candidate that loses least at PRICES[price], None for exact."""

        def saved(j: Judged) -> float:
            lost = max(0.0, self.total - j.validation.energy[price])
            return float((1 - GAIN) * self.exact - j.bytes[price] - PRICES[price] * self.cost.dense * lost)

        best = max(self.candidates, key=saved, default=None)
        return best if best is not None and saved(best) > 0 else None

    def kept(self, price: int) -> float:
        """Energy per token that the best candidate keeps."""
        best = self.best(price)
        return self.total if best is None else float(best.validation.energy[price])

    def worth_keeping(self) -> LayerOptions:
        """Without the candidates that are best at no price."""
        used = {id(j) for price in range(len(PRICES)) if (j := self.best(price)) is not None}
        return LayerOptions([j for j in self.candidates if id(j) in used], self.cost, self.fired)


def allocate(layers: Sequence[LayerOptions], energy: float) -> list[tuple[Judged, int] | None]:
    """For each layer its candidate and price, or None for exact, such that a share `energy` of all layers' output energy is kept.

    One price for all: energy is measured relative to the residual stream, and what is lost of that costs about the same in every layer
    (docs/predictors.md), so layers that predict well give more than those that do not.
    """
    wanted = energy * sum(layer.total for layer in layers)
    enough = (p for p in range(len(PRICES)) if sum(layer.kept(p) for layer in layers) >= wanted)
    price = None if energy >= 1 else next(enough, None)
    if price is None:
        return [None for _ in layers]
    best = [layer.best(price) for layer in layers]
    return [None if judged is None else (judged, price) for judged in best]
