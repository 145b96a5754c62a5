"""The progress bar of all commands: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.base.progress import Progress, silent

_PERIOD = 24 * 3600.0  # seconds


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """What long work is to report to; the bar goes when the work is done."""
    if not sys.stderr.isatty():
        yield silent
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
