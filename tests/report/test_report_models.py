"""What a report says of models that lack something, and of large ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from browser import show
from report_models import seven_billion, seventy_billion, write_hollow
from report_page import MACHINE, cells, check_placement, rectangles, report, text
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By

from bench.shapes import shape


def hollow_page(browser: Chrome, folder: Path, structure: Any, **options: Any) -> None:
    write_hollow(folder / "model.gguf", structure, type="Q8_0")
    report(folder / "model.gguf", folder / "page.html", **{**MACHINE, **options})
    browser.get_log("browser")
    show(browser, folder / "page.html", 1200)
    assert browser.get_log("browser") == []


def test_a_file_without_calibration_says_so(browser: Chrome, tiny_gguf: Path, tmp_path: Path) -> None:
    report(tiny_gguf, tmp_path / "page.html", **MACHINE)
    show(browser, tmp_path / "page.html", 1200)
    assert browser.get_log("browser") == []
    assert "not known" in text(browser, ".verdict")
    assert "times" not in text(browser, ".verdict")
    assert text(browser, "main").count("Not calibrated") == 3
    assert "no predictors" in text(browser, "section[aria-labelledby=predictors]")
    assert browser.find_elements(By.CSS_SELECTOR, "#chart-curves, #chart-quality") == []
    assert [row[0] for row in cells(browser, "modes")] == ["dense"]
    assert [row[0] for row in cells(browser, "bounds")] == ["dense"]
    check_placement(browser, tiny_gguf)


def test_a_file_of_the_sparse_layout_says_so(browser: Chrome, tmp_path: Path) -> None:
    s = replace(shape("tiny"), layout="sparse", neuron_order="hot")
    hollow_page(browser, tmp_path, s)
    assert "sparse layout only" in text(browser, "section[aria-labelledby=bytes]")
    assert "all stay on the CPU" in text(browser, "section[aria-labelledby=placement]")
    assert "No layer has a predictor" in text(browser, "section[aria-labelledby=predictors]")
    assert [row[0] for row in cells(browser, "modes")] == ["exact"]
    browser.find_element(By.ID, "budget").send_keys(Keys.END)
    planned = check_placement(browser, tmp_path / "model.gguf")
    assert planned["devices"][0]["bytes"] > 0
    assert text(browser, "#hot-share") == "0.0%"


def test_layers_without_a_predictor_are_marked(browser: Chrome, tmp_path: Path) -> None:
    hollow_page(browser, tmp_path, replace(seven_billion(), vocab_size=512))
    rows = cells(browser, "predictors")
    assert [row[1] for row in rows if row[1] == "none"] == ["none"] * 2
    assert rows[31][2:5] == ["-", "-", "-"]
    assert len(rectangles(browser, "quality", "exact")) == 2
    assert "30 of 32 layers" in text(browser, "section[aria-labelledby=predictors]")


def test_eighty_layers_make_a_small_page_fast(browser: Chrome, tmp_path: Path) -> None:
    model, out = tmp_path / "large.gguf", tmp_path / "large.html"
    write_hollow(model, seventy_billion())
    began = os.times().user
    report(model, out, vram_budget=(8 << 30,), **{**MACHINE, "sync_us": 50.0})
    assert os.times().user - began < 10
    assert out.stat().st_size < 300_000
    browser.get_log("browser")
    show(browser, out, 360)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    planned = check_placement(browser, model)
    assert planned["devices"][0]["budget"] == 8 << 30
    assert "69 billion parameters" in text(browser, ".subtitle")


def test_figures_that_a_file_does_not_have_are_left_out(browser: Chrome, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    s = replace(
        shape("tiny"), neuron_order="hot", predictor="lowrank", predictor_rank=(32,) * 4, predictor_error=(1.0,) * 4
    )
    write_hollow(model, s, {}, type="Q8_0", measured={"recall": None})
    report(model, tmp_path / "page.html", **MACHINE)
    browser.get_log("browser")
    show(browser, tmp_path / "page.html", 1200)
    assert browser.get_log("browser") == []
    assert [row[0] for row in cells(browser, "modes")] == ["dense", "exact"]
    assert "does not say what its predictors achieve" in text(browser, "section[aria-labelledby=bytes]")
    assert cells(browser, "predictors")[0][2] == "-"
