"""How much main memory this process can still take without any being swapped out: what the system has available, and
what the limits of its control groups leave (Linux, versions 1 and 2).
"""

from __future__ import annotations

import math
from pathlib import Path

from runtime.base.control_groups import PROC, TOP, folders, text

# By version: the limit, what is used of it, and the files' pages in it, which can be dropped.
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    2: ("memory.max", "memory.current", ("active_file", "inactive_file")),
}


def memory_left(proc: Path = PROC, top: Path = TOP) -> float:
    """Bytes, infinity where nothing limits it or the system does not say. Pages of files, which can be read again,
    count as left.

    proc, top: where to look instead, for tests.
    """
    return min([_available(top), *(_within(*found) for found in folders("memory", proc, top))])


def _available(top: Path) -> float:
    kilobytes = _fields(text(top / "proc/meminfo")).get("MemAvailable:")
    return math.inf if kilobytes is None else 1024 * kilobytes


def _within(folder: Path, version: int) -> float:
    """What one group's limit leaves, infinity without a limit."""
    limit_file, used_file, droppable = _FILES[version]
    limit, used = (text(folder / name).strip() for name in (limit_file, used_file))
    if not (limit.isdecimal() and used.isdecimal()):  # "max", or no such file
        return math.inf
    pages = _fields(text(folder / "memory.stat"))
    return max(0, int(limit) - int(used) + sum(pages.get(name, 0) for name in droppable))


def _fields(lines: str) -> dict[str, int]:
    """From lines such as `MemAvailable: 123 kB` and `active_file 123`."""
    words = (line.split() for line in lines.splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdecimal()}
