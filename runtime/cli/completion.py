"""What a shell offers when Tab is pressed on one of our command lines: argcomplete's work, told which files an argument takes.

Knows argparse's parsers; knows nothing of commands, and opens no file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Make = Callable[[], argparse.ArgumentParser]


def offer_completions(parser: Make, verbs: Mapping[str, Make] | None = None) -> None:
    """Answer the shell and leave, where it is a shell that asks; else do nothing.

    verbs: the parsers of first words whose options are not those of `parser`.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete  # noqa: PLC0415  (needed for nothing else)

    # Which word of the line is the program, from 1; where a verb has a parser of its own, the verb is.
    program = int(os.environ["_ARGCOMPLETE"])
    first, *others = os.environ["COMP_LINE"].split()[program:] or [""]
    if verbs and first in verbs and (others or os.environ["COMP_LINE"][-1:].isspace()):
        os.environ["_ARGCOMPLETE"] = str(program + 1)
        parser = verbs[first]
    by_type: Any = _by_type  # declared to be one of argcomplete's classes, used as a function
    argcomplete.autocomplete(parser(), default_completer=by_type, always_complete_options="long")


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
