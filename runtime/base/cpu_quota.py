"""How many processors' worth of time this process may use: the CPU quota of its control groups (Linux, versions 1 and
2).

A container with a quota sees all processors of its host; more threads than the quota are stopped for most of the time.
"""

from __future__ import annotations

import math
from pathlib import Path

from runtime.base.control_groups import PROC, TOP, folders, text


def cpu_quota(proc: Path = PROC, top: Path = TOP) -> float:
    """Processors' worth of time that this process may use, infinity where nothing limits it or the system does not say.

    The smallest quota of its groups and of those above them counts. proc, top: where to look instead, for tests.
    """
    return min((_quota(*found) for found in folders("cpu", proc, top)), default=math.inf)


def _quota(folder: Path, version: int) -> float:
    """Of one group: processors, infinity without a limit."""
    if version == 2:
        quota, period = ([*text(folder / "cpu.max").split(), "", ""])[:2]
    else:
        quota, period = (text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", "-1", or no such file
        return math.inf
    return int(quota) / int(period)
