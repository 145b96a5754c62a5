"""The chat page in a browser, and answers that tests write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from browser import show
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from serving import Running, end, piece

from runtime.errors import UserError
from runtime.serve.jobs import Event, Job

KEY = "a-key"
Answer = Callable[[Job], "list[Event | UserError | float]"]


def text_of(text: str, size: int = 3, pause: float = 0.0) -> list[Any]:
    """An answer that comes in pieces of so many characters."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    steps: list[Any] = []
    for k, part in enumerate(pieces):
        steps += [pause] * bool(pause) + [piece(part, k + 5)]
    return [*steps, end(text, tokens=len(pieces))]


@dataclass
class Page:
    """The page in a browser. say: what the server answers, by the job."""

    driver: Chrome
    server: Running
    says: list[Answer] = field(default_factory=list)

    def open(self, width: int = 1100, height: int = 800, scheme: str = "light") -> None:
        show(self.driver, self.server.url + "/", width, height, scheme)
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "html[data-ready]"))

    def forget(self) -> None:
        """As a browser that was never here."""
        self.driver.get(self.server.url + "/style.css")
        self.driver.execute_async_script(
            "const done = arguments[0]; localStorage.clear(); sessionStorage.clear();"
            "const gone = indexedDB.deleteDatabase('lazyneuron'); gone.onsuccess = gone.onerror = gone.onblocked = () => done();"
        )

    def all(self, selector: str) -> list[WebElement]:
        return [e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]

    def one(self, selector: str) -> WebElement:
        self.until(lambda: self.all(selector))
        return self.all(selector)[0]

    def button(self, name: str) -> WebElement:
        """A button by its text or label."""
        found: list[WebElement] = []

        def look() -> bool:
            found[:] = [b for b in self.all("button") if name in (b.text, b.get_attribute("aria-label"))]
            return bool(found)

        self.until(look)
        return found[-1]

    def send(self, text: str) -> None:
        self.one("#text").send_keys(text, Keys.ENTER)

    def ask(self, text: str) -> WebElement:
        """Send a text, and wait for the whole answer: its element."""
        before = len(self.all(".message.assistant"))
        self.send(text)
        self.until(lambda: len(self.all(".message.assistant")) > before)
        self.idle()
        return self.all(".message.assistant")[-1]

    def idle(self) -> None:
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "#log[aria-busy=false]") and self.all("#send"))

    def until(self, there: Callable[[], object], seconds: float = 20) -> None:
        wait = WebDriverWait(self.driver, seconds, 0.05, [StaleElementReferenceException])  # what is being replaced
        wait.until(lambda _: there())

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]
