"""A contender in a process of its own that waits for its turn: requests and replies are lines of JSON over pipes.

`ContenderProcess` is the near end. The far end is this module run as a program; between requests it sleeps in a read,
so that it takes no time from the others.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from bench import short_memory
from bench.contenders import LLAMA_CPP, Spec, make, timed_decode, timed_open, timed_prompt
from bench.resident_memory import DenseProduct, resident
from runtime.base.closing import Closing
from runtime.bindings.logs import silence
from runtime.bindings.waiting import unsettled
from runtime.errors import UserError
from runtime.hybrid.devices import find

BANDWIDTH = "bandwidth"


class ContenderProcess(Closing):
    """The near end of one contender (or of the yardstick BANDWIDTH); use it in a `with` statement.

    Every request raises UserError or RuntimeError where the far end failed.
    """

    def __init__(self, spec: Spec) -> None:
        self.kind = spec.kind
        command = [sys.executable, "-m", "bench.contender_process", json.dumps(asdict(spec))]
        folder = str(Path(__file__).parent.parent)
        environment = {
            **unsettled(),
            "PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send one request and wait for its reply."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of `{self.kind}` died with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"], reply["hint"])
        return reply["result"]

    def open(self, ids: Sequence[int]) -> dict[str, float]:
        """Load the model and answer to a prompt: `load_s` and `first_token_s`."""
        return dict(self.ask("open", ids=list(ids)))

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()

    def close(self) -> None:
        """End the process when it has done what it was asked for."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.close()
            self._process.wait(timeout=60)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class _FarEnd:
    """The far end of a contender: its requests as methods."""

    def __init__(self, spec: Spec) -> None:
        self._contender, self._device = (short_memory.make if spec.ram_budget else make)(spec), spec.device
        self._opened = False
        self._free = self._free_bytes()

    def open(self, ids: list[int]) -> dict[str, float]:
        self.close()
        self._opened = True
        return timed_open(self._contender, ids)

    def prompt(self, ids: list[int]) -> float:
        return timed_prompt(self._contender, ids)

    def decode(
        self, prompt: list[int], ids: list[int], warm_up: Sequence[int] = (), limit_s: float = math.inf
    ) -> dict[str, Any]:
        tokens, seconds = timed_decode(self._contender, prompt, ids, warm_up, limit_s)
        return {"tokens": tokens, "seconds": seconds, **self._contender.facts()}

    def memory(self) -> dict[str, int]:
        return resident()

    def on_device(self) -> dict[str, Any]:
        """What the contender has on the device, and by how much the memory that the driver says is free has shrunk."""
        return {**self._contender.on_device(), "driver_bytes": self._free - self._free_bytes()}

    def _free_bytes(self) -> int:
        return sum(device.memory_free for device in find((self._device,)))

    def close(self) -> None:
        if self._opened:
            self._contender.close()
        self._opened = False


class _Yardstick:
    """The far end of the bandwidth measurement."""

    def __init__(self, threads: int) -> None:
        self._product = DenseProduct(threads)

    def measure(self) -> float:
        return self._product.bandwidth()

    def close(self) -> None:
        self._product.close()


def _serve(target: Any, replies: Callable[[str], object]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(target, request.pop("do"))(**request)}
        except UserError as error:
            reply = {"error": error.message, "hint": error.hint}
        replies(json.dumps(reply) + "\n")
    target.close()


def _main(description: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the race, which then ends its contenders
    # Libraries that print must not print into the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = Spec(**json.loads(description))
    if spec.kind == LLAMA_CPP:
        import_module("llama_cpp")  # before our libraries are opened: its threads wait as they do by themselves
    silence()
    target = _Yardstick(spec.threads) if spec.kind == BANDWIDTH else _FarEnd(spec)
    _serve(target, replies.write)


if __name__ == "__main__":
    _main(*sys.argv[1:])
