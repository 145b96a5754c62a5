"""Tables for people: what every benchmark prints above its line of JSON."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_WIDTH = 132  # characters, where the output is no terminal or a narrow one


def console() -> Console:
    """Where tables go: stdout, wide enough for them."""
    return Console(width=max(_WIDTH, Console().width))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names in the first column, numbers in the others. A row of one cell starts a section."""
    made = Table(title=title)
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left")
    for row in rows:
        if len(row) == 1:
            made.add_section()
        made.add_row(*row)
    return made
