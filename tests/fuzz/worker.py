"""Runs inputs one after the other in a forked process, watched by its parent: crashes, hangs, memory, exceptions and leftovers become failures.

Knows neither formats nor mutations. Linux only: it reads /proc.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from runtime.cli.program import run_command
from runtime.errors import printable

Files = dict[str, bytes]
HANG = 10.0  # seconds of processor time, or six times as many by the clock: the machine may be busy
ALLOWANCE = 96 << 20  # bytes of memory beside twice the input: contexts of libraries, buffers of a tiny model
_SPACE = (
    3 << 30
)  # bytes of address space beside what the process has when it begins; a runaway allocation must not take the machine
_LONGEST = 2000  # characters of an error's line
_OUTSIDE = ("/tests/fuzz/", "/lib/python", "<frozen ", "Extension modules")  # of no interest in a stack
_LAST_WORDS = ("GGML_ASSERT", "what()", "ERROR: AddressSanitizer", "runtime error:")
_STATE = struct.Struct("QQQQd")


@dataclass(frozen=True)
class Target:
    """What to feed. make: input number i, always the same; run: uses the files in a folder, returns whether it came to the end.

    `run` may raise UserError and OSError, and may write into the subfolder `out`, which must be left empty where it does.
    """

    name: str
    make: Callable[[int], Files]
    run: Callable[[Path], bool]
    share: float = 1.0  # of the time
    allowance: int = ALLOWANCE
    cache: str = "out"  # a folder of what may stay, beside `out`


def seeded(
    rng_of: Callable[[str, int], Random],
    name: str,
    make: Callable[[Random], Files],
    run: Callable[[Path], bool],
    share: float = 1.0,
) -> Target:
    """A target whose inputs are made by chance; rng_of: the source of it, by target and number of the input."""
    return Target(name, lambda index: make(rng_of(name, index)), run, share)


@dataclass(frozen=True)
class Failure:
    """What went wrong with input `index`. kind: tells faults from each other; report: for people."""

    target: str
    index: int
    kind: str
    report: str


@dataclass
class Counts:
    """Inputs of a target: all, those that came to the end, those that were refused."""

    inputs: int = 0
    reached: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class Failed(Exception):  # noqa: N818
    """An input must not do this."""


# --- in the worker ----------------------------------------------------------------------------------------------------


@functools.cache
def _proc(name: str, _pid: int) -> int:
    """One of this process's files in /proc, kept open."""
    return os.open(f"/proc/self/{name}", os.O_WRONLY if name == "clear_refs" else os.O_RDONLY)


def status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    text = os.pread(_proc("status", os.getpid()), 4096, 0)
    return int(text.partition(name.encode() + b":")[2].split(None, 1)[0]) << 10


def reset_peak() -> None:
    """Count VmHWM, the largest memory so far, anew from here."""
    os.write(_proc("clear_refs", os.getpid()), b"5")


def write(folder: Path, files: Files) -> None:
    """Put the files into a folder that is otherwise empty."""
    folder.mkdir(exist_ok=True)
    for entry in os.scandir(folder):
        shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)  # noqa: PTH108
    os.mkdir(folder / "out")  # noqa: PTH102
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _left(folder: Path, files: Files) -> list[str]:
    """Files that are there besides the input's."""
    found = [os.path.relpath(Path(at) / name, folder) for at, _, names in os.walk(folder) for name in names]
    return sorted(set(found) - set(files))


def attempt(target: Target, files: Files, folder: Path) -> bool:
    """Run one input; whether it came to the end. Raises whatever is a failure."""
    write(folder, files)
    size = sum(map(len, files.values()))
    reset_peak()
    start = status("VmHWM")
    reached = _guarded(target, folder)
    grown = status("VmHWM") - start
    if grown > 2 * size + target.allowance:
        raise Failed(f"memory: {grown >> 20} MiB more for an input of {size} bytes")
    left = _left(folder, files)
    refused = not reached and any(name.startswith("out/") for name in left)
    if refused or any(not name.startswith(("out/", target.cache)) or "partial" in name for name in left):
        raise Failed(f"left behind: {left}")
    return reached


def _guarded(target: Target, folder: Path) -> bool:
    """Run as a command line does: what it reports must be one line, and shown without harm."""
    reached: list[bool] = []
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = run_command(lambda: reached.append(target.run(folder)))
    if code == 0:
        return reached[0]
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("note: ")]
    kinds = [line.partition(": ")[0] for line in lines]
    if code != 1 or kinds not in (["error"], ["error", "hint"]):
        raise Failed(f"not one error line (status {code}): {lines}")
    if bad := [line for line in lines if len(line) > _LONGEST or printable(line) != line]:
        raise Failed(f"an error that is no plain line: {bad[0][:300]!r} ({len(bad[0])} characters)")
    return False


def _signature(error: BaseException) -> str:
    """Kind of an exception and where in the project it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if not any(part in f.filename for part in _OUTSIDE)] or list(frames)
    text = "" if not isinstance(error, Failed) else str(error).partition(":")[0]
    return (
        f"{type(error).__name__} {text} {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        if ours
        else type(error).__name__
    )


def work(
    target: Target, indices: Iterator[int], folder: Path, state: mmap.mmap, results: int, until: float, limited: bool
) -> None:
    """Run inputs until a time; tells in `state` where it is, and failures as JSON lines into `results`."""
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 2)  # what a crash says, and whatever libraries print
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # ggml would start a debugger
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limited:
        space = status("VmSize") + _SPACE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    _, inputs, reached, refused, _ = _STATE.unpack(state[: _STATE.size])
    for index in indices:
        if time.monotonic() > until:
            break
        files = target.make(index)
        state[: _STATE.size] = _STATE.pack(index, inputs, reached, refused, time.monotonic())
        try:
            came = attempt(target, files, folder)
            reached, refused = reached + came, refused + (not came)
        except BaseException as error:
            found = {"index": index, "kind": _signature(error), "report": traceback.format_exc()[-6000:]}
            os.write(results, json.dumps(found).encode() + b"\n")
        inputs += 1
        os.ftruncate(log, 0)
    state[: _STATE.size] = _STATE.pack(0, inputs, reached, refused, 0.0)


# --- in the parent ----------------------------------------------------------------------------------------------------


class Worker:
    """One process and what it shares with its parent."""

    def __init__(
        self, target: Target, first: int, step: int, stop: int | None, folder: Path, until: float, limited: bool
    ) -> None:
        self.target, self.first, self.step, self.stop = target, first, step, stop
        self.folder, self.until, self.limited = folder, until, limited
        folder.parent.mkdir(exist_ok=True)  # of its own: what lies beside the input is looked at, too
        self.state = mmap.mmap(-1, mmap.PAGESIZE)
        self.log = folder.with_suffix(".log")
        self.counts = Counts()
        self._open(first)

    def _open(self, first: int) -> None:
        read, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(read)
                stop = self.stop if self.stop is not None else 1 << 62
                work(
                    self.target,
                    iter(range(first, stop, self.step)),
                    self.folder,
                    self.state,
                    write_end,
                    self.until,
                    self.limited,
                )
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(70)
        os.close(write_end)
        os.set_blocking(read, False)
        self._results, self._rest = read, b""

    def _now(self) -> tuple[int, int, int, int, float]:
        return _STATE.unpack(self.state[: _STATE.size])  # type: ignore[return-value]

    def _cpu(self) -> float:
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as file:  # noqa: PTH123
            fields = file.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._results, 1 << 16):
                self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            found = json.loads(line)
            self.counts.failures.append(Failure(self.target.name, found["index"], found["kind"], found["report"]))

    def poll(self, seen: dict[int, tuple[int, float]]) -> bool:
        """Look after the process; whether it goes on. seen: by pid, the input it was at and its processor time then."""
        self._read()
        pid, code = os.waitpid(self.pid, os.WNOHANG)
        index, *_, since = self._now()
        if not pid:
            at, cpu = seen.setdefault(self.pid, (index, self._cpu()))
            if at != index:
                seen[self.pid] = (index, self._cpu())
            elif since and (self._cpu() - cpu > HANG or time.monotonic() - since > 6 * HANG):
                return self._stop_hang(index, seen)
            return True
        self._read()
        os.close(self._results)
        if code == 0:
            return self._finish()
        name = signal.Signals(code & 127).name if code & 127 else f"exit {code >> 8}"
        return self._restart(index, name)

    def _stop_hang(self, index: int, seen: dict[int, tuple[int, float]]) -> bool:
        os.kill(self.pid, signal.SIGUSR1)  # faulthandler says where it is
        time.sleep(0.5)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._read()
        os.close(self._results)
        del seen[self.pid]
        at, *_, since = self._now()
        if at == index and since:
            return self._restart(index, "hang")
        if not since:  # it came to its end in the meantime: the input had been slow, or this process was
            return self._finish()
        self._open(at)  # it went on; the one that it was at is run again
        return True

    def _restart(self, index: int, what: str) -> bool:
        report = self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""
        lines = [line.strip() for line in report.splitlines() if not any(part in line for part in _OUTSIDE)]
        frame = next((line for line in lines if line.startswith("File")), "")
        says = next((line.rpartition("/")[2] for line in lines if any(word in line for word in _LAST_WORDS)), "")
        self.counts.failures.append(Failure(self.target.name, index, f"{what} {says or frame}", "\n".join(lines)))
        _, inputs, reached, refused, _ = self._now()
        self.state[: _STATE.size] = _STATE.pack(0, inputs + 1, reached, refused, 0.0)
        if time.monotonic() > self.until or (self.stop is not None and index + self.step >= self.stop):
            return self._finish()
        self._open(index + self.step)
        return True

    def _finish(self) -> bool:
        _, self.counts.inputs, self.counts.reached, self.counts.refused, _ = self._now()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        return False


def run(
    target: Target,
    seconds: float,
    jobs: int,
    folder: Path,
    first: int = 0,
    stop: int | None = None,
    limited: bool = True,
) -> Counts:
    """Feed a target for some seconds, or with the inputs first .. stop - 1, in `jobs` processes."""
    started, seen = time.monotonic(), {}
    workers = [
        Worker(target, first + j, jobs, stop, folder / f"{target.name}-{j}" / "input", started + seconds, limited)
        for j in range(jobs)
    ]
    running = list(workers)
    while running:
        time.sleep(0.02 if stop is not None else 0.1)
        running = [w for w in running if w.poll(seen)]
    total = Counts(seconds=time.monotonic() - started)
    for w in workers:
        total.inputs += w.counts.inputs
        total.reached += w.counts.reached
        total.refused += w.counts.refused
        total.failures += w.counts.failures
    return total
