"""What the libraries log: kept away from the terminal, and handed to whoever is about to report an error.

ggml and libllama each have one process-wide log callback; both lead here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

from runtime.bindings import ggml, llama


class _LinesOfThread(threading.local):
    """Lines kept for the calls of one thread, the innermost last: ggml and libllama log on the thread that calls
    them.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []


_kept = _LinesOfThread()


def _print_or_keep(level: int, text: bytes | None, _user_data: int | None) -> None:
    line = (text or b"").decode("utf-8", "replace").rstrip("\n")
    if os.environ.get("LAZYNEURON_LOG"):
        print(line, file=sys.stderr)
    if line.strip(" ."):
        for lines in _kept.calls:
            lines.append(line.strip())


_on_log = ggml.LOG_CALLBACK(_print_or_keep)  # kept alive as long as the libraries may call it


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect the lines that ggml and libllama log on this thread meanwhile; nothing is printed unless `LAZYNEURON_LOG`
    is set.
    """
    silence()
    collected: list[str] = []
    _kept.calls.append(collected)
    try:
        yield collected
    finally:
        _kept.calls.pop()


def silence() -> None:
    """Route both libraries' logs here."""
    ggml.ggml_log_set(_on_log, None)
    llama.llama_log_set(_on_log, None)
