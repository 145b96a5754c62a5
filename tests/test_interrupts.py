"""A file that is written, interrupted at each instruction of what writes it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from runtime.base import atomic
from runtime.base import workspace as module
from runtime.base.atomic import replacing, writing


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(action: Callable[[], None], files: set[str], at: int) -> str:
    """Run it with a KeyboardInterrupt at the `at`-th instruction in these source files: where that was, "" if it ended
    before.
    """
    seen, came = itertools.count(1), ""

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal came
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and next(seen) == at:
            sys.settrace(None)
            came = f"{frame.f_code.co_name}, line {frame.f_lineno}"
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 gives no such event unless a frame wants them before
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        assert came
    finally:
        sys.settrace(before)
    return came


@pytest.mark.parametrize("locks", [True, False])
def test_an_interrupt_at_any_instruction(locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is the old file or the new one then, and nothing else."""
    if not locks:
        monkeypatch.setattr(module, "fcntl", None)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)  # slow, and nothing here depends on it
    files = {module.__file__, atomic.__file__, contextlib.__file__}
    out = tmp_path / "x"

    def replace() -> None:
        with replacing(out) as partial:
            partial.write_text("new")

    for at in itertools.count(1):
        out.write_text("old")
        came = interrupted(replace, files, at)
        assert left(tmp_path) == ["x"], came
        if not came:
            break
        assert out.read_text() in ("old", "new"), came
    assert at > 500  # how many there are differs between versions of Python
    assert out.read_text() == "new"


@pytest.mark.parametrize("names", [["x"], ["x", "y"]])
def test_what_is_kept_goes_with_the_interrupt(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run keeps for the next one stays exactly where the file is still the old one."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    out = tmp_path / "x"

    def publish() -> None:
        with writing(out) as work:
            for name in names:
                (work.folder / name).write_text("new")
            work.kept.mkdir(exist_ok=True)
            work.publish(names)

    for at in itertools.count(1):
        for name in names:
            (tmp_path / name).write_text("old")
        came = interrupted(publish, {module.__file__}, at)
        texts = {(tmp_path / name).read_text() for name in names}
        assert len(texts) == 1, came
        hidden = set(left(tmp_path)) - set(names)
        assert not hidden or texts == {"old"}, came
        if not came:
            break
        for name in hidden:
            assert left(tmp_path / name) == ["kept"], came
            shutil.rmtree(tmp_path / name)
    assert at > 300
    assert texts == {"new"}
