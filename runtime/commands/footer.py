"""The dim line below a reply, on stderr: how fast it was and how much of the model it needed."""

from __future__ import annotations

from rich.console import Console

from runtime.generate import Stats

_REASONS = {None: "stopped", "length": "length limit reached", "context": "context full"}


def footer(stats: Stats, stop_reason: str | None) -> str:
    """Speed, share of the FFN neurons computed, bytes read per token; and why the reply ended, if not by itself."""
    parts = [
        f"{stats.tokens} tokens",
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"{stats.computed_share:.1%} of neurons computed",
        f"{stats.bytes_per_token / 1e6:.2f} MB per token",
    ]
    return " · ".join([*parts, _REASONS[stop_reason]] if stop_reason in _REASONS else parts)


def print_footer(stats: Stats, stop_reason: str | None) -> None:
    """Print the footer of a reply on stderr."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[{footer(stats, stop_reason)}]", style="dim", markup=False)
