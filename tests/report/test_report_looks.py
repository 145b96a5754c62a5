"""How a report looks: narrow, dark, without scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import show
from report_page import text
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from runtime.analysis.budgets import BUDGETS


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["page", "hostile"])
def test_a_narrow_window_needs_no_scrolling_sideways(
    browser: Chrome, request: pytest.FixtureRequest, name: str, scheme: str
) -> None:
    show(browser, request.getfixturevalue(name), 360, scheme=scheme)
    opened = "document.querySelectorAll('details').forEach((d) => (d.open = true));"
    assert browser.execute_script(f"{opened} return document.documentElement.scrollWidth") == 360
    assert browser.execute_script("return document.querySelector('#chart-parts svg').clientWidth") <= 360


def test_it_is_dark_for_those_who_prefer_it(browser: Chrome, page: Path) -> None:
    script = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map((c) => c.match(/\\d+/g).map(Number))"
    for scheme, dark in (("light", False), ("dark", True)):
        show(browser, page, 1200, scheme=scheme)
        ground, ink = (sum(colour[:3]) for colour in browser.execute_script(script))
        assert (ground < ink) == dark
        assert abs(ground - ink) > 450


def test_without_scripts_the_tables_are_there(browser: Chrome, page: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, page, 1200)
        assert "Scripts are off" in text(browser, "noscript")
        assert not browser.find_element(By.ID, "chart-parts").is_displayed()
        assert not browser.find_element(By.ID, "budget").is_displayed()
        browser.find_element(By.CSS_SELECTOR, "#table-layers summary").click()
        assert len(text(browser, "#table-layers tbody").splitlines()) == 6
        browser.find_element(By.CSS_SELECTOR, "#table-budgets summary").click()
        assert len(text(browser, "#table-budgets tbody").splitlines()) == BUDGETS
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
