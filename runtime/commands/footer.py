"""Figures of a reply for people, on stderr: the dim line below it, and the chart of its layers.

rich knows what the terminal can show: colours, and other characters than ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from runtime.base.figures import number, share, size
from runtime.generation import Stats
from runtime.model import Model

_REASONS = {None: "stopped", "length": "length limit reached", "context": "context full"}
_ROWS = 12  # of the chart: the figures above it and the prompt below share a screen of 24 lines with it
_NARROW, _WIDE = 4, 24  # columns of a bar


def footer(stats: Stats, stop_reason: str | None) -> str:
    """Speed, share of the FFN neurons computed, bytes read per token; and why the reply ended, if not by itself."""
    parts = [
        f"{stats.tokens} tokens",
        f"{number(stats.tokens_per_s)} tokens/s",
        f"{share(stats.computed_share)} of neurons computed",
        f"{size(stats.bytes_per_token)} per token",
    ]
    if stats.drafted_tokens:
        parts.append(f"{stats.accepted_tokens} of {stats.drafted_tokens} drafts accepted")
    return " · ".join([*parts, _REASONS[stop_reason]] if stop_reason in _REASONS else parts)


def print_footer(stats: Stats, stop_reason: str | None) -> None:
    """Print the footer of a reply on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[{footer(stats, stop_reason)}]", style="dim", markup=False)


def paged_figures(model: Model) -> dict[str, Any] | None:
    """For --json: what was read from the file while computing; None without a budget of main memory."""
    paged = model.stats().paged
    return asdict(paged) if paged else None


def print_layers(title: str, shares: Sequence[float]) -> None:
    """Print each layer's share (0 to 1) as a bar and a figure on stderr, many layers side by side."""
    console = Console(stderr=True, highlight=False)
    n_digits, largest = len(str(len(shares) - 1)), max(shares, default=0.0)
    figure = len("100.0%") + n_digits + 3  # with the spaces between
    columns = max(1, min(-(-len(shares) // _ROWS), console.width // (figure + _NARROW)))
    width = max(_NARROW, min(_WIDE, console.width // columns - figure))
    rows = -(-len(shares) // columns)
    table = Table.grid(padding=(0, 1, 0, 0))
    for first in range(rows):
        cells: list[str | Bar] = []
        for layer in range(first, len(shares), rows):
            value, scale = shares[layer], largest or 1.0
            plain = "#" * round(value / scale * width)  # rich's own bar has no form in ASCII
            bar = plain.ljust(width) if console.options.ascii_only else Bar(scale, 0, value, width=width, color="cyan")
            cells += [f"{layer:>{n_digits}}", bar, f"{share(value):>6}"]
        table.add_row(*cells)
    console.print(f"{title} (the longest bar: {share(largest)})")
    console.print(table)
