"""Drawings of how neurons fire, as PNG or SVG. matplotlib, an extra, draws them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.analysis.firing import CARRIED, Frequencies, carried_shares
from runtime.errors import UserError

_MOST_NAMED = 16  # layers in a legend


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an extra: only drawings need it)
    except ImportError:
        raise UserError("plots need matplotlib", "pip install 'lazyneuron[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def draw_curves(axes: Any, frequencies: Sequence[Frequencies]) -> None:
    """One curve per layer: share of the activations over share of the neurons, hottest first."""
    axes.set(xlabel="share of the neurons, hottest first", ylabel="share of the activations", xlim=(0, 1), ylim=(0, 1))
    for i, freq in enumerate(frequencies):
        n = len(freq)
        axes.plot(np.arange(1, n + 1) / n, carried_shares(freq), label=f"layer {i}", linewidth=1)
    axes.axhline(CARRIED, color="gray", linestyle=":", linewidth=1)
    axes.grid(visible=True, alpha=0.3)
    if len(frequencies) <= _MOST_NAMED:
        axes.legend(fontsize="small")


def drawn(figure: Any, kind: str, dpi: int) -> bytes:
    """The finished drawing. kind: png or svg."""
    image = io.BytesIO()
    figure.savefig(image, format=kind, dpi=dpi)
    return image.getvalue()
