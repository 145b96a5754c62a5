"""What the libraries log: kept away from the terminal, and handed to whoever is about to report an error.

ggml and libllama each have one process-wide log callback; both lead here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from runtime import ggml, llama

_lines: list[str] = []
_keeping = 0


def _print_or_keep(level: int, text: bytes | None, _user_data: int | None) -> None:
    line = (text or b"").decode("utf-8", "replace").rstrip("\n")
    if os.environ.get("LAZYNEURON_LOG"):
        print(line, file=sys.stderr)
    if _keeping and line.strip(" ."):
        _lines.append(line.strip())


_on_log = ggml.LOG_CALLBACK(_print_or_keep)  # kept alive as long as the libraries may call it


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect the lines logged by ggml and libllama meanwhile; nothing is printed unless `LAZYNEURON_LOG` is set."""
    global _keeping  # noqa: PLW0603  (the callback is process-wide, as the libraries' own is)
    silence()
    _keeping += 1
    start = len(_lines)
    collected: list[str] = []
    try:
        yield collected
    finally:
        collected += _lines[start:]
        _keeping -= 1
        if not _keeping:
            _lines.clear()


def silence() -> None:
    """Route both libraries' logs here."""
    ggml.ggml_log_set(_on_log, None)
    llama.llama_log_set(_on_log, None)
