"""The control groups (Linux, versions 1 and 2) that limit this process: where the kernel shows their files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")
TOP = Path("/")


@dataclass(frozen=True)
class _Mount:
    """Where a hierarchy of control groups is to be seen. root: the group that is at `point`."""

    root: PurePosixPath
    point: Path
    version: int


def folders(controller: str, proc: Path = PROC, top: Path = TOP) -> Iterator[tuple[Path, int]]:
    """The folders of this process's groups and of those above them, each with its version.

    controller: "cpu" or "memory"; in version 1 each has a hierarchy of its own. proc, top: where to look instead, for
    tests.
    """
    paths = _groups(text(proc / "cgroup"), controller)
    for mount in _mounts(text(proc / "mountinfo"), top, controller):
        if mount.version in paths:
            for folder in _folders(mount, paths[mount.version]):
                yield folder, mount.version


def text(path: Path) -> str:
    """What a file holds, "" where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _groups(lines: str, controller: str) -> dict[int, PurePosixPath]:
    """This process's group by version, from lines such as `0::/a` (version 2) and `4:cpu,cpuacct:/a` (version 1)."""
    found = {}
    for line in lines.splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            found[2] = PurePosixPath(path)
        elif controller in controllers.split(","):
            found[1] = PurePosixPath(path)
    return found


def _mounts(lines: str, top: Path, controller: str) -> Iterator[_Mount]:
    """From lines such as `31 23 0:28 /root /point options - cgroup cgroup rw,cpu`."""
    for line in lines.splitlines():
        fields, _, system = (part.split() for part in line.partition(" - "))
        if len(fields) < 5 or len(system) < 2:
            continue
        kind, options = system[0], system[-1].split(",")
        version = {"cgroup2": 2, "cgroup": int(controller in options)}.get(kind, 0)
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
