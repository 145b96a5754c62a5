"""What one FFN is, wherever it is described: to the native operators, to the planner, to a predictor's fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu")
GATINGS = ("softmax", "sigmoid", "softmax_weight")
ROUTER_TAPS = ("ffn_norm", "block")


@dataclass(frozen=True)
class Experts:
    """How an FFN's neurons are divided into experts, and how a router chooses some of them for each token.

    count: experts, of equally many neurons; used: how many a token uses. gating: what makes a score of the router's
    product: `softmax` over all experts, `sigmoid`, or `softmax_weight`: the product itself, and the softmax of the
    chosen ones is their weight. bias: is added to a score for the choice alone. normalised: the weights of the chosen
    add up to 1. scale: what weights are multiplied with. tap: what the router sees, the FFN's own input (`ffn_norm`) or
    the block's (`block`).
    """

    count: int
    used: int
    gating: str = "softmax"  # one of GATINGS
    bias: bool = False
    normalised: bool = True
    scale: float = 1.0
    tap: str = "ffn_norm"  # one of ROUTER_TAPS


@dataclass(frozen=True)
class Span:
    """Neurons first .. end - 1 of an FFN, or of each of its experts; or of some of these, by rising number."""

    first: int
    end: int
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FfnShape:
    """One FFN, or a part of its neurons. Lengths are in elements.

    gated: a neuron has a gate row beside its up row. threshold: of `fatrelu`. bias: gate, up and down rows have biases.
    sub_norm: neurons are divided by their root mean square before they are projected. experts: None where every token
    uses all neurons; else `n_ff` counts those of all experts, expert by expert. shared: these are every token's, beside
    those of its experts.
    """

    n_embd: int
    n_ff: int
    gated: bool
    activation: str  # one of ACTIVATIONS
    threshold: float = 0.0
    bias: bool = False
    sub_norm: bool = False
    experts: Experts | None = None
    shared: bool = False

    @property
    def expert_length(self) -> int:
        """Neurons of one expert; of an FFN without experts, all."""
        return self.n_ff // self.experts.count if self.experts else self.n_ff

    @property
    def n_reached(self) -> int:
        """Neurons that one token may use: those of its experts, or all."""
        return self.expert_length * (self.experts.used if self.experts else 1)

    @property
    def product_length(self) -> int:
        """Elements of the FFN's product for one token: n_embd, and the sum of its neurons' squares where they are
        normalised.
        """
        return self.n_embd + self.sub_norm

    def part(self, n: int) -> FfnShape:
        """The same FFN with so many of its neurons; where there are experts, of each one's."""
        return replace(self, n_ff=n * (self.experts.count if self.experts else 1))
