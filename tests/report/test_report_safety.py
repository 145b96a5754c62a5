"""A report is data: hostile texts stay texts, and the page asks nobody for anything."""

from __future__ import annotations

import html.parser
import http.server
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import requests, show
from report_page import HOSTILE, facts_in, text
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By


def test_hostile_texts_are_texts(browser: Chrome, hostile: Path) -> None:
    browser.get_log("browser")
    show(browser, hostile, 1200)
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, object, embed, body script[src]") == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    assert facts_in(browser)["general"]["name"] == HOSTILE
    assert facts_in(browser)["structure"]["source_architecture"] == HOSTILE
    assert len(browser.find_elements(By.CSS_SELECTOR, "#chart-parts g.row")) > 3
    assert shlex.split(text(browser, "#command"))[4] == "a'b <img src=x onerror=alert(1)>.gguf"
    assert browser.get_log("browser") == []
    assert "\u2028" not in hostile.read_text(encoding="utf-8").partition('id="facts">')[2]


class _Counter(http.server.BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """The address of a server on this machine, and what it was asked for."""
    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Counter,), {"asked": asked})) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_it_asks_for_nothing_and_cannot(browser: Chrome, page: Path, server: tuple[str, list[str]]) -> None:
    address, asked = server
    requests(browser)
    show(browser, page, 1200)
    browser.find_element(By.ID, "budget").send_keys(Keys.END)
    assert requests(browser) == [page.as_uri()]
    script = """
        const [address, done] = arguments;
        document.body.append(Object.assign(new Image(), { src: address + '/image' }));
        document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' }));
        fetch(address + '/fetch').then(() => done('sent'), () => done('refused'));
    """
    assert browser.execute_async_script(script, address) == "refused"
    assert browser.execute_script("return window.hacked") is None
    assert asked == []
    assert len(browser.get_log("browser")) >= 3  # of the policy's refusals
    browser.get(f"{address}/control")
    assert "/control" in asked  # the server does count


class _Addresses(html.parser.HTMLParser):
    """What a page's elements point at, and its policy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str | None] = []
        self.policy: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found += [given[name] for name in ("src", "href", "srcset", "action", "data", "style") if name in given]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]


def test_nothing_on_it_points_elsewhere(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    parser = _Addresses()
    parser.feed(written)
    assert parser.found == ["data:,"]
    assert str(parser.policy).startswith("default-src 'none';")
    assert "unsafe" not in str(parser.policy)
    style = written.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
