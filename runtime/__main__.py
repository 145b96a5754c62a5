"""The command line `python -m runtime`: finds the command and reports its errors; the rest is its module's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from runtime.bindings.sparse_ffn import exit_on_abort
from runtime.cli.completion import offer_completions
from runtime.cli.options import Parser, arguments_of, check_verb
from runtime.cli.program import run_command
from runtime.commands import chat, complete, devices, inspect, perplexity, plan, report, sparsity

COMMANDS = (
    (chat, chat.chat),
    (complete, complete.complete),
    (devices, devices.show_devices),
    (inspect, inspect.inspect),
    (perplexity, perplexity.perplexity),
    (plan, plan.plan),
    (report, report.report),
    (sparsity, sparsity.sparsity),
)

_START = """\
Talk to a model that `python -m convert` has made:

    python -m runtime chat MODEL.gguf

All commands (each explains itself with --help):
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    if not arguments:
        print(_overview())
        return
    check_verb(arguments[0], [name for module, _ in COMMANDS for name in _verbs(module)], "python -m runtime")
    options = vars(_parser().parse_args(arguments))
    exit_on_abort()
    command = options.pop("command")
    command(**arguments_of(options))


def _parser() -> Parser:
    parser = Parser(prog="python -m runtime", description="Run models converted by `python -m convert`.")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for module, command in COMMANDS:
        name, *aliases = _verbs(module)
        verb = verbs.add_parser(name, aliases=aliases, help=module.HELP, description=command.__doc__)
        module.configure_parser(verb)
        verb.set_defaults(command=command)
    return parser


def _verbs(module: ModuleType) -> list[str]:
    """The command's name, and others that it answers to."""
    return [module.__name__.rpartition(".")[2], *getattr(module, "ALIASES", ())]


def _overview() -> str:
    lines = []
    for module, _ in COMMANDS:
        name, *aliases = _verbs(module)
        also = f" (also: {', '.join(aliases)})" if aliases else ""
        lines.append(f"    {name:<12}{module.HELP}{also}")
    return _START + "\n".join(lines)


if __name__ == "__main__":
    offer_completions(_parser)
    sys.exit(main())
