"""Takes the pictures of docs/report.md, 1,200 pixels wide: sections of the bundled model's page, and the placement of a made-up file of Mistral-7B's shape.

make build/tiny-relu-llama.gguf
.venv/bin/python tests/report/report_screenshots.py build/tiny-relu-llama.gguf docs/images
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

from browser import chromium, show
from report_models import seven_billion, write_hollow
from report_page import report
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

WIDTH = 1200
# A card of 8 GB, of which some is taken, and a desktop's memory.
MACHINE = {"vram_budget": (2_415_919_104,), "device_bandwidth": (272.0,), "cpu_bandwidth": 40.0}
PICTURES = {
    "report-model": ("header", "section[aria-labelledby=bytes]"),
    "report-neurons": ("section[aria-labelledby=neurons]", "section[aria-labelledby=predictors]"),
}
LARGE_PICTURES = {
    "report-placement": ("section[aria-labelledby=placement]", "section[aria-labelledby=placement]"),
}
_EDGE = 24  # pixels around


def main() -> None:
    bundled, folder = map(Path, sys.argv[1:])
    with tempfile.TemporaryDirectory() as made, chromium() as driver:
        large = Path(made) / "large.gguf"
        write_hollow(large, seven_billion())
        for model, pictures in ((bundled, PICTURES), (large, LARGE_PICTURES)):
            page = Path(made) / f"{model.stem}.html"
            report(model, page, **MACHINE)
            show(driver, page, WIDTH)
            choose_layer(driver, 2)
            for name, (first, last) in pictures.items():
                (folder / f"{name}.png").write_bytes(picture(driver, first, last))


def choose_layer(driver: Chrome, layer: int) -> None:
    """Move the slider of the curves."""
    driver.execute_script(
        f"const s = document.getElementById('layer'); s.value = {layer}; s.dispatchEvent(new Event('input'))"
    )


def picture(driver: Chrome, first: str, last: str) -> bytes:
    """From the top of one element to the bottom of another, as PNG."""
    top, bottom = (driver.find_element(By.CSS_SELECTOR, selector).rect for selector in (first, last))
    y = max(0, top["y"] - _EDGE)
    clip = {"x": 0, "y": y, "width": WIDTH, "height": bottom["y"] + bottom["height"] + _EDGE - y, "scale": 1}
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(taken["data"])


if __name__ == "__main__":
    main()
