"""What one FFN is, wherever it is described: to the native operators, to the planner, to a predictor's fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu")


@dataclass(frozen=True)
class FfnShape:
    """One FFN, or a part of its neurons. Lengths are in elements.

    gated: a neuron has a gate row beside its up row. threshold: of `fatrelu`. bias: gate, up and down rows have biases.
    sub_norm: neurons are divided by their root mean square before they are projected.
    """

    n_embd: int
    n_ff: int
    gated: bool
    activation: str  # one of ACTIVATIONS
    threshold: float = 0.0
    bias: bool = False
    sub_norm: bool = False

    @property
    def product_length(self) -> int:
        """Elements of the FFN's product for one token: n_embd, and the sum of its neurons' squares where they are
        normalised.
        """
        return self.n_embd + self.sub_norm

    def part(self, n_ff: int) -> FfnShape:
        """The same FFN with so many of its neurons."""
        return replace(self, n_ff=n_ff)
