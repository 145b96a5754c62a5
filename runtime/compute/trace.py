"""When each part of a token was computed where, as a file for chrome://tracing or ui.perfetto.dev (Chrome's trace event
format).
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from runtime.base.atomic import check_target, replacing
from runtime.base.closing import Closing


@dataclass(frozen=True)
class Span:
    """Something that took place on a track; seconds since the trace began. step: which batch of tokens it belongs
    to.
    """

    track: str
    name: str
    start: float
    end: float
    step: int


@dataclass(frozen=True)
class Count:
    """Figures of something at one time, in seconds since the trace began."""

    name: str
    time: float
    values: dict[str, float]


class Trace(Closing):
    """Collects spans and figures from any thread; `close` writes them to a file, in the place of an old one. Raises
    UserError where none can be written.
    """

    def __init__(self, path: Path) -> None:
        check_target(path, 0, force=True, example="trace.json")
        self.path = path
        self.spans: list[Span] = []
        self.counts: list[Count] = []
        self.step = 0
        self._began = time.perf_counter()
        self._lock = threading.Lock()

    def now(self) -> float:
        """Seconds since the trace began."""
        return time.perf_counter() - self._began

    def add(self, track: str, name: str, start: float) -> None:
        """A span from `start` (see `now`) until now."""
        end = self.now()
        with self._lock:
            self.spans.append(Span(track, name, start, end, self.step))

    def count(self, name: str, values: dict[str, float]) -> None:
        """Figures of a step that has ended, which are shown as a chart."""
        with self._lock:
            self.counts.append(Count(name, self.now(), values))

    def close(self) -> None:
        """Write the file, whole or not at all; raises OSError, and UserError where `path` can be no file."""
        tracks = sorted({span.track for span in self.spans})
        names = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": track}}
            for i, track in enumerate(tracks)
        ]
        spans = [
            {
                "ph": "X", "name": s.name, "pid": 0, "tid": tracks.index(s.track), "ts": s.start * 1e6,
                "dur": (s.end - s.start) * 1e6, "args": {"step": s.step},
            }
            for s in self.spans
        ]  # fmt: skip
        counts = [{"ph": "C", "name": c.name, "pid": 0, "ts": c.time * 1e6, "args": c.values} for c in self.counts]
        written = json.dumps({"displayTimeUnit": "ms", "traceEvents": names + spans + counts})
        with replacing(self.path) as made:
            made.write_text(written, encoding="utf-8")
