"""Numbers for people: one way to write each kind of them. Results for scripts are numbers, and never come through
here.
"""

from __future__ import annotations

from collections.abc import Sequence

NONE = "-"  # where there is no number


def size(n: float) -> str:
    """Bytes of a file or of what is read, e.g. 17.62 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def memory(n: int) -> str:
    """Bytes of a device's memory, in the units of --vram-budget."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def share(value: float | None, digits: int = 1) -> str:
    """A share, 0 to 1, as a percentage."""
    return NONE if value is None else f"{value:.{digits}%}"


def spread(values: int | Sequence[int]) -> str:
    """A count, or from the lowest to the highest of several that differ."""
    low, high = (values, values) if isinstance(values, int) else (min(values), max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def part(n: float, total: float) -> float | None:
    """The share that `n` is of `total`; None where there is nothing to have a share of."""
    return n / total if total else None


def number(value: float | None) -> str:
    """Tokens/s, GB/s and the like: three digits, or all of those before the point."""
    if value is None:
        return NONE
    digits = next((n for n, limit in ((0, 100), (1, 10), (2, 1)) if abs(value) >= limit), 3)
    return f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """A time below a minute, in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{number(seconds / scale)} {unit}"
    return f"{number(seconds * 1e6)} µs"
