"""`python -m runtime report` as a command: the file that it writes, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command
from report_page import MACHINE, report

from runtime.analysis.page_facts import plain
from runtime.errors import UserError


def test_the_same_model_gives_the_same_page(fitted_gguf: Path, page: Path, tmp_path: Path) -> None:
    report(fitted_gguf, tmp_path / "again.html", **MACHINE)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    assert str(fitted_gguf.parent).encode() not in page.read_bytes()


def test_the_command_line(fitted_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ("report", fitted_gguf, out, "--device-bandwidth", 272, "--cpu-bandwidth", 25, "--json")
    done = command("runtime", *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["placement"]["ffn"] == "predicted"
    assert f"`{out}`: written" in done.stderr
    again = command("runtime", *arguments)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert command("runtime", *arguments, "--force").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("page.txt", {}, "ends in .html"),
        ("model.gguf", {"force": True}, "ends in .html"),
        ("nowhere/page.html", {}, "no such folder"),
        ("folder.html", {}, "a folder"),
        ("page.html", {"device_bandwidth": (1.0, 2.0)}, "several devices"),
        ("page.html", {"device": "CPU,CPU"}, "several devices"),
        ("page.html", {"device": "none"}, "no device `none`"),
        ("page.html", {"device": "Nonesuch"}, "no device `Nonesuch`"),
        ("page.html", {"ffn": "predicted"}, "no predictor"),
        ("page.html", {"n_ctx": 99999999}, "the model's own limit"),
        ("page.html", {"device_bandwidth": (0.0,)}, "must be positive"),
    ],
)
def test_mistakes_leave_nothing_behind(
    tiny_gguf: Path, tmp_path: Path, name: str, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=expected):
        report(tiny_gguf, tmp_path / name, **{**MACHINE, **options})
    assert sorted(tmp_path.iterdir()) == before


def test_what_json_cannot_hold_becomes_what_it_can() -> None:
    found = plain(
        {
            "a": np.float32(0.5),
            "b": float("nan"),
            "c": np.array([1, 2]),
            "d": "x" * 999,
            "e": (3.0, float("inf")),
            "f": None,
            "g": True,
            1: b"raw",
        }
    )
    assert found == {
        "a": 0.5,
        "b": None,
        "c": [1, 2],
        "d": "x" * 299 + "…",
        "e": [3, None],
        "f": None,
        "g": True,
        "1": "b'raw'",
    }
    assert found["g"] is True
    json.dumps(found, allow_nan=False)
