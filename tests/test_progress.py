"""The lines that long work writes to a log."""

from __future__ import annotations

import pytest

from runtime.cli.progress import ProgressLines, progress_bar, rough_time


def test_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    lines = ProgressLines(lambda: now)

    def said(at: float, what: str, done: float, total: float) -> str:
        nonlocal now
        now = at
        lines.show(what, done, total)
        return capsys.readouterr().err

    assert said(1, "writing", 10, 100) == ""
    assert said(59, "writing", 50, 100) == ""
    assert said(61, "writing", 70, 100) == "writing: 70%, about 30 s left\n"
    assert said(62, "writing", 100, 100) == ""
    # Layers that an earlier run had done say nothing of the speed.
    assert said(100, "calibrating layer 16", 16, 32) == ""
    assert said(200, "calibrating layer 16", 16.5, 32) == "calibrating layer 16: 52%, about 52 min left\n"
    assert said(230, "calibrating layer 16", 17, 32) == ""
    assert said(300, "calibrating layer 17", 17, 32) == "calibrating layer 17: 53%, about 50 min left\n"
    assert said(400, "writing", 1, 100) == "writing: 1%\n"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as progress:
        for done in range(100):
            progress("working", done, 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5460, "1 h 31 min"), (90000, "25 h 00 min")],
)
def test_times(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text
