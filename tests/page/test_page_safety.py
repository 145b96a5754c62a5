"""Texts that try to run code, to fetch something, or to lead somewhere; and what axe-core finds."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import requests
from chat_page import Page, text_of
from filelock import FileLock

VENDOR = Path(__file__).parent.parent.parent / "runtime/serve/web/vendor"
AXE = "4.14.1"
ATTACKS = [
    "<img src=x onerror=hacked()>",
    "<script>hacked()</script>",
    "<svg onload=hacked()><circle/></svg>",
    "[a](javascript:hacked())",
    "[a](  JaVaScRiPt:hacked())",
    "[a](java\nscript:hacked())",
    "[a](&#106;avascript:hacked())",
    "[a](data:text/html,<script>hacked()</script>)",
    "[a](vbscript:hacked())",
    "![a](javascript:hacked())",
    "![a](https://evil.example/pixel.png)",
    '![a](https://evil.example/x" onerror="hacked())',
    '[a](https://evil.example/" onmouseover="hacked())',
    "<javascript:hacked()>",
    "[![a](javascript:hacked())](javascript:hacked())",
    "**<iframe srcdoc='<script>parent.hacked()</script>'>**",
    "| <img src=x onerror=hacked()> | b |\n|---|---|\n| [x](javascript:hacked()) | <a href=javascript:hacked()>y</a> |",
    "```html\n<img src=x onerror=hacked()>\n```",
    "```<img/src=x/onerror=hacked()>\nx\n```",
    "# <details open ontoggle=hacked()>x</details>",
    "<math><mtext><table><mglyph><style><img src=x onerror=hacked()>",
    "<style>@import 'https://evil.example/x.css'</style>",
    "<meta http-equiv=refresh content='0;url=javascript:hacked()'>",
    "<base href=https://evil.example/>",
    "<form action=javascript:hacked()><button>x</button></form>",
    "$$\\href{javascript:hacked()}{x}$$",
]


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_hostile_texts_stay_texts(page: Page, size: int) -> None:
    """From the model and from the user, split at every place; after it, and after the page is loaded anew."""
    text = "\n\n".join(ATTACKS)
    page.says[:] = [lambda _: text_of(text, size)]
    page.driver.execute_script("window.hacked = () => { document.title = 'HACKED' }")
    requests(page.driver)
    answer = page.ask("<img src=x onerror=hacked()> [a](javascript:hacked())")
    assert "<script>hacked()</script>" in answer.text
    for _ in range(2):
        tags = {e.tag_name for e in page.all("#log *")}
        assert not tags & {
            "img",
            "script",
            "svg",
            "iframe",
            "style",
            "meta",
            "base",
            "form",
            "math",
            "object",
            "details",
        }
        links = [e.get_attribute("href") for e in page.driver.find_elements("css selector", "#log a")]
        assert all(link is None or link.startswith("https://evil.example/") for link in links)
        attributes = page.driver.execute_script(
            "return [...document.querySelectorAll('#log *')].flatMap((e) => e.getAttributeNames())"
        )
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "srcdoc", "src")]
        assert page.driver.title != "HACKED"
        page.open()
    assert not [url for url in requests(page.driver) if "evil.example" in url]


def test_policy_forbids_what_the_page_does_not_do(page: Page) -> None:
    """The second wall: even a hole in the page could not turn text into HTML, nor run a script of another place."""
    tried = page.driver.execute_script(
        "const tries = [() => { document.body.innerHTML = '<b>x</b>' }, "
        "() => document.write('x'), () => { document.createElement('script').text = 'x' },"
        "() => trustedTypes.createPolicy('mine', {})];"
        "return tries.map((t) => { try { t(); return 'done' } catch (e) { return e.constructor.name } })"
    )
    assert "done" not in tried
    assert any("Trusted" in line or "Content Security Policy" in line for line in page.complaints())


def test_vendored_files_are_those_that_were_published() -> None:
    listed = json.loads((VENDOR / "vendor.json").read_text())
    assert set(listed) == {path.name for path in VENDOR.glob("*.js")}
    for name, entry in listed.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == entry["sha256"]
        assert (VENDOR / name).with_suffix(".LICENSE").read_text().startswith(f"{entry['license']} License")


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core, from npm."""
    folder = Path(os.environ.get("LAZYNEURON_CACHE", "~/.cache/lazyneuron")).expanduser() / f"axe-core-{AXE}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "package/axe.min.js").exists():
            npm = shutil.which("npm")
            if not npm:
                if os.environ.get("LAZYNEURON_REQUIRE_CHROMIUM"):
                    pytest.fail("npm is not installed, which fetches axe-core")
                pytest.skip("npm is not installed, which fetches axe-core")
            folder.mkdir(exist_ok=True)
            subprocess.run([npm, "pack", "--silent", f"axe-core@{AXE}"], cwd=folder, check=True, capture_output=True)
            shutil.unpack_archive(folder / f"axe-core-{AXE}.tgz", folder)
    return (folder / "package/axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_axe_finds_nothing(page: Page, axe: str, scheme: str, width: int) -> None:
    page.says[:] = [
        lambda _: text_of("# Title\n\nA [link](https://example.org), `code`.\n\n```\nx\n```\n\n- [ ] to do\n", 5)
    ]
    page.ask("Hi")
    page.open(width=width, scheme=scheme)

    def check() -> None:
        found = page.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run({resultTypes: ['violations']}).then((r) => done(r.violations))"
        )
        assert [(v["id"], [n["html"][:120] for n in v["nodes"]]) for v in found] == []

    # As an extension would: past the policy, which page scripts cannot.
    page.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
    try:
        page.open(width=width, scheme=scheme)
        page.driver.execute_script(axe)
        check()
        page.button("Settings").click()
        check()
        page.button("Done").click()
        if width < 700:
            page.button("Conversations").click()
            check()
    finally:
        page.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})
