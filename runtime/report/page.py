"""Facts to one HTML file: the template filled in, with style, script and the facts themselves inside.

Everything that a model file says of itself is escaped by Jinja, or stands in JSON without any character that HTML
knows. The page's own policy forbids it to load or send anything, and to run any script but its own, by that script's
hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from runtime.base import figures
from runtime.report import tables as tables_of


def write_page(facts: Mapping[str, Any]) -> str:
    """The page. facts: as `python -m runtime report --json` prints them."""
    style, script = "\n" + _read("page.css"), "\n" + _read("charts.js") + _read("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "size": figures.size,
        "share": figures.share,
        "memory": figures.memory,
        "number": figures.number,
        "duration": figures.duration,
    }
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    now = tables_of.beginning(facts)
    return environment.from_string(_read("page.html")).render(
        facts=facts,
        now=now,
        now_share=tables_of.hot_share(facts, now),
        tables=tables_of.tables(facts),
        machine_items=tables_of.machine(facts),
        **{
            name: getattr(tables_of, name)(facts)
            for name in ("title", "subtitle", "overview", "origin", "verdict", "command")
        },
        # Read by the browser as they are: they hold nothing of a model's.
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )


def _policy(style: str, script: str) -> str:
    """A Content-Security-Policy under which nothing is loaded, and only this style and this script are heeded."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _read(name: str) -> str:
    return files("runtime.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
