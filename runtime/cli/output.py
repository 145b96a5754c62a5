"""What commands print: results on stdout, one JSON object where scripts read, and lines for people on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

from runtime.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 140  # columns of tables, where stdout is no terminal


def console(width: int = WIDTH) -> Console:
    """Where tables go: stdout, as wide as its terminal; width: where it is none."""
    from rich.console import Console  # noqa: PLC0415  (needless where only JSON or a line is printed)

    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def new_table(*columns: str, title: str | None = None, left: Iterable[str] = ()) -> Table:
    """A table without lines, of figures that stand right; left: columns of texts, and the first one is if it is among
    them.
    """
    from rich.table import Table  # noqa: PLC0415  (as above)

    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def cleaner(out: TextIO) -> Callable[[str], str]:
    """How a model's text is written to `out`: as it is, but for a terminal, which it could steer."""
    return printable if out.isatty() else str


def print_json(values: dict[str, Any]) -> None:
    """One JSON object as one line of stdout; what its encoding lacks is escaped."""
    text = json.dumps(values, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # also halves of surrogate pairs, which stand for bytes in names of files
        text = json.dumps(values)
    print(text, flush=True)


def note(text: str) -> None:
    """A line for people: on stderr, because stdout is for data."""
    print(text, file=sys.stderr, flush=True)


def stream(pieces: Iterable[str], write: Callable[[str], object]) -> str:
    """Write pieces as they come, and a newline at the end where they bring none; returns them joined."""
    text = ""
    for piece in pieces:
        text += piece
        write(piece)
    if not text.endswith("\n"):
        write("\n")
    return text
