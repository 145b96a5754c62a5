"""Which part of long work takes the processor's time: sums by name, for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class _Phases:
    """Core-seconds of this process (user and system time of all its threads) by phase, without those inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.since = 0.0

    def switch(self) -> None:
        """Count what has passed for the innermost phase that is open."""
        now = time.process_time()
        if self.open:
            self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.since
        self.since = now


_phases = _Phases()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Count what the process does until the end of the block for a phase, except what an inner phase counts.

    For one thread at a time; what others do meanwhile counts too.
    """
    _phases.switch()
    _phases.open.append(name)
    try:
        yield
    finally:
        _phases.switch()
        _phases.open.pop()


def core_seconds() -> dict[str, float]:
    """What was counted so far, by phase."""
    return dict(_phases.seconds)
