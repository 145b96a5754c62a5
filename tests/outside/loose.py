"""Plugin of pytest for llama.cpp's server tests: without their models, texts may be any; what was let pass is counted.

Writes a line of JSON for each test into $OUTSIDE_REPORT: its name, outcome, error, and how many texts did not match.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils

if TYPE_CHECKING:
    import pytest

_missed: list[str] = []
_match = utils.match_regex


def _noted(regex: str, text: str) -> bool:
    if not _match(regex, text):
        _missed.append(f"{regex} in {text[:60]!r}")
    return True


utils.match_regex = _noted
utils.ServerPreset.load_all = staticmethod(lambda: None)  # it fetches models


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down how a test ended."""
    if report.when == "call" or report.outcome != "passed":
        error = str(report.longrepr.reprcrash.message) if getattr(report.longrepr, "reprcrash", None) else ""
        line: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome, "texts": list(_missed)}
        line |= {
            "when": report.when,
            "seconds": round(report.duration, 1),
            "error": error or str(report.longrepr or ""),
        }
        with Path(os.environ["OUTSIDE_REPORT"]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    if report.when == "teardown":
        _missed.clear()
