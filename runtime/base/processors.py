"""The processors of this machine: how many threads compute, on which of them, and how the system ranks these
threads.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.base.arguments import whole
from runtime.base.cpu_quota import cpu_quota
from runtime.errors import UserError

MAX_THREADS = 512
_RANGE = re.compile(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", re.ASCII)
PRIORITIES = {"low": -1, "normal": 0, "medium": 1, "high": 2, "realtime": 3}  # enum ggml_sched_priority
FIFO = {"medium": 40, "high": 80, "realtime": 90}  # what ggml asks of the system for these priorities


@dataclass(frozen=True)
class Threads:
    """Threads of one model. cpus: the processors they may use, empty for all of the process's; priority: a key of
    PRIORITIES.

    What is asked for here stays with the process's computing threads until another model asks otherwise.
    """

    n: int
    cpus: tuple[int, ...] = ()
    priority: str = "normal"

    @classmethod
    def of(cls, n: int | None, cpus: tuple[int, ...], priority: str) -> Threads:
        """Checked; n: None for `default_threads`, of `cpus` where some are named. Raises UserError for what this
        machine does not have or allow.
        """
        n = default_threads(cpus) if n is None else whole("threads", n, 1, MAX_THREADS)
        if priority not in list(PRIORITIES):  # of any type
            raise UserError(f"priority `{priority}`, expected one of {', '.join(PRIORITIES)}")
        missing = set(cpus) - _usable()
        if missing:
            raise UserError(f"processor {min(missing)}: this process may use {_listed(_usable())}")
        _check_allowed(priority)
        return cls(n, tuple(sorted(set(cpus))), priority)


def default_threads(among: Sequence[int] = (), per_processor: bool = False) -> int:
    """Threads to compute with where nobody says how many: one per physical core (or processor) that this process may
    use, of `among` if any are named.

    No more than the processors' worth of time that its CPU quota allows, rounded down; at least 1.
    """
    n = len(among or _usable()) if per_processor else physical_cores(tuple(among))
    return max(1, int(min(n, cpu_quota())))


def physical_cores(among: tuple[int, ...] = ()) -> int:
    """Cores that this process may use (of the processors `among`, if any), counting hyper-threads of one core once; at
    least 1.
    """
    return max(1, len({_siblings(cpu) for cpu in among or _usable()}))


def chosen_cpus(cpus: str | Iterable[int]) -> tuple[int, ...]:
    """Processors as `runtime.load` takes them: numbers, or a text as `parse_cpus` does. Raises UserError for anything
    else.
    """
    if isinstance(cpus, str):
        try:
            return parse_cpus(cpus) if cpus else ()
        except ValueError:
            raise UserError(f"cpus is `{cpus[:40]}`, expected processors such as 0-3,6") from None
    try:
        found = tuple(itertools.islice(cpus, MAX_THREADS + 1))
    except TypeError:
        raise UserError(f"cpus is {cpus!r}, expected a list of processors, or a text such as 0-3,6") from None
    if len(found) > MAX_THREADS:
        raise UserError(f"cpus: more than {MAX_THREADS}, expected processors of this machine")
    return tuple(whole("cpus", cpu, 0, MAX_THREADS - 1) for cpu in found)


def parse_cpus(text: str) -> tuple[int, ...]:
    """Processors from a list like `0-3,6`. Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part)
        if not found:
            raise ValueError(text)
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < MAX_THREADS:
            raise ValueError(text)
        cpus |= set(range(first, last + 1))
    return tuple(sorted(cpus))


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _listed(cpus: set[int]) -> str:
    return ", ".join(str(cpu) for cpu in sorted(cpus))


def _check_allowed(priority: str) -> None:
    """ggml only warns where the system refuses a priority: try it on a thread that ends at once."""
    if priority not in FIFO or sys.platform != "linux":
        return
    refused: list[OSError] = []

    def attempt() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO[priority]))
        except OSError as error:
            refused.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if refused:
        raise UserError(
            f"priority `{priority}`: {refused[0].strerror}", "it needs CAP_SYS_NICE; `low` and `normal` do not"
        )
