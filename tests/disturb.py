"""Commands that are killed, interrupted or refused something on their way, each in a process of its own.

The processes are forked from one that has imported everything, so that a run costs what the command itself does. What a step is: a
folder or file that is made, opened for writing, renamed, removed or given other permissions below one folder, as Python's audit events tell.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import pkgutil
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MAKING = ("open", "os.mkdir", "os.rename")
STEPS = (*MAKING, "os.remove", "os.rmdir", "os.chmod")


@dataclass(frozen=True)
class Outcome:
    """status: as a shell has it, but below zero for a signal. steps: that were taken (unless killed); seconds: that it took."""

    status: int
    steps: int
    seconds: float
    out: str
    err: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    @property
    def complaint(self) -> str:
        """The one error line of a command that has refused, without its hint."""
        lines = [line for line in self.err.splitlines() if not line.startswith("hint: ")]
        assert (self.status, len(lines)) == (1, 1), (self.status, self.err)
        assert lines[0].startswith("error: ")
        return lines[0]


class Disturber:
    """Runs `python -m COMMAND` or a function of a module, and disturbs it."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        variables = {**os.environ, **(env or {}), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=variables
        )

    def run(self, *command: object, below: Path, stdin: str = "", **how: Any) -> Outcome:
        """Run a command. below: whose steps count.

        after: seconds until it gets `send`, a signal; step: the one that gets it instead, or the error `fail`, or from which on nothing can
        be made (`full`: an error); limit: bytes that a file may have.
        """
        words = [str(word) for word in command]
        request = {"command": words, "below": str(below), "stdin": stdin, **how}
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def moments(n: int, seconds: float, seed: int) -> list[float]:
    """Random moments of a command that takes so long."""
    return [random.Random(seed + i).uniform(0, seconds) for i in range(n)]


# --- in the other process --------------------------------------------------------------------------------------------


def serve() -> None:
    import convert.__main__
    import convert.publish.push
    import predictors.__main__
    import runtime.__main__

    # What commands import is there already, so that they are disturbed at their own work.
    for package in ("runtime.commands", "convert.commands", "predictors.commands"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")

    mains = {"convert": convert.__main__.main, "predictors": predictors.__main__.main, "runtime": runtime.__main__.main}
    mains["files"] = _write_files
    for line in sys.stdin:
        print(json.dumps(_run(mains, **json.loads(line))), flush=True)


def _run(mains: Mapping[str, Any], command: list[str], below: str, stdin: str, **how: Any) -> dict[str, Any]:
    pipes = [os.pipe() for _ in range(3)]
    began = time.perf_counter()
    child = os.fork()
    if not child:
        _child(mains, command, below, stdin, [writing for _, writing in pipes], how)
    for _, writing in pipes:
        os.close(writing)
    if "after" in how:
        time.sleep(how["after"])
        os.kill(child, how["send"])
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - began
    texts = []
    for reading, _ in pipes:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as file:
            texts.append(file.read())
    out, err, steps = texts
    code = os.waitstatus_to_exitcode(status)
    return {"status": code, "steps": int(steps or -1), "seconds": seconds, "out": out, "err": err}


def _child(mains: Mapping[str, Any], command: list[str], below: str, stdin: str, pipes: list[int], how: Any) -> None:
    status = 99
    try:
        given, writing = os.pipe()
        os.write(writing, stdin.encode())
        os.close(writing)
        for descriptor, stream in ((given, 0), (pipes[0], 1), (pipes[1], 2)):
            os.dup2(descriptor, stream)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(i, "w", encoding="utf-8", closefd=False, buffering=1) for i in (1, 2))  # noqa: SIM115
        steps = _Steps(below, how)
        sys.addaudithook(steps)
        if "limit" in how:
            resource.setrlimit(resource.RLIMIT_FSIZE, (how["limit"], how["limit"]))
        status = _status(mains, command)
        steps.done = True
        os.write(pipes[2], str(steps.taken).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(mains: Mapping[str, Any], command: list[str]) -> int:
    try:
        return int(mains[command[0]](command[1:]))
    except KeyboardInterrupt:  # before the command had begun
        return 128 + signal.SIGINT
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1


def _write_files(arguments: list[str]) -> int:
    """A command that writes a model of nothing but tensors in so many files: OUT, N, and the number that all weights are."""
    import numpy as np

    from runtime.cli.program import run_command
    from runtime.model_file.shard_writer import split_model
    from runtime.model_file.writer import NewTensor, write_files

    out, n, value = Path(arguments[0]), int(arguments[1]), float(arguments[2])
    data = np.full(4, value, np.float32).view(np.uint8)
    tensors = [NewTensor(f"t{i}", (4,), 0, 16, (data,)) for i in range(n)]
    return run_command(lambda: write_files(split_model(out, {}, tensors, 16)) and None)


class _Steps:
    """An audit hook that counts steps, and disturbs one."""

    def __init__(self, below: str, how: Mapping[str, Any]) -> None:
        self.below, self.how, self.taken, self.done = os.path.realpath(below), how, 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.done or event not in STEPS or not self._counts(event, arguments):
            return
        self.taken += 1
        at = self.how.get("step")
        if at is None or self.taken < at or (self.taken > at and "full" not in self.how):
            return
        if "send" in self.how:
            os.kill(os.getpid(), self.how["send"])
        elif event in MAKING:  # a full disk can still be emptied
            number = self.how.get("fail") or self.how["full"]
            raise OSError(number, os.strerror(number), os.fsdecode(arguments[0]))

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        path = arguments[0]
        if not isinstance(path, (str, bytes, os.PathLike)) or (event == "open" and not _writes(arguments)):
            return False
        return f"{Path.cwd() / os.fsdecode(path)}{os.sep}".startswith(self.below + os.sep)


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)


@contextlib.contextmanager
def disturber(env: Mapping[str, str] | None = None) -> Iterator[Disturber]:
    found = Disturber(env)
    try:
        yield found
    finally:
        found.close()


if __name__ == "__main__":
    serve()
