"""How many processors' worth of time this process may use: the CPU quota of its control groups (Linux, versions 1 and
2).

A container with a quota sees all processors of its host; more threads than the quota are stopped for most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups is to be seen. root: the group that is at `point`."""

    root: PurePosixPath
    point: Path
    version: int


def cpu_quota(proc: Path = _PROC, top: Path = Path("/")) -> float:
    """Processors' worth of time that this process may use, infinity where nothing limits it or the system does not say.

    The smallest quota of its groups and of those above them counts. proc, top: where to look instead, for tests.
    """
    paths = _groups(_text(proc / "cgroup"))
    folders = (
        (folder, mount.version)
        for mount in _mounts(_text(proc / "mountinfo"), top)
        if mount.version in paths
        for folder in _folders(mount, paths[mount.version])
    )
    return min((_quota(*found) for found in folders), default=math.inf)


def _groups(text: str) -> dict[int, PurePosixPath]:
    """This process's group by version, from lines such as `0::/a` (version 2) and `4:cpu,cpuacct:/a` (version 1)."""
    found = {}
    for line in text.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            found[2] = PurePosixPath(path)
        elif "cpu" in controllers.split(","):
            found[1] = PurePosixPath(path)
    return found


def _mounts(text: str, top: Path) -> Iterator[_Mount]:
    """From lines such as `31 23 0:28 /root /point options - cgroup cgroup rw,cpu`."""
    for line in text.splitlines():
        fields, _, system = (part.split() for part in line.partition(" - "))
        if len(fields) < 5 or len(system) < 2:
            continue
        kind, options = system[0], system[-1].split(",")
        version = {"cgroup2": 2, "cgroup": int("cpu" in options)}.get(kind, 0)
        if version:
            yield _Mount(PurePosixPath(_plain(fields[3])), top / _plain(fields[4]).lstrip("/"), version)


def _plain(field: str) -> str:
    """The kernel writes a space as `\\040`, a backslash as `\\134`."""
    return field.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _folders(mount: _Mount, group: PurePosixPath) -> Iterator[Path]:
    """The folder of a group, and those above it up to the mount's own; only this where the group is outside of what is
    mounted.
    """
    inside = group.relative_to(mount.root).parts if group.is_relative_to(mount.root) else ()
    if ".." in inside:  # a group outside of this process's name space
        inside = ()
    for n in range(len(inside), -1, -1):
        yield mount.point.joinpath(*inside[:n])


def _quota(folder: Path, version: int) -> float:
    """Of one group: processors, infinity without a limit."""
    if version == 2:
        quota, period = ([*_text(folder / "cpu.max").split(), "", ""])[:2]
    else:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (quota.isdecimal() and period.isdecimal() and int(period)):  # "max", "-1", or no such file
        return math.inf
    return int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
