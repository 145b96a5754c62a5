"""A browser and the pages that several of these tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import any_browser, show
from report_models import write_hollow
from report_page import HOSTILE, MACHINE, report
from selenium.webdriver import Chrome

from bench.shapes import shape


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """One browser for all of them."""
    with any_browser() as driver:
        yield driver


@pytest.fixture(scope="session")
def page(fitted_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's page, for a device and a CPU that are described."""
    out = tmp_path_factory.mktemp("report") / "tiny.html"
    report(fitted_gguf, out, **MACHINE)
    return out


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Iterator[Chrome]:
    """The bundled model's page in a window of 1,200 pixels; no test may leave a complaint in the console."""
    browser.get_log("browser")
    show(browser, page, 1200)
    yield browser
    assert browser.get_log("browser") == []


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small model all of whose texts are hostile, and whose file is called so, too."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = ("general.name", "general.license", "general.base_model.0.name", "lazyneuron.calibration.corpus")
    general = {**dict.fromkeys(texts, HOSTILE), "general.languages": ["en", HOSTILE], HOSTILE: HOSTILE}
    model = folder / "a'b <img src=x onerror=alert(1)>.gguf"
    write_hollow(model, replace(shape("tiny"), source_architecture=HOSTILE), general, type="Q8_0")
    report(model, folder / "hostile.html", **MACHINE)
    return folder / "hostile.html"
