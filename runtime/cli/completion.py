"""What a shell offers when Tab is pressed on one of our command lines: argcomplete's work, told which files an argument
takes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def asked() -> tuple[int, list[str]] | None:
    """Where a shell asks: which word of its line is the program, from 1, and the words after it before the one being
    typed.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return None
    program, line = int(os.environ["_ARGCOMPLETE"]), os.environ["COMP_LINE"]
    words = line.split()[program:]
    return program, words if line[-1:].isspace() else words[:-1]


def answer(parser: argparse.ArgumentParser, program: int) -> None:
    """Tell the shell what `parser` takes after word `program` of its line, and leave."""
    import argcomplete  # noqa: PLC0415  (needed for nothing else)

    os.environ["_ARGCOMPLETE"] = str(program)
    by_type: Any = _by_type  # declared to be one of argcomplete's classes, used as a function
    argcomplete.autocomplete(parser, default_completer=by_type, always_complete_options="long")


def completed(action: argparse.Action, suffix: str = "", names: Callable[[], Sequence[str]] = tuple) -> None:
    """Complete an argument with `names`, folders, and the files that end in `suffix`."""

    def complete(prefix: str, **_: Any) -> Iterable[str]:
        return [*names(), *_files(prefix, suffix)]

    action.completer = complete  # type: ignore[attr-defined]  # where argcomplete looks


def chosen_from(action: argparse.Action, names: Iterable[str]) -> None:
    """Complete an argument with `names`, which it checks by itself and better than argparse would."""
    known = tuple(names)
    action.completer = lambda **_: known  # type: ignore[attr-defined]


def _by_type(prefix: str, action: argparse.Action, **_: Any) -> Iterable[str]:
    """Files for an argument that is a path; a number or a text is the user's own."""
    return _files(prefix) if action.type is Path else ()


def _files(prefix: str, suffix: str = "") -> Iterable[str]:
    from argcomplete.completers import FilesCompleter  # noqa: PLC0415  (as above)

    return FilesCompleter(suffix or ())(prefix)
