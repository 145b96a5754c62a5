"""How `--help` looks: the same text on every version of Python, without colour, 100 columns wide where no terminal says
otherwise.

argparse has changed its layout between 3.10 and 3.14; the documentation embeds these texts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH = 100  # columns, where stdout is no terminal
_INDENT, _HELP_COLUMN = 2, 30


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, with a usage of one line and options spelt `-t, --threads N`."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
        super().__init__(prog, _INDENT, _HELP_COLUMN, columns)
        self._action_max_length = _HELP_COLUMN  # or versions disagree about the column where there are commands

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: object, prefix: str | None
    ) -> str:
        """What must be given, in order; the options are listed below it."""
        del groups
        given = list(actions)
        words = [usage % {"prog": self._prog} if usage else self._prog]
        if not usage:
            words += [self._spelt(a, a.option_strings[:1]) for a in given if a.option_strings and a.required]
            words += ["[options]"] * any(a.option_strings and not a.required for a in given)
            words += [self._format_args(a, a.dest) for a in given if not a.option_strings]
        # argparse asks with an empty prefix for what comes before the name of a command.
        return f"{'usage: ' if prefix is None else prefix}{' '.join(words)}\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return " ".join(self._metavar_formatter(action, action.dest)(1))
        return self._spelt(action, sorted(action.option_strings, key=len))

    def _spelt(self, action: argparse.Action, flags: Sequence[str]) -> str:
        """An option's flags, and after the last of them the value that it takes."""
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.upper())}"
        return ", ".join(flags) + value


class HelpParser(argparse.ArgumentParser):
    """argparse's parser with such a help; parsers of its commands are made likewise."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})
        self.color = False  # of Python 3.14, which would colour headings and options
