"""What FFNs did: how many neurons fired, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.model_file.structure import Structure


@dataclass
class LayerCount:
    """FFN activity of one layer: neurons fired, gate rows read, and tokens seen."""

    fired: int = 0
    gates: int = 0
    seen: int = 0


class Counters:
    """FFN activity of a model's layers since it was made or reset."""

    def __init__(self, structure: Structure, ffn: str) -> None:
        self._neurons = [block.n_reached for block in structure.blocks]
        self._dense = ffn == "dense"
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self.layers = [LayerCount() for _ in self._neurons]

    def add(self, counted: Mapping[int, LayerCount]) -> None:
        """Add what layers did."""
        for i, count in counted.items():
            layer = self.layers[i]
            layer.fired += count.fired
            layer.gates += count.gates
            layer.seen += count.seen

    def layer_shares(self) -> list[float]:
        """Share of each layer's neurons computed, where there are experts of those of the chosen ones; 1.0 in dense
        mode, 0.0 before any token.
        """
        return self._shares("fired")

    def gate_shares(self) -> list[float]:
        """Share of each layer's neurons whose gate rows (ungated: up rows) were read; below 1.0 where there is a
        predictor.
        """
        return self._shares("gates")

    def _shares(self, what: str) -> list[float]:
        if self._dense:
            return [1.0] * len(self.layers)
        return [
            getattr(layer, what) / (layer.seen * neurons) if layer.seen and neurons else 0.0
            for layer, neurons in zip(self.layers, self._neurons, strict=True)
        ]
