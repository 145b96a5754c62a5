"""The report's slider of budgets beside `plan`."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from browser import show
from report_page import MACHINE, cells, check_placement, facts_in, report, text
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from runtime.analysis.budgets import BUDGETS, BudgetRange, choose


def marker(driver: Chrome) -> tuple[float, float]:
    circle = driver.find_element(By.ID, "marker")
    return float(circle.get_attribute("cx") or 0), float(circle.get_attribute("cy") or 0)


def test_the_slider_shows_what_plan_says(fitted_gguf: Path, opened: Chrome) -> None:
    check_placement(opened, fitted_gguf)
    slider = opened.find_element(By.ID, "budget")
    seen = [(text(opened, "#tokens-per-s"), cells(opened, "layers"), marker(opened))]
    for key in (Keys.ARROW_RIGHT, Keys.END, Keys.HOME):
        slider.send_keys(key)
        if key == Keys.ARROW_RIGHT:
            slider.send_keys(key * 7)
        planned = check_placement(opened, fitted_gguf)
        seen.append((text(opened, "#tokens-per-s"), cells(opened, "layers"), marker(opened)))
        assert f"{planned['tokens_per_s']:,.0f} tokens per second" in str(slider.get_attribute("aria-valuetext"))
    for before, after in pairwise(seen):
        assert all(a != b for a, b in zip(before, after, strict=True))
    assert seen[2][2] > seen[0][2] > seen[3][2]  # the marker: further right with more memory
    assert seen[2][2][1] < seen[0][2][1] < seen[3][2][1]  # and higher
    assert text(opened, "#hot-share") == "0.0%"


def test_a_click_on_the_curve_chooses_a_budget(opened: Chrome) -> None:
    before = text(opened, "#budget-name"), marker(opened)
    curve = opened.find_element(By.CSS_SELECTOR, "#chart-speed svg")
    ActionChains(opened).move_to_element_with_offset(curve, 150, 0).click().perform()
    assert (text(opened, "#budget-name"), marker(opened)) != before
    assert "tokens/s" in text(opened, "#chart-speed .readout")


def test_a_budget_of_ones_own_is_where_the_slider_begins(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.html"
    report(fitted_gguf, out, vram_budget=(300_000_001,), ffn="exact", n_ctx=512, as_json=True, **MACHINE)
    printed = json.loads(capsys.readouterr().out)
    show(browser, out, 1200)
    assert facts_in(browser) == printed
    assert printed["placement"]["budgets"][printed["placement"]["begin"]]["budget"] == 300_000_001
    planned = check_placement(browser, fitted_gguf)
    assert (planned["ffn"], planned["n_ctx"]) == ("exact", 512)
    assert planned["devices"][0]["budget"] == 300_000_001


def test_more_memory_is_never_slower(page: Path, opened: Chrome) -> None:
    placement = facts_in(opened)["placement"]
    budgets = placement["budgets"]
    assert len(budgets) == BUDGETS
    assert [row["budget"] for row in budgets] == sorted({row["budget"] for row in budgets})
    seconds = [row["seconds"] for row in budgets]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == placement["cpu_only_seconds"] > seconds[-1]
    assert all(row["bytes"] <= row["budget"] for row in budgets)
    assert budgets[0]["bytes"] == 0


def test_budgets_are_closest_where_the_speed_changes_most() -> None:
    span = BudgetRange(1 << 28, 1 << 32)
    found = choose(span, [12345678], lambda budget: float(budget > 3 << 30))
    assert {0, 12345678, 1 << 32} <= set(found)
    assert found == sorted(set(found))
    gaps = np.diff(found)
    jump = np.searchsorted(found, (3 << 30) + 1) - 1
    assert gaps[jump] == span.unit == gaps.min()
    assert len(found) < BUDGETS  # and no more of them than help
    assert len(choose(span, [], float)) == BUDGETS
