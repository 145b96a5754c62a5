"""Takes the pictures of docs/report.md: sections of the bundled model's page, 1,200 pixels wide.

make build/tiny-relu-llama.gguf
.venv/bin/python tests/report_screenshots.py build/tiny-relu-llama.gguf docs/images
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from report_browser import chromium, show
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from runtime.commands.report import report

WIDTH = 1200
# The model is so small that crossings of any real length would hide all else.
MACHINE = {"vram_budget": (296_026_112,), "device_bandwidth": (272.0,), "cpu_bandwidth": 25.0, "sync_us": 0.1}
PICTURES = {
    "report-model": ("header", "section[aria-labelledby=bytes]"),
    "report-neurons": ("section[aria-labelledby=neurons]", "section[aria-labelledby=predictors]"),
    "report-placement": ("section[aria-labelledby=placement]", "section[aria-labelledby=placement]"),
}
_EDGE = 24  # pixels around


def main() -> None:
    model, folder = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as made, chromium() as driver:
        page = Path(made) / "report.html"
        report(model, page, **MACHINE)
        show(driver, page, WIDTH)
        driver.execute_script(
            "const s = document.getElementById('layer'); s.value = 2; s.dispatchEvent(new Event('input'))"
        )
        for name, (first, last) in PICTURES.items():
            (folder / f"{name}.png").write_bytes(picture(driver, first, last))


def picture(driver: Chrome, first: str, last: str) -> bytes:
    """From the top of one element to the bottom of another, as PNG."""
    top, bottom = (driver.find_element(By.CSS_SELECTOR, selector).rect for selector in (first, last))
    y = max(0, top["y"] - _EDGE)
    clip = {"x": 0, "y": y, "width": WIDTH, "height": bottom["y"] + bottom["height"] + _EDGE - y, "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(taken["data"])


if __name__ == "__main__":
    main()
