"""The documents as data: their fenced blocks, links and headings, the commands that have pages, and the `--help` embedded there.

Run as a program (`make docs`) it writes those texts anew, in place, and changes nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs/commands"
SHELL = ("", "sh")  # languages of blocks that hold commands; output stands in `text` blocks
_EMBEDDED = re.compile(r"(<!-- help: (?P<command>.+?) -->\n```\n).*?(```\n<!-- end of help -->)", re.DOTALL)
_FIELDS = re.compile(r"(<!-- fields -->\n).*?(<!-- end of fields -->)", re.DOTALL)
_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_MAINS = {"runtime": "runtime.__main__", "convert": "convert.__main__", "predictors": "predictors.__main__"}


def documents() -> list[Path]:
    """What people read: README.md first."""
    found = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(found)]


def help_of(command: str) -> str:
    """What `python -m COMMAND --help` prints."""
    return _run(command.split()[2:])[1]


def understood(words: list[str]) -> bool:
    """Whether a program takes these words, its name first: whatever is wrong is told before a `--help` that comes last."""
    status, said = _run(words)
    return status == 0 and said.startswith("usage: ")


def _run(words: list[str]) -> tuple[int, str]:
    """Exit status and stdout of a command line with `--help` behind it."""
    main = importlib.import_module(_MAINS.get(words[0], words[0])).main
    before, sys.argv = sys.argv, [*words, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
    return status, out.getvalue()


def options_in(text: str) -> set[str]:
    """The long options that a help lists."""
    return {flag for line in re.findall(r"^  (-.+)", text, re.MULTILINE) for flag in re.findall(r"--[a-z][\w-]*", line)}


def commands() -> dict[str, Path]:
    """Each command that the programs know -> the page that it must have."""
    found = {"python -m convert": "convert"}
    for name, main in _MAINS.items():
        verbs = importlib.import_module(main).PROGRAM.verbs
        found |= {f"python -m {name} {verb.name}": f"{name}-{verb.name}" for verb in verbs}
    benches = [path for path in (ROOT / "bench").glob("*.py") if 'prog="python -m ' in path.read_text("utf-8")]
    found |= {f"python -m bench.{path.stem}": "bench" for path in sorted(benches)}
    return {command: PAGES / f"{page}.md" for command, page in found.items()}


@dataclass(frozen=True)
class Block:
    """A fenced block; line: the first of its text, counted from 1."""

    language: str
    text: str
    line: int

    def commands(self) -> Iterator[str]:
        """The block's commands, those over several lines joined."""
        yield from (line for line in self.text.replace("\\\n", " ").splitlines() if line.strip())


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document."""
    return [Block(m["language"], m["text"], text.count("\n", 0, m.start()) + 2) for m in _FENCE.finditer(text)]


def typed(text: str) -> list[str]:
    """What a document shows to be typed."""
    return [line for block in blocks(text) if block.language in SHELL for line in block.commands()]


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[str]:
    """Targets of a document's links."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))


def anchors(text: str) -> set[str]:
    """What a link may name after the `#`, by GitHub's rule."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {f"{slug}-{i}" if i else slug for slug, last in found.items() for i in range(last + 1)}


def embedded(text: str) -> list[str]:
    """The commands whose help a page embeds."""
    return [found["command"] for found in _EMBEDDED.finditer(text)]


def with_help(text: str) -> str:
    """A page with the help, and the server's fields, of today."""
    text = _FIELDS.sub(lambda found: f"{found[1]}{fields_of_requests()}{found[2]}", text)
    return _EMBEDDED.sub(lambda found: f"{found[1]}{help_of(found['command'])}{found[3]}", text)


def fields_of_requests() -> str:
    """The server's tables of fields."""
    from runtime.serve.fields import FIELDS, IGNORED, REFUSED

    lines = ["| field | in | what it does |", "|---|---|---|"]
    for field in FIELDS:
        names = ", ".join(f"`{name}`" for name in (field.name, *field.aliases))
        lines.append(f"| {names} | {', '.join(field.endpoints)} | {field.about}{'; needed' if field.needed else ''} |")
    for title, table in (("accepted, and does nothing", IGNORED), ("refused where it asks for something", REFUSED)):
        lines += ["", f"| {title} | why |", "|---|---|", *(f"| {names} | {why} |" for names, why in table.items())]
    return "\n".join(lines) + "\n"


def without_help(text: str) -> str:
    """A page without it."""
    return _EMBEDDED.sub("", text)


def main() -> None:
    """Write what pages embed anew."""
    for page in documents():
        text = page.read_text(encoding="utf-8")
        if (new := with_help(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
