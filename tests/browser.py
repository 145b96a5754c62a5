"""A headless Chromium for the tests of our pages, and for pictures of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-prefers-reduced-motion",
)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser with a profile of its own, and logs of its console and of its network."""
    options = Options()
    options.binary_location = str(BROWSER)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options, Service(str(DRIVER)))  # a driver by name: nothing is looked for elsewhere
        try:
            yield driver
        finally:
            driver.quit()


@contextmanager
def any_browser() -> Iterator[webdriver.Chrome]:
    """A browser for tests. Without one they are skipped, except where $LAZYNEURON_REQUIRE_CHROMIUM is set."""
    if not (BROWSER and DRIVER):
        missing = "chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
        if os.environ.get("LAZYNEURON_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium() as driver:
        yield driver


def show(driver: webdriver.Chrome, page: Path | str, width: int, height: int = 900, scheme: str = "light") -> None:
    """Open a page (a file, or an address) in a window of that many pixels, as somebody sees it who prefers `scheme`."""
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    driver.get(page if isinstance(page, str) else page.as_uri())


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses that the browser asked for since this was last called."""
    messages: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
