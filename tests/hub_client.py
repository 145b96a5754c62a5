"""Our commands run as a user runs them, with a Hub on this machine (tests/hub_server.py) and a cache of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hub_server import Hub

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """What makes huggingface_hub use this Hub and that cache, and nothing of the user's own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return {**inherited, "PYTHONPATH": str(ROOT), **settings}


def client_of(hub: Hub, home: Path) -> Run:
    """Runs `python -m COMMAND`; keyword arguments are environment variables, but for cwd and stdin."""

    def run(*command: str | Path, cwd: Path = ROOT, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        arguments, variables = [sys.executable, "-m", *map(str, command)], {**environment(hub, home), **env}
        return subprocess.run(
            arguments, input=stdin, capture_output=True, text=True, check=False, cwd=cwd, env=variables
        )

    return run


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that worked has printed."""
    assert done.returncode == 0, done.stderr
    return done.stdout


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The last two lines of a command that failed, its error and the hint; it printed nothing else on stdout."""
    error, hint = done.stderr.splitlines()[-2:]
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return f"{error}\n{hint}"
