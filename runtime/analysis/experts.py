"""How evenly experts are chosen."""

from __future__ import annotations

from collections.abc import Sequence


def busiest_share(layers: Sequence[Sequence[float]]) -> float | None:
    """Of all choices the share that goes to each layer's busiest quarter of experts, rounded up; None without experts.

    layers: how often each expert is chosen, in any unit; empty for layers without experts.
    """
    quarters = (sum(sorted(layer, reverse=True)[: -(-len(layer) // 4)]) for layer in layers)
    total = sum(map(sum, layers))
    return sum(quarters) / total if total else None
