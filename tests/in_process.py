"""Our commands run in the tests' process: what `python -m PROGRAM` prints and returns, without the start of an interpreter, which costs more than most of them.

What libraries write past Python is seen too. A process of its own is for what belongs to a process: signals, terminals, pipes that close, limits, the imports of a first run.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any
from unittest import mock

_MAINS = {"convert": "convert.__main__", "predictors": "predictors.__main__", "runtime": "runtime.__main__"}


@dataclass(frozen=True)
class Done:
    """What a command has left: its exit status and its output."""

    returncode: int
    stdout: str
    stderr: str


def command(program: str, *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None) -> Done:
    """`python -m PROGRAM ARGUMENTS`; program: convert, predictors or runtime; env: variables besides those that there are."""
    main = importlib.import_module(_MAINS[program]).main
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        mock.patch("runtime.bindings.sparse_ffn.exit_on_abort"),  # which is for a whole process: here the tests' own
        mock.patch.dict(os.environ, env or {}),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()))),
    ):
        with _written_to("stdout", 1, out), _written_to("stderr", 2, err):
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                status = main([str(argument) for argument in arguments])
            except SystemExit as end:  # argparse's
                status = int(end.code or 0)
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)
        return Done(status, _text(out), _text(err))


def result_of(
    program: str, *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What the command prints for scripts with --json; it must end well."""
    done = command(program, *arguments, "--json", stdin=stdin, env=env)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@contextlib.contextmanager
def _written_to(name: str, descriptor: int, file: IO[bytes]) -> Iterator[None]:
    """Python's stream and the process's, both into `file`."""
    getattr(sys, name).flush()
    _flush_c()
    before = os.dup(descriptor)
    try:
        os.dup2(file.fileno(), descriptor)
        with open(descriptor, "w", encoding="utf-8", closefd=False) as stream, mock.patch.object(sys, name, stream):
            yield
    finally:
        _flush_c()
        os.dup2(before, descriptor)
        os.close(before)


def _flush_c() -> None:
    ctypes.CDLL(None).fflush(None)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8")
