"""The parser of a command: its options, and what becomes of them before the command gets them as arguments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from runtime.cli.help import HelpParser
from runtime.errors import UserError

Step = Callable[[dict[str, Any]], dict[str, Any]]


class Parser(HelpParser):
    """argparse, but for a wrong option raising UserError like every other mistake."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._steps: list[Step] = []

    def then(self, step: Step) -> None:
        """Let `step` change the parsed options, before those that were added earlier.

        So a model, which every command names first, is fetched last, when all else is known to be good.
        """
        self._steps.append(step)

    def arguments(self, words: Sequence[str]) -> dict[str, Any]:
        """The words of a command line as keyword arguments of the command. Raises UserError, or OSError of a step."""
        options = vars(self.parse_args(words))
        for step in reversed(self._steps):
            options = step(options)
        return options

    def error(self, message: str) -> NoReturn:
        """Report a wrong command line."""
        self._refuse(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse's; a command reports options that it does not know by itself, not through the command line above
        it.
        """
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].partition("=")[0]
            similar = did_you_mean(option, self._option_string_actions) if option.startswith("-") else ""
            self._refuse(f"unrecognized arguments: {' '.join(unknown)}", similar)
        return found, unknown

    def _refuse(self, message: str, hint: str = "") -> NoReturn:
        raise UserError(message, f"{hint}{self.prog} --help lists the options")


def check_verb(word: str, verbs: Sequence[str], prog: str) -> None:
    """Raise UserError when `word`, the first of a command line, is neither an option nor one of the commands."""
    if not word.startswith("-") and word not in verbs:
        raise UserError(f"unknown command `{word}`", f"{did_you_mean(word, verbs)}`{prog}` lists the commands")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The beginning of a hint, "did you mean `chat`? ", or "" where nothing known is similar to `word`."""
    similar = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean `{similar[0]}`? " if similar else ""
