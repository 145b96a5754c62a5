"""A program as a table of verbs: finds the one that a command line names, and imports nothing for the others.

A verb is a module with `configure_parser(parser)` and a function whose parameters are the options. A program may have
programs among its verbs, and one verb without a name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from runtime.bindings.waiting import settle
from runtime.cli.completion import answer, asked
from runtime.cli.parser import Parser, did_you_mean
from runtime.cli.program import run_command
from runtime.errors import UserError

_NAME_WIDTH = 12  # in the list of verbs


@dataclass(frozen=True)
class Verb:
    """One command. help: a line that says what it does; module, function: where it is, by default of the verb's
    name.
    """

    name: str
    help: str
    module: str
    function: str = ""
    aliases: tuple[str, ...] = ()

    def load(self, prog: str) -> tuple[Parser, Callable[..., None]]:
        """Its parser, and the function that takes what is parsed."""
        settle()  # before a verb imports torch, which brings an OpenMP of its own
        module = import_module(self.module)
        command: Callable[..., None] = getattr(module, self.function or self.name)
        parser = Parser(prog=prog, description=command.__doc__)
        module.configure_parser(parser)
        return parser, command

    def run(self, words: Sequence[str], prog: str) -> None:
        """Run it with the words after its name. Raises UserError, and what the command raises."""
        parser, command = self.load(prog)
        arguments = parser.arguments(words)
        from runtime.bindings.sparse_ffn import exit_on_abort  # noqa: PLC0415  (`--help` needs no library)

        exit_on_abort()
        command(**arguments)


@dataclass(frozen=True)
class Program:
    """A table of verbs. name: what is typed for it, `python -m NAME` where it is no verb of another; about: for
    `--help`; help: as of a verb.

    start: what is shown where nothing follows the name, above the list of verbs. plain: the verb without a name.
    """

    name: str
    help: str
    about: str
    start: str
    verbs: tuple[Verb, ...]
    programs: tuple[Program, ...] = ()
    plain: Verb | None = None

    def main(self, argv: Sequence[str] | None = None, prog: str = "") -> int:
        """Run a command line; returns the exit status. prog: how help calls the program."""
        prog = prog or f"python -m {self.name}"
        words = sys.argv[1:] if argv is None else list(argv)
        if line := asked():
            self._answer(*line)
        return run_command(lambda: self._run(words, prog))

    def parser(self, prog: str) -> Parser:
        """The parser of a line that names no verb yet: of the plain verb, or one whose help lists the verbs."""
        if self.plain:
            return self.plain.load(prog)[0]
        parser = Parser(prog=prog, description=self.about)
        listed = parser.add_subparsers(metavar="COMMAND", required=True)
        for name, text, aliases in self._listed():
            listed.add_parser(name, aliases=aliases, help=text)
        return parser

    def _run(self, words: Sequence[str], prog: str) -> None:
        if not words:
            print(self._overview())
        elif found := self._find(words[0]):
            run = found.run if isinstance(found, Verb) else found._run
            run(words[1:], f"{prog} {found.name}")
        elif self.plain:
            self.plain.run(words, prog)
        else:
            self._check(words[0], prog)
            self.parser(prog).parse_args(words)

    def _find(self, word: str) -> Verb | Program | None:
        programs = (program for program in self.programs if program.name == word)
        verbs = (verb for verb in self.verbs if word in (verb.name, *verb.aliases))
        return next(programs, None) or next(verbs, None)

    def _check(self, word: str, prog: str) -> None:
        known = [name for first, _, aliases in self._listed() for name in (first, *aliases)]
        if not word.startswith("-"):
            raise UserError(f"unknown command `{word}`", f"{did_you_mean(word, known)}`{prog}` lists the commands")

    def _listed(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Names, what they do, and other names that they answer to."""
        for verb in self.verbs:
            yield verb.name, verb.help, verb.aliases
        for program in self.programs:
            yield program.name, program.help, ()

    def _overview(self) -> str:
        lines = [self.start, "", "All commands (each explains itself with --help):", ""]
        for name, text, aliases in self._listed():
            also = f" (also: {', '.join(aliases)})" if aliases else ""
            lines.append(f"    {name:<{_NAME_WIDTH}}{text}{also}")
        return "\n".join(lines)

    def _answer(self, at: int, words: Sequence[str]) -> None:
        """Answer a shell that asks what may follow `words`, which follow word `at` of its line, and leave."""
        program: Program = self
        while words and (found := program._find(words[0])):
            at, words = at + 1, words[1:]
            if isinstance(found, Verb):
                answer(found.load(found.name)[0], at)
                return
            program = found
        answer(program.parser(program.name), at)
