"""`python -m runtime report`: its figures beside those of the other commands, and its page in a headless Chromium."""

from __future__ import annotations

import html.parser
import http.server
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_browser import BROWSER, DRIVER, chromium, requests, show
from report_models import seven_billion, seventy_billion, write_hollow
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

from bench.shapes import shape
from runtime.commands.report import ASSUMED, report
from runtime.errors import UserError
from runtime.gguf_file import GgufFile
from runtime.report.budgets import BUDGETS, Range, choose
from runtime.report.facts import plain

ROOT = Path(__file__).parent.parent
MACHINE = {"device_bandwidth": (272.0,), "cpu_bandwidth": 25.0, "sync_us": 0.1}
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\u2028\"'&{{ 7 * 7 }}"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=120, check=False)


def run_json(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """One browser for the whole module. Without one the tests are skipped, except where $LAZYNEURON_REQUIRE_CHROMIUM is set."""
    if not (BROWSER and DRIVER):
        missing = "chromium and chromedriver are not installed (Debian: chromium chromium-driver)"
        if os.environ.get("LAZYNEURON_REQUIRE_CHROMIUM"):
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
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


def facts_in(driver: Chrome) -> dict[str, Any]:
    found: dict[str, Any] = driver.execute_script("return JSON.parse(document.getElementById('facts').textContent)")
    return found


def text(driver: Chrome, selector: str) -> str:
    return str(driver.find_element(By.CSS_SELECTOR, selector).text)


def cells(driver: Chrome, name: str) -> list[list[str]]:
    """A table's cells, whether its <details> are open or not."""
    script = "return [...document.querySelectorAll(`#table-${arguments[0]} tbody tr`)].map(r => [...r.cells].map(c => c.textContent))"
    found: list[list[str]] = driver.execute_script(script, name)
    return found


def rectangles(driver: Chrome, chart: str, kind: str) -> list[float]:
    """Heights of a chart's rectangles of one kind."""
    script = "return [...document.querySelectorAll(`#chart-${arguments[0]} rect.${arguments[1]}`)].map(r => r.height.baseVal.value)"
    found: list[float] = driver.execute_script(script, chart, kind)
    return found


def percent(share: float) -> str:
    return f"{share * 100:.1f} %"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_its_facts_are_those_of_the_other_commands(fitted_gguf: Path, opened: Chrome) -> None:
    facts, inspected = facts_in(opened), run_json("inspect", fitted_gguf)
    for name in ("bytes", "groups", "tokenizer", "general"):
        assert facts[name] == inspected[name]
    for name, value in inspected["structure"].items():
        assert facts["structure"][name] == pytest.approx(value)
    assert facts["sparsity"]["layer_shares"] == pytest.approx(inspected["sparsity"]["layer_shares"])
    assert facts["bytes_per_token"] == pytest.approx(inspected["bytes_per_token"])
    for layer, expected in zip(facts["layers"], run_json("sparsity", fitted_gguf)["layers"], strict=True):
        assert {name: layer[name] for name in expected} == pytest.approx(expected)
    for mode in facts["modes"]:
        assert sum(mode["parts"].values()) == pytest.approx(mode["bytes"])
    assert facts["model"] == fitted_gguf.name  # and not where it lies


def test_curves_are_the_frequencies_added_up(fitted_gguf: Path, opened: Chrome) -> None:
    with GgufFile(fitted_gguf) as file:
        for i, curve in enumerate(facts_in(opened)["curves"]):
            freq = file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32).astype(np.float64)
            expected = [freq[: round(n * 10.24)].sum() / freq.sum() for n in range(101)]
            assert curve == pytest.approx(expected, abs=5.1e-4)


def test_what_is_read_on_the_page(fitted_gguf: Path, opened: Chrome) -> None:
    inspected = run_json("inspect", fitted_gguf)
    traffic, shares = inspected["bytes_per_token"], inspected["sparsity"]["layer_shares"]
    verdict = text(opened, ".verdict")
    for expected in (
        percent(inspected["sparsity"]["share"]),
        f"{traffic['dense'] / 1e6:.2f} MB",
        f"{traffic['exact_calibrated'] / 1e6:.2f} MB",
        f"{traffic['predicted_calibrated'] / 1e6:.2f} MB",
        f"{traffic['dense'] / traffic['predicted_calibrated']:.2f} times",
    ):
        assert expected in verdict
    assert [row[3] for row in cells(opened, "parts")[:2]] == [
        f"{g['bytes'] / 1e6:.2f} MB" for g in inspected["groups"][:2]
    ]
    assert [row[1] for row in cells(opened, "neurons")] == [percent(share) for share in shares]
    with GgufFile(fitted_gguf) as file:
        recall, ranks = file.metadata["lazyneuron.predictor.recall"], file.structure.predictor_rank
        parameters = sum(
            np.prod(t.ne)
            for name, t in file.tensors.items()
            if "neuron" not in name and "predictor" not in name and "_t." not in name
        )
    for row, share, rank in zip(cells(opened, "predictors"), recall, ranks, strict=True):
        assert row[1:3] == ([f"q4_0 rank {rank}", percent(float(share))] if rank else ["none", "-"])
    for row, mode in zip(cells(opened, "bounds"), ("dense", "exact_calibrated", "predicted_calibrated"), strict=True):
        assert row[2:] == [f"{25e9 / traffic[mode]:,.0f}", f"{272e9 / traffic[mode]:,.0f}"]
    assert f"{parameters / 1e6:.3g} million parameters" in text(opened, ".subtitle")


def test_bars_are_as_high_as_what_they_show(opened: Chrome) -> None:
    shares = facts_in(opened)["sparsity"]["layer_shares"]
    heights = rectangles(opened, "firing", "hot") + rectangles(opened, "firing", "cold")
    assert np.array(heights) / heights[0] == pytest.approx(np.array(shares) / shares[0], abs=0.01)
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-quality circle.recall")) == 6
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-modes g.row")) == 3


# --- the slider -------------------------------------------------------------------------------------------------------


def check_placement(driver: Chrome, model: Path) -> dict[str, Any]:
    """Compare what is shown with what the command on the page says; returns that."""
    command = shlex.split(text(driver, "#command"))
    assert command[:4] == ["python", "-m", "runtime", "plan"]
    assert command[4] == model.name
    planned = run_json("plan", model, *command[5:])
    neurons = [layer["neurons"] for layer in planned["layers"]]
    shown = cells(driver, "layers")
    assert [row[2].replace(",", "") for row in shown] == [str(layer["hot"][0]) for layer in planned["layers"]]
    assert [row[1] for row in shown] == ["device" if la["attention_on_device"] else "CPU" for la in planned["layers"]]
    assert [row[6] for row in shown] == [layer["limit"] for layer in planned["layers"]]
    for row, layer in zip(shown, planned["layers"], strict=True):
        assert float(row[4].split()[0]) / 100 == pytest.approx(layer["activations"], abs=1.1e-3)
        assert float(row[5].replace(",", "")) == pytest.approx(layer["seconds"] * 1e6, rel=0.01)
    assert float(text(driver, "#tokens-per-s").replace(",", "")) == pytest.approx(planned["tokens_per_s"], rel=5e-3)
    used = planned["devices"][0]["bytes"]
    assert text(driver, "#on-device") == (f"{used / 2**30:.2f} GiB" if used >= 2**30 else f"{used / 2**20:.1f} MiB")
    assert text(driver, "#limit") == planned["limit"]
    hot = np.array([layer["hot"][0] for layer in planned["layers"]]) / neurons
    drawn, rest = (np.array(rectangles(driver, "split", f"{kind}:not(.strip)")) for kind in ("hot", "pale"))
    assert drawn / (drawn + rest) == pytest.approx(hot, abs=1e-4)
    attention = sum(layer["attention_on_device"] for layer in planned["layers"])
    assert len(rectangles(driver, "split", "hot.strip")) == attention
    assert text(driver, "#hot-share") == percent(float(hot.mean()))
    return planned


def marker(driver: Chrome) -> tuple[float, float]:
    circle = driver.find_element(By.ID, "marker")
    return float(circle.get_attribute("cx") or 0), float(circle.get_attribute("cy") or 0)


def test_the_slider_shows_what_plan_says(fitted_gguf: Path, opened: Chrome) -> None:
    check_placement(opened, fitted_gguf)
    slider = opened.find_element(By.ID, "budget")
    seen = [(text(opened, "#tokens-per-s"), cells(opened, "layers"), marker(opened))]
    for key in (Keys.ARROW_RIGHT, Keys.END, Keys.HOME):
        slider.send_keys(key)
        if key == Keys.ARROW_RIGHT:
            slider.send_keys(key * 7)
        planned = check_placement(opened, fitted_gguf)
        seen.append((text(opened, "#tokens-per-s"), cells(opened, "layers"), marker(opened)))
        assert f"{planned['tokens_per_s']:,.0f} tokens per second" in str(slider.get_attribute("aria-valuetext"))
    for before, after in pairwise(seen):
        assert all(a != b for a, b in zip(before, after, strict=True))
    assert seen[2][2] > seen[0][2] > seen[3][2]  # the marker: further right with more memory
    assert seen[2][2][1] < seen[0][2][1] < seen[3][2][1]  # and higher
    assert text(opened, "#hot-share") == "0.0 %"


def test_a_click_on_the_curve_chooses_a_budget(opened: Chrome) -> None:
    before = text(opened, "#budget-name"), marker(opened)
    curve = opened.find_element(By.CSS_SELECTOR, "#chart-speed svg")
    ActionChains(opened).move_to_element_with_offset(curve, 150, 0).click().perform()
    assert (text(opened, "#budget-name"), marker(opened)) != before
    assert "tokens/s" in text(opened, "#chart-speed .readout")


def test_a_budget_of_ones_own_is_where_the_slider_begins(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.html"
    report(fitted_gguf, out, vram_budget=(300_000_001,), ffn="exact", n_ctx=512, as_json=True, **MACHINE)
    printed = json.loads(capsys.readouterr().out)
    show(browser, out, 1200)
    assert facts_in(browser) == printed
    assert printed["placement"]["budgets"][printed["placement"]["begin"]]["budget"] == 300_000_001
    planned = check_placement(browser, fitted_gguf)
    assert (planned["ffn"], planned["n_ctx"]) == ("exact", 512)
    assert planned["devices"][0]["budget"] == 300_000_001


def test_more_memory_is_never_slower(page: Path, opened: Chrome) -> None:
    placement = facts_in(opened)["placement"]
    budgets = placement["budgets"]
    assert len(budgets) == BUDGETS
    assert [row["budget"] for row in budgets] == sorted({row["budget"] for row in budgets})
    seconds = [row["seconds"] for row in budgets]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] == placement["cpu_only_seconds"] > seconds[-1]
    assert all(row["bytes"] <= row["budget"] for row in budgets)
    assert budgets[0]["bytes"] == 0


def test_budgets_are_closest_where_the_speed_changes_most() -> None:
    span = Range(1 << 28, 1 << 32)
    found = choose(span, [12345678], lambda budget: float(budget > 3 << 30))
    assert {0, 12345678, 1 << 32} <= set(found)
    assert found == sorted(set(found))
    gaps = np.diff(found)
    jump = np.searchsorted(found, (3 << 30) + 1) - 1
    assert gaps[jump] == span.unit == gaps.min()
    assert len(found) < BUDGETS  # and no more of them than help
    assert len(choose(span, [], float)) == BUDGETS


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_layer_is_chosen_by_slider_or_bar(opened: Chrome) -> None:
    path = "return document.querySelector('#chart-curves path.hot').getAttribute('d')"
    first = opened.execute_script(path)
    opened.find_element(By.ID, "layer").send_keys(Keys.ARROW_RIGHT)
    second = opened.execute_script(path)
    assert text(opened, "#layer-name") == f"1: {percent(facts_in(opened)['layers'][1]['active'])} fire"
    bar = opened.find_elements(By.CSS_SELECTOR, "#chart-firing rect")[4]
    ActionChains(opened).move_to_element(bar).click().perform()
    assert text(opened, "#layer-name").startswith("4: ")
    assert len({first, second, opened.execute_script(path)}) == 3


@pytest.mark.parametrize(
    "name", ["parts", "modes", "curves", "firing", "quality", "candidates", "split", "speed", "times", "bounds"]
)
def test_every_chart_says_its_values_to_keys_and_pointer(opened: Chrome, name: str) -> None:
    chart = opened.find_element(By.CSS_SELECTOR, f"#chart-{name} svg")
    assert chart.get_attribute("aria-label")
    assert len(chart.find_elements(By.CSS_SELECTOR, "text.axis")) >= 1
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    chart.send_keys(Keys.HOME)
    first = text(opened, f"#chart-{name} .readout")
    chart.send_keys(Keys.ARROW_RIGHT)
    second = text(opened, f"#chart-{name} .readout")
    assert "" not in (first, second)
    assert first != second
    ActionChains(opened).move_to_element_with_offset(chart, 0, -20).perform()
    assert any(c.isdigit() for c in text(opened, f"#chart-{name} .readout"))


# --- safety -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small model all of whose texts are hostile, and whose file is called so, too."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = ("general.name", "general.license", "general.base_model.0.name", "lazyneuron.calibration.corpus")
    general = {**dict.fromkeys(texts, HOSTILE), "general.languages": ["en", HOSTILE], HOSTILE: HOSTILE}
    model = folder / "a'b <img src=x onerror=alert(1)>.gguf"
    write_hollow(model, replace(shape("tiny"), source_architecture=HOSTILE), general, type="Q8_0")
    report(model, folder / "hostile.html", **MACHINE)
    return folder / "hostile.html"


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


# --- how it looks -----------------------------------------------------------------------------------------------------


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


# --- other models -----------------------------------------------------------------------------------------------------


def hollow_page(browser: Chrome, folder: Path, structure: Any, **options: Any) -> None:
    write_hollow(folder / "model.gguf", structure, type="Q8_0")
    report(folder / "model.gguf", folder / "page.html", **{**MACHINE, **options})
    browser.get_log("browser")
    show(browser, folder / "page.html", 1200)
    assert browser.get_log("browser") == []


def test_a_file_without_calibration_says_so(browser: Chrome, tiny_gguf: Path, tmp_path: Path) -> None:
    report(tiny_gguf, tmp_path / "page.html", **MACHINE)
    show(browser, tmp_path / "page.html", 1200)
    assert browser.get_log("browser") == []
    assert "not known" in text(browser, ".verdict")
    assert "times" not in text(browser, ".verdict")
    assert text(browser, "main").count("Not calibrated") == 3
    assert "no predictors" in text(browser, "section[aria-labelledby=predictors]")
    assert browser.find_elements(By.CSS_SELECTOR, "#chart-curves, #chart-quality") == []
    assert [row[0] for row in cells(browser, "modes")] == ["dense"]
    assert [row[0] for row in cells(browser, "bounds")] == ["dense"]
    check_placement(browser, tiny_gguf)


def test_a_file_of_the_sparse_layout_says_so(browser: Chrome, tmp_path: Path) -> None:
    s = replace(shape("tiny"), layout="sparse", neuron_order="hot")
    hollow_page(browser, tmp_path, s)
    assert "sparse layout only" in text(browser, "section[aria-labelledby=bytes]")
    assert "all stay on the CPU" in text(browser, "section[aria-labelledby=placement]")
    assert "No layer has a predictor" in text(browser, "section[aria-labelledby=predictors]")
    assert [row[0] for row in cells(browser, "modes")] == ["exact"]
    browser.find_element(By.ID, "budget").send_keys(Keys.END)
    planned = check_placement(browser, tmp_path / "model.gguf")
    assert planned["devices"][0]["bytes"] > 0
    assert text(browser, "#hot-share") == "0.0 %"


def test_layers_without_a_predictor_are_marked(browser: Chrome, tmp_path: Path) -> None:
    hollow_page(browser, tmp_path, replace(seven_billion(), vocab_size=512))
    rows = cells(browser, "predictors")
    assert [row[1] for row in rows if row[1] == "none"] == ["none"] * 2
    assert rows[31][2:5] == ["-", "-", "-"]
    assert len(rectangles(browser, "quality", "exact")) == 2
    assert "30 of 32 layers" in text(browser, "section[aria-labelledby=predictors]")


def test_eighty_layers_make_a_small_page_fast(browser: Chrome, tmp_path: Path) -> None:
    model, out = tmp_path / "large.gguf", tmp_path / "large.html"
    write_hollow(model, seventy_billion())
    began = os.times().user
    report(model, out, vram_budget=(8 << 30,), **{**MACHINE, "sync_us": 50.0})
    assert os.times().user - began < 10
    assert out.stat().st_size < 300_000
    browser.get_log("browser")
    show(browser, out, 360)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    planned = check_placement(browser, model)
    assert planned["devices"][0]["budget"] == 8 << 30
    assert "69 billion parameters" in text(browser, ".subtitle")


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_device_that_nobody_described_is_assumed_and_called_so(
    browser: Chrome, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.commands.report.find", lambda names: [])  # this machine may have a GPU
    report(tiny_gguf, tmp_path / "page.html", cpu_bandwidth=25.0)
    show(browser, tmp_path / "page.html", 1200)
    notice = text(browser, ".notice")
    assert notice.startswith("The device is assumed, for illustration: 272 GB/s, as of a GeForce RTX 4060")
    assert "device (assumed)" in text(browser, "#chart-bounds .key")
    facts = facts_in(browser)
    assert facts["machine"]["device"] == {"bandwidth": ASSUMED, "source": "assumed"}
    assert facts["machine"]["cpu"] == {"bandwidth": 25e9, "source": "given"}
    check_placement(browser, tiny_gguf)


def test_a_described_device_is_no_assumption(opened: Chrome) -> None:
    assert opened.find_elements(By.CSS_SELECTOR, ".notice:not(noscript *)") == []
    assert facts_in(opened)["machine"]["device"] == {"bandwidth": 272e9, "source": "given"}


def test_the_slider_ends_where_the_device_is_full(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 26 << 20
    monkeypatch.setattr("runtime.commands.report.usable", lambda budgets, devices: (free,))
    report(fitted_gguf, tmp_path / "page.html", device="CPU", vram_budget=(1 << 40,), **MACHINE)
    show(browser, tmp_path / "page.html", 1200)
    assert "all that may be used of this device" in text(browser, "#budget-range")
    budgets = facts_in(browser)["placement"]["budgets"]
    assert budgets[-1]["budget"] == free
    assert text(browser, "#budget-name") == "26.0 MiB"
    assert 0 < float(text(browser, "#hot-share").split()[0]) < 100
    check_placement(browser, fitted_gguf)


def test_a_device_of_this_machine_is_measured(
    fitted_gguf: Path, tmp_path: Path, browser: Chrome, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYNEURON_CACHE", str(tmp_path))
    report(fitted_gguf, tmp_path / "page.html", device="cpu", threads=1)
    (speed,) = json.loads((tmp_path / "bandwidths.json").read_text())["speeds"].values()
    show(browser, tmp_path / "page.html", 1200)
    machine = facts_in(browser)["machine"]
    assert machine["device"] == {"bandwidth": pytest.approx(speed[0]), "source": "measured"}
    assert machine["sync"] == {"seconds": pytest.approx(speed[1]), "source": "measured"}
    assert "measured" in text(browser, "section[aria-labelledby=placement] .facts")
    check_placement(browser, fitted_gguf)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_page(fitted_gguf: Path, page: Path, tmp_path: Path) -> None:
    report(fitted_gguf, tmp_path / "again.html", **MACHINE)
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()
    assert str(fitted_gguf.parent).encode() not in page.read_bytes()


def test_the_command_line(fitted_gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    arguments = ("report", fitted_gguf, out, "--device-bandwidth", 272, "--cpu-bandwidth", 25, "--json")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["placement"]["ffn"] == "predicted"
    assert f"`{out}`: written" in done.stderr
    again = run(*arguments)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert run(*arguments, "--force").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("page.txt", {}, "ends in .html"),
        ("model.gguf", {"force": True}, "ends in .html"),
        ("nowhere/page.html", {}, "no such folder"),
        ("folder.html", {}, "a folder"),
        ("page.html", {"device_bandwidth": (1.0, 2.0)}, "several devices"),
        ("page.html", {"device": "CPU,CPU"}, "several devices"),
        ("page.html", {"device": "none"}, "no device `none`"),
        ("page.html", {"device": "Nonesuch"}, "no device `Nonesuch`"),
        ("page.html", {"ffn": "predicted"}, "no predictor"),
        ("page.html", {"n_ctx": 99999999}, "the model's own limit"),
        ("page.html", {"device_bandwidth": (0.0,)}, "must be positive"),
    ],
)
def test_mistakes_leave_nothing_behind(
    tiny_gguf: Path, tmp_path: Path, name: str, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=expected):
        report(tiny_gguf, tmp_path / name, **{**MACHINE, **options})
    assert sorted(tmp_path.iterdir()) == before


def test_what_json_cannot_hold_becomes_what_it_can() -> None:
    found = plain(
        {
            "a": np.float32(0.5),
            "b": float("nan"),
            "c": np.array([1, 2]),
            "d": "x" * 999,
            "e": (3.0, float("inf")),
            "f": None,
            "g": True,
            1: b"raw",
        }
    )
    assert found == {
        "a": 0.5,
        "b": None,
        "c": [1, 2],
        "d": "x" * 299 + "…",
        "e": [3, None],
        "f": None,
        "g": True,
        "1": "b'raw'",
    }
    assert found["g"] is True
    json.dumps(found, allow_nan=False)


def test_figures_that_a_file_does_not_have_are_left_out(browser: Chrome, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    s = replace(
        shape("tiny"), neuron_order="hot", predictor="lowrank", predictor_rank=(32,) * 4, predictor_error=(1.0,) * 4
    )
    write_hollow(model, s, {}, type="Q8_0", measured={"recall": None})
    report(model, tmp_path / "page.html", **MACHINE)
    browser.get_log("browser")
    show(browser, tmp_path / "page.html", 1200)
    assert browser.get_log("browser") == []
    assert [row[0] for row in cells(browser, "modes")] == ["dense", "exact"]
    assert "does not say what its predictors achieve" in text(browser, "section[aria-labelledby=bytes]")
    assert cells(browser, "predictors")[0][2] == "-"
