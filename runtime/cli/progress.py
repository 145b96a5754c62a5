"""The progress of long work, for all commands, on stderr: a bar where that is a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runtime.base.progress import Progress

_PERIOD = 24 * 3600.0  # seconds
_QUIET = 60.0  # seconds from one line to the next


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """What long work is to report to; the bar goes when the work is done."""
    if not sys.stderr.isatty():
        yield ProgressLines().show
        return
    # Slow to import, and needless in a pipe.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = (TextColumn("{task.description:<26}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # The time left follows from all that was done: a layer takes longer than the half minute that is usual.
    with Bar(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=_PERIOD) as bar:
        task = bar.add_task("", visible=False)

        def show(what: str, done: float, total: float) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=True)

        yield show


class ProgressLines:
    """What is done and how long the rest will take, in lines for a log: one a minute at most, so none of short work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said = clock()
        self._total = self._done = 0.0
        self._begun = (0.0, 0.0)  # when, with how much done

    def show(self, what: str, done: float, total: float) -> None:
        """A `Progress`."""
        now = self._clock()
        if total != self._total or done < self._done:  # other work, some of which may have been done before
            self._begun = (now, done)
        self._done, self._total = done, total
        if now - self._said >= _QUIET:
            self._said = now
            print(f"{what}: {done / total:.0%}{self._left(now)}", file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        since, before = self._begun
        if self._done <= before:
            return ""
        return f", about {rough_time((self._total - self._done) * (now - since) / (self._done - before))} left"


def rough_time(seconds: float) -> str:
    """A time of seconds to days, as far as one can tell it beforehand."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"
