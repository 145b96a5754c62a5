"""Our commands run in this process: what `python -m COMMAND` would print and return, without the start of an interpreter, which costs more than most of them.

A process of their own is for what belongs to a process: signals, terminals, closed pipes, locales, limits.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

_MAINS = {"convert": "convert.cli", "predictors": "predictors.cli", "runtime": "runtime.__main__"}


@dataclass(frozen=True)
class Done:
    """What a command has left: its exit status and its output."""

    returncode: int
    stdout: str
    stderr: str


def command(program: str, *arguments: object, stdin: str = "") -> Done:
    """`python -m PROGRAM ARGUMENTS`; program: convert, predictors or runtime."""
    module = importlib.import_module(_MAINS[program])
    with (
        mock.patch("runtime.__main__.exit_on_abort"),  # which is for a whole process: here the tests' own
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
    ):
        try:
            status = module.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's
            status = end.code
    return Done(status or 0, out.getvalue(), err.getvalue())


def result_of(program: str, *arguments: object, stdin: str = "") -> dict[str, Any]:
    """What the command prints for scripts with --json; it must end well."""
    done = command(program, *arguments, "--json", stdin=stdin)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
