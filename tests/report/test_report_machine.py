"""The machine that a report is made for: assumed, described or measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import show
from report_page import MACHINE, check_placement, facts_in, report, text
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from runtime.analysis.page import ASSUMED


def test_a_device_that_nobody_described_is_assumed_and_called_so(
    browser: Chrome, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.analysis.page.find", lambda names: [])  # this machine may have a GPU
    report(tiny_gguf, tmp_path / "page.html", cpu_bandwidth=25.0)
    show(browser, tmp_path / "page.html", 1200)
    notice = text(browser, ".notice")
    assert notice.startswith("The device is assumed, for illustration: 272 GB/s, as of a GeForce RTX 4060")
    assert "device (assumed)" in text(browser, "#chart-bounds .key")
    facts = facts_in(browser)
    assert facts["machine"]["device"] == {"bandwidth": ASSUMED, "source": "assumed"}
    assert facts["machine"]["cpu"] == {"bandwidth": 25e9, "source": "given"}
    check_placement(browser, tiny_gguf)


def test_a_described_device_is_no_assumption(opened: Chrome) -> None:
    assert opened.find_elements(By.CSS_SELECTOR, ".notice:not(noscript *)") == []
    assert facts_in(opened)["machine"]["device"] == {"bandwidth": 272e9, "source": "given"}


def test_the_slider_ends_where_the_device_is_full(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 26 << 20
    monkeypatch.setattr("runtime.analysis.page.usable", lambda budgets, devices: (free,))
    report(fitted_gguf, tmp_path / "page.html", device="CPU", vram_budget=(1 << 40,), **MACHINE)
    show(browser, tmp_path / "page.html", 1200)
    assert "all that may be used of this device" in text(browser, "#budget-range")
    budgets = facts_in(browser)["placement"]["budgets"]
    assert budgets[-1]["budget"] == free
    assert text(browser, "#budget-name") == "26.0 MiB"
    assert 0 < float(text(browser, "#hot-share").removesuffix("%")) < 100
    check_placement(browser, fitted_gguf)


def test_a_device_of_this_machine_is_measured(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    report(fitted_gguf, tmp_path / "page.html", device="cpu", threads=1)
    (speed,) = json.loads((tmp_path / "bandwidths.json").read_text())["speeds"].values()
    show(browser, tmp_path / "page.html", 1200)
    machine = facts_in(browser)["machine"]
    assert machine["device"] == {"bandwidth": pytest.approx(speed[0]), "source": "measured"}
    assert machine["sync"] == {"seconds": pytest.approx(speed[1]), "source": "measured"}
    assert "measured" in text(browser, "section[aria-labelledby=placement] .facts")
    check_placement(browser, fitted_gguf)
