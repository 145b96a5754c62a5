"""A browser that looks at the chat page, and servers whose answers the tests write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import any_browser
from chat_page import KEY, Answer, Page, text_of
from selenium.webdriver import Chrome
from serving import TEMPLATE, Scripted, running

import runtime
from runtime.model import Model
from runtime.serve.settings import Settings


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """One browser for all of them."""
    with any_browser() as driver:
        yield driver


@pytest.fixture(scope="session")
def model(fitted_gguf: Path) -> Iterator[Model]:
    with runtime.load(fitted_gguf, threads=1, device="none") as loaded:
        yield loaded


def _pages(browser: Chrome, model: Model, settings: Settings) -> Iterator[Page]:
    says: list[Answer] = []
    service = Scripted(model, lambda job: says[0](job))  # noqa: PLW0108  (it changes)
    with running(service, lambda: model, settings) as server:
        yield Page(browser, server, says)


@pytest.fixture(scope="session")
def chats(browser: Chrome, model: Model) -> Iterator[Page]:
    yield from _pages(browser, model, Settings("scripted", chat_template=TEMPLATE))


@pytest.fixture(scope="session")
def plains(browser: Chrome, model: Model) -> Iterator[Page]:
    yield from _pages(browser, model, Settings("scripted", chat_template=""))


@pytest.fixture(scope="session")
def lockeds(browser: Chrome, model: Model) -> Iterator[Page]:
    yield from _pages(browser, model, Settings("scripted", keys=(KEY,), chat_template=TEMPLATE))


def _fresh(page: Page) -> Iterator[Page]:
    page.says[:] = [lambda _: text_of("Hello there.")]
    page.forget()
    page.driver.get_log("browser")
    page.open()
    yield page
    assert page.complaints() == []


@pytest.fixture
def page(chats: Page) -> Iterator[Page]:
    """The page of a chat model, in a browser without a past; no test may leave a complaint in the console."""
    yield from _fresh(chats)


@pytest.fixture
def plain(plains: Page) -> Iterator[Page]:
    """The page of a model without a chat template."""
    yield from _fresh(plains)


@pytest.fixture
def locked(lockeds: Page) -> Page:
    """The page of a server that asks for a key."""
    lockeds.says[:] = [lambda _: text_of("Hello there.")]
    lockeds.forget()
    lockeds.open()
    return lockeds
