"""What somebody sees and does who opens the server's page."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from browser import show
from chat_page import KEY, Page, text_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import piece

from runtime.errors import UserError
from runtime.generation import Stats
from runtime.serve.jobs import End, FullError, Piece, PromptTooLongError, TokenInfo


def test_an_answer_comes_with_what_it_cost(page: Page) -> None:
    answer = page.ask("Hi")
    assert "Hello there." in answer.text
    assert page.all(".message.user")[-1].text.startswith("You\nHi")
    assert "tokens" in answer.find_element(By.CSS_SELECTOR, ".figures").text
    assert page.one("#name").text == "scripted"
    assert "6 layers" in page.one("#facts").text


def test_what_the_real_engine_computes_is_shown_layer_by_layer(page: Page) -> None:
    """The figures and the strip of a token whose layers were counted."""
    page.says[:] = [
        lambda _: [
            piece("a", 5),
            Piece("b", (TokenInfo(6, b"b"),), (0.5, 0.1, 0.0, 0.2, 0.3, 0.1), 3e6),
            0.3,
            *text_of("c"),
        ]
    ]
    page.send("Hi")
    page.until(lambda: "20 % of neurons" in page.all(".figures")[-1].text if page.all(".figures") else False)
    words = page.all(".figures")[-1]
    assert "3.0 MB a token (dense: " in words.text
    assert words.get_attribute("title") == "Of 6 layers, layer 0 computed most: 50 % of its neurons."
    canvas = page.one("canvas.layers")
    pixels = "const c = arguments[0], d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; return d.filter((_, i) => i % 4 == 3 && d[i]).length"
    assert page.driver.execute_script(pixels, canvas) > 100
    page.idle()


def test_strips_have_their_colours_after_further_messages_and_later(page: Page) -> None:
    stats = Stats(prompt_tokens=3, tokens=2, layer_shares=[0.4] * 6, layer_neurons=[1024] * 6)
    page.says[:] = [lambda _: [piece("a", 5, 6), End("eos", stats, 7, "a")]]
    first = "const c = arguments[0]; return [...c.getContext('2d').getImageData(1, c.height - 1, 1, 1).data]"
    for ask in (lambda: page.ask("Hi"), lambda: page.ask("Again"), page.open):
        ask()
        page.until(lambda: page.all("canvas.layers"))
        colours = [page.driver.execute_script(first, canvas) for canvas in page.all("canvas.layers")]
        assert colours == [[0x5F, 0x87, 0xAD, 255]] * len(colours)  # --cold in style.css
    assert len(colours) == 2


def test_markdown_is_shown_as_it_comes(page: Page) -> None:
    text = (
        "# Title\n\nSome **bold** and `code`, a [link](https://example.org/a?b=c).\n\n- one\n- two\n\n"
        "```python\nprint('<b>')\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> said\n"
    )
    page.says[:] = [lambda _: text_of(text, 2)]
    body = page.ask("Hi").find_element(By.CSS_SELECTOR, ".body")
    found = {tag: [e.text for e in body.find_elements(By.TAG_NAME, tag)] for tag in ("h1", "strong", "li", "td")}
    assert found == {"h1": ["Title"], "strong": ["bold"], "li": ["one", "two"], "td": ["1", "2"]}
    code = body.find_element(By.CSS_SELECTOR, "pre code")
    assert code.text == "print('<b>')"
    assert code.get_attribute("data-language") == "python"
    link = body.find_element(By.TAG_NAME, "a")
    assert link.get_attribute("href") == "https://example.org/a?b=c"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    page.button("Copy the code").click()
    page.until(lambda: page.all("pre .copy")[0].text == "Copied")


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop(page: Page, way: str) -> None:
    """What came stays, and the server computes no more."""
    page.says[:] = [lambda _: text_of("word " * 400, 5, 0.03)]
    page.send("Hi")
    page.until(
        lambda: (
            "word word" in page.all(".message.assistant .body")[-1].text
            if page.all(".message.assistant .body")
            else False
        )
    )
    if way == "button":
        page.button("Stop").click()
    else:
        page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.idle()
    page.until(lambda: not page.server.service._tickets)  # type: ignore[attr-defined]
    assert "stopped" in page.all(".figures")[-1].text
    assert page.all(".message.assistant .body")[-1].text.startswith("word word")
    assert page.driver.switch_to.active_element.get_attribute("id") == "text"


def test_conversations_last(page: Page) -> None:
    page.ask("My first question")
    page.button("New conversation").click()
    page.ask("Another one")
    page.open()
    assert [e.text for e in page.all(".list .entry")] == ["Another one", "My first question"]
    assert page.all(".message.user .body")[0].text == "Another one"
    page.all(".list .entry")[1].click()
    page.until(lambda: page.all(".message.user .body")[0].text == "My first question")
    assert "Hello there." in page.all(".message.assistant .body")[0].text
    page.button("Rename: My first question").click()
    field = page.one(".list input")
    field.clear()
    field.send_keys("Renamed", Keys.ENTER)
    page.until(lambda: "Renamed" in [e.text for e in page.all(".list .entry")])
    page.button("Delete: Another one").click()
    page.until(lambda: [e.text for e in page.all(".list .entry")] == ["Renamed"])
    page.open()
    assert [e.text for e in page.all(".list .entry")] == ["Renamed"]


def test_answer_again_edit_and_delete(page: Page) -> None:
    page.ask("One")
    page.says[:] = [lambda _: text_of("Second try.")]
    page.button("Answer again").click()
    page.until(lambda: "Second try." in page.one("#log").text)
    page.idle()
    assert len(page.all(".message")) == 2
    page.ask("Two")
    page.says[:] = [lambda job: text_of(f"About {page.server.service.model.detokenize(job.prompt)}", 200)]  # type: ignore[attr-defined]
    page.all(".message.user .tools button")[1].click()
    area = page.one(".edit textarea")
    area.clear()
    area.send_keys("Changed", Keys.ENTER)
    page.until(lambda: "About" in page.one("#log").text)
    page.idle()
    assert len(page.all(".message")) == 2
    assert "Changed" in page.all(".message.assistant")[-1].text
    assert "Two" not in page.one("#log").text
    page.all(".message.assistant .tools button")[-1].click()
    page.until(lambda: len(page.all(".message")) == 1)


def test_settings_are_sent_and_kept(page: Page) -> None:
    page.button("Settings").click()
    for name, value in (
        ("system", "Be brief."),
        ("temperature", "0.25"),
        ("seed", "7"),
        ("max_tokens", "33"),
        ("stop", "END"),
    ):
        page.one(f"[name={name}]").send_keys(value)
    page.button("Done").click()
    page.open()
    page.ask("Hi")
    job = page.server.service.jobs[-1]  # type: ignore[attr-defined]
    assert (job.sampling.temperature, job.sampling.seed, job.max_tokens, job.stop) == (0.25, 7, 33, ("END",))
    assert "Be brief." in page.server.service.model.detokenize(job.prompt)
    page.button("Settings").click()
    assert page.one("[name=temperature]").get_attribute("value") == "0.25"
    page.button("Reset").click()
    page.ask("Again")
    assert page.server.service.jobs[-1].max_tokens is None  # type: ignore[attr-defined]


def test_export_and_import(page: Page, tmp_path: Path) -> None:
    page.ask("Keep me")
    told = page.driver.execute_async_script(
        "const done = arguments[0]; import('./store.js').then((s) => s.exported()).then(done)"
    )
    assert json.loads(told)["conversations"][0]["messages"][0] == {"role": "user", "content": "Keep me"}
    file = tmp_path / "conversations.json"
    file.write_text(told.replace("Keep me", "Brought in"))
    page.driver.find_element(By.ID, "import-file").send_keys(str(file))
    page.until(lambda: "Brought in" in [e.text for e in page.all(".list .entry")])
    file.write_text('{"lazyneuron": 2}')
    page.driver.find_element(By.ID, "import-file").send_keys(str(file))
    page.until(lambda: "cannot be imported" in page.one("#notice").text)


def test_a_model_without_a_template_goes_on_with_the_text(plain: Page) -> None:
    plain.says[:] = [lambda _: text_of(" upon a time", 4)]
    assert plain.one("#text").get_attribute("placeholder") == "Text to go on with"
    answer = plain.ask("Once")
    assert answer.find_element(By.CSS_SELECTOR, ".body").text.strip() == "upon a time"
    plain.ask(" there")
    job = plain.server.service.jobs[-1]  # type: ignore[attr-defined]
    assert plain.server.service.model.detokenize(job.prompt) == "Once upon a time there"


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(locked: Page) -> None:
    locked.until(lambda: "asks for an API key" in locked.one("#notice").text)
    locked.one("[name=key]").send_keys(KEY)
    locked.button("Done").click()
    locked.until(lambda: locked.one("#name").text == "scripted")
    locked.one("#notice-close").click()
    assert "Hello there." in locked.ask("Hi").text
    kept = locked.driver.execute_script("return [JSON.stringify({...localStorage}), document.cookie, location.href]")
    assert KEY not in "".join(kept)


def test_errors_in_words(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    page.says[:] = [lambda _: [UserError("its logits are not numbers")]]
    page.send("Hi")
    page.until(lambda: "its logits are not numbers" in page.one("#notice").text)
    page.idle()

    def refuse(error: UserError) -> None:
        def submit(*_: object) -> None:
            raise error

        monkeypatch.setattr(page.server.service, "submit", submit)

    refuse(PromptTooLongError(5000, 1024))
    page.send("Hi")
    page.until(lambda: "has 5000 tokens; the model takes 1024" in page.one("#notice").text)
    page.idle()
    refuse(FullError(3, 2))
    page.send("again")
    page.until(lambda: "3 requests are waiting already" in page.one("#notice").text)
    monkeypatch.undo()
    page.says[:] = [lambda _: text_of("Here I am.")]
    page.button("Try again").click()
    page.until(lambda: "Here I am." in page.one("#log").text)
    page.idle()
    page.complaints()  # the browser itself notes statuses of 400 and more


def test_a_phone(page: Page) -> None:
    """No scrolling sideways; the list opens over the page."""
    page.says[:] = [lambda _: text_of("A long `" + "x" * 300 + "` line\n\n```\n" + "y" * 300 + "\n```\n", 50)]
    page.open(width=360, height=640)
    page.ask("Hi " + "z" * 200)
    wide = "return document.documentElement.scrollWidth > innerWidth || document.querySelector('#log').scrollWidth > document.querySelector('#log').clientWidth"
    assert not page.driver.execute_script(wide)
    assert not page.all("#list")
    page.button("Conversations").click()
    page.one(".list .entry").click()
    page.until(lambda: not page.all("#list"))


def test_the_keyboard_is_enough(page: Page) -> None:
    def press(*keys: str) -> None:
        page.driver.switch_to.active_element.send_keys(*keys)

    assert page.driver.switch_to.active_element.get_attribute("id") == "text"
    press("First", Keys.SHIFT, Keys.ENTER, Keys.NULL, "second", Keys.ENTER)
    page.until(lambda: "Hello there." in page.one("#log").text)
    page.idle()
    assert page.all(".message.user .body")[0].text == "First\nsecond"
    seen = set()
    for _ in range(30):
        press(Keys.TAB)
        element = page.driver.switch_to.active_element
        seen.add(element.get_attribute("id") or element.get_attribute("aria-label") or element.text)
    assert {"new", "text", "theme", "open-settings", "log", "Answer again", "Edit and send again"} <= seen


def test_light_and_dark(page: Page) -> None:
    def colour() -> str:
        return str(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = colour()
    page.open(scheme="dark")
    dark = colour()
    assert light != dark
    page.one("#theme").click()
    assert colour() == light
    page.one("#theme").click()
    page.open(scheme="light")
    assert colour() == dark
    page.one("#theme").click()
    assert colour() == light


def test_a_fast_and_long_answer_does_not_stop_the_page(page: Page) -> None:
    """5,000 tokens at once: frames go on, and no task blocks the page for long."""
    page.says[:] = [lambda _: text_of("Some words of a paragraph.\n\n" * 1000, 6)]
    page.driver.execute_script(
        "window.longest = 0; new PerformanceObserver((l) => l.getEntries().forEach((e) => { window.longest = Math.max(window.longest, e.duration) })).observe({entryTypes: ['longtask']})"
    )
    started = time.monotonic()
    page.ask("Hi")
    assert len(page.all(".message.assistant .body p")) == 1000
    assert time.monotonic() - started < 60
    assert page.driver.execute_script("return window.longest") < 5000


def test_what_is_heard(page: Page) -> None:
    """A screen reader is told of finished answers, not of tokens."""
    page.ask("Hi")
    log = page.one("#log")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "off")
    page.until(
        lambda: "The answer is complete" in page.driver.find_element(By.ID, "heard").get_attribute("textContent")
    )


def test_a_server_that_is_gone(page: Page) -> None:
    page.driver.execute_script("window.fetch = () => Promise.reject(new TypeError('gone'))")
    page.send("Hi")
    page.until(lambda: "does not answer" in page.one("#notice").text)
    assert page.all(".message.user .body")[-1].text == "Hi"


@pytest.mark.parametrize(
    "path", ["/../page.py", "/%2e%2e/page.py", "/vendor/", "/vendor/vendor.json", "/index.html", "/web/main.js"]
)
def test_only_the_pages_own_files_are_served(page: Page, path: str) -> None:
    assert page.server.get(path).status_code == 404


def test_files_are_not_sent_twice(page: Page) -> None:
    first = page.server.get("/main.js")
    assert first.headers["content-type"].startswith("text/javascript")
    again = page.server.get("/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_it_is_left_out(page: Page, tmp_path: Path) -> None:
    del tmp_path
    show(page.driver, page.server.url + "/", 800)
    assert "frame-ancestors 'none'" in page.server.get("/").headers["content-security-policy"]
