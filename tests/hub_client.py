"""Our commands run as a user runs them, with a Hub on this machine (tests/hub_server.py) and a cache of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hub_server import Hub

ROOT = Path(__file__).parent.parent
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Done:
    """What a command has left: its exit status and its output."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def out(self) -> str:
        """What a command that worked has printed."""
        assert self.returncode == 0, self.stderr
        return self.stdout

    @property
    def complaint(self) -> str:
        """The last two lines of a command that failed, its error and the hint; it printed nothing on stdout."""
        error, hint = self.stderr.splitlines()[-2:]
        assert (self.returncode, self.stdout) == (1, "")
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        return f"{error}\n{hint}"


@dataclass(frozen=True)
class Client:
    """Runs `python -m COMMAND`; keyword arguments are environment variables."""

    hub: Hub
    home: Path

    def __call__(self, *command: str | Path, cwd: Path = ROOT, **env: str) -> Done:
        """One command in a process of its own."""
        return self._run([sys.executable, "-m", *map(str, command)], cwd, env)

    def many(self, *commands: Command, cwd: Path = ROOT, stdin: str = "", **env: str) -> list[Done]:
        """Several commands in one process, for its start costs more than most of them."""
        lists = [[str(word) for word in command] for command in commands]
        done = self._run([sys.executable, __file__, json.dumps([lists, stdin])], cwd, env)
        return [Done(*found) for found in json.loads(done.out.splitlines()[-1])]

    def environment(self, **env: str) -> dict[str, str]:
        """What makes huggingface_hub use this Hub and this cache, and nothing of the user's own."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        return {**inherited, "PYTHONPATH": str(ROOT), **settings, **env}

    def _run(self, arguments: list[str], cwd: Path, env: dict[str, str]) -> Done:
        variables = self.environment(**env)
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=cwd, env=variables)
        return Done(done.returncode, done.stdout, done.stderr)


def _main(commands: list[list[str]], stdin: str) -> list[tuple[int, str, str]]:
    from convert.__main__ import main as convert
    from predictors.__main__ import main as predictors
    from runtime.__main__ import main as runtime

    mains = {"convert": convert, "predictors": predictors, "runtime": runtime}
    done = []
    for verb, *arguments in commands:
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = mains[verb](arguments)
        done.append((status, out.getvalue(), err.getvalue()))
    return done


if __name__ == "__main__":
    print(json.dumps(_main(*json.loads(sys.argv[1]))))
