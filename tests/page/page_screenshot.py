"""Takes the picture of the chat page, 1,100 pixels wide, in light colours: the bundled model goes on with two texts.

.venv/bin/python tests/page/page_screenshot.py build/tiny-relu-llama.gguf docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from browser import chromium
from chat_page import Page
from serving import running

from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.service import Service
from runtime.serve.settings import Settings

TEXTS = ("My fellow citizens,", "The people of the United States")
SET = {"seed": "4", "max_tokens": "90", "temperature": "0.7"}


def main(model: Path, folder: Path) -> None:
    """Write `chat-page.png`."""
    options = RunOptions(threads=1, device="none")
    settings = Settings(model.stem)
    with running(Service(), lambda: open_model(model, options), settings) as server, chromium() as driver:
        page = Page(driver, server)
        page.open(1100, 720)
        page.button("Settings").click()
        for name, value in SET.items():
            page.one(f"[name={name}]").send_keys(value)
        page.button("Done").click()
        for text in TEXTS:
            page.ask(text)
        page.until(lambda: len(page.all("canvas.layers")) == len(TEXTS))
        (folder / "chat-page.png").write_bytes(driver.get_screenshot_as_png())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
