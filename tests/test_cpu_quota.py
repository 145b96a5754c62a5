"""CPU quotas of control groups, as Linux shows them: versions 1 and 2, groups within groups, and what cannot be read."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

import runtime
from runtime.base import processors
from runtime.base.cpu_quota import cpu_quota
from runtime.base.processors import Threads, default_threads
from runtime.cli.running import open_noted
from runtime.options import RunOptions

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
OTHER = "33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset"
UNIFIED = "34 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
OF_DOCKER = "32 31 0:29 /docker/7f /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct"


class Machine:
    """What a process sees of its control groups, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.proc = folder, folder / "proc/self"
        self.proc.mkdir(parents=True)

    def is_in(self, groups: str, *mounts: str) -> None:
        (self.proc / "cgroup").write_text(groups)
        (self.proc / "mountinfo").write_text("\n".join(["22 27 0:21 / /proc rw - proc proc rw", *mounts, ""]))

    def limit(self, group: str, quota: object, period: object = 100_000) -> None:
        folder = self.folder / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        if group.startswith("cpu,cpuacct"):
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
        else:
            (folder / "cpu.max").write_text(f"{quota} {period}\n")

    @property
    def quota(self) -> float:
        return cpu_quota(self.proc, self.folder)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_version_2(machine: Machine) -> None:
    machine.is_in("0::/a/b\n", V2)
    assert machine.quota == math.inf
    machine.limit("a/b", "max")
    assert machine.quota == math.inf
    machine.limit("a/b", 150_000)
    assert machine.quota == 1.5
    machine.limit("a/b", 40_000, 20_000)
    assert machine.quota == 2
    machine.limit("a", 100_000)  # a group above it
    assert machine.quota == 1
    machine.limit("a/b/c", 10_000)  # below it, and beside
    machine.limit("d", 10_000)
    assert machine.quota == 1


def test_version_1(machine: Machine) -> None:
    machine.is_in("9:name=systemd:/\n4:cpu,cpuacct:/a/b\n3:cpuset:/c\n", V1, OTHER)
    machine.limit("cpu,cpuacct/a/b", -1)
    assert machine.quota == math.inf
    machine.limit("cpu,cpuacct/a/b", 250_000)
    machine.limit("cpu,cpuacct", -1)
    assert machine.quota == 2.5
    machine.limit("cpu,cpuacct/a", 50_000)
    assert machine.quota == 0.5


def test_both_versions_at_once(machine: Machine) -> None:
    machine.is_in("4:cpu,cpuacct:/a\n0::/b\n", V1, UNIFIED)
    machine.limit("cpu,cpuacct/a", 300_000)
    machine.limit("unified/b", 200_000)
    assert machine.quota == 2
    machine.limit("cpu,cpuacct/a", 100_000)
    assert machine.quota == 1


def test_containers(machine: Machine) -> None:
    """The group's path is the host's and its folder is mounted alone; or name spaces hide all that is above."""
    machine.limit("cpu,cpuacct", 200_000)
    machine.is_in("4:cpu,cpuacct:/docker/7f\n", OF_DOCKER)
    assert machine.quota == 2
    machine.limit("cpu,cpuacct/sub", 100_000)
    machine.is_in("4:cpu,cpuacct:/docker/7f/sub\n", OF_DOCKER)
    assert machine.quota == 1
    machine.is_in("4:cpu,cpuacct:/elsewhere\n", OF_DOCKER)
    assert machine.quota == 2
    machine.limit("", 300_000)
    for group in ("/", "/../x", ""):
        machine.is_in(f"0::{group}\n", V2)
        assert machine.quota == 3


def test_a_mount_with_a_space(machine: Machine) -> None:
    machine.is_in("0::/a b\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups"))
    machine.limit("my groups/a b", 100_000)
    assert machine.quota == 1


@pytest.mark.parametrize("text", ["", "x", "100000", "max max", "100000 0", "-1 100000", "\xb2 1", "1e5 100000"])
def test_what_is_no_quota_limits_nothing(machine: Machine, text: str) -> None:
    machine.is_in("0::/a\n", V2)
    machine.limit("a", 1)
    (machine.folder / "sys/fs/cgroup/a/cpu.max").write_text(text, encoding="utf-8")
    assert machine.quota == math.inf


@pytest.mark.parametrize(
    "text", ["", "\n\n", "0", "0::", "a:b:c:d\n", " - ", "1 2 3 4 5 - cgroup2\n", "1 2 3 4 5 - cgroup cgroup rw\n"]
)
def test_what_the_system_says_otherwise(machine: Machine, text: str) -> None:
    assert machine.quota == math.inf
    machine.is_in(text, text, V2)
    assert machine.quota == math.inf
    (machine.proc / "cgroup").write_bytes(b"\xff\xfe")
    (machine.proc / "mountinfo").unlink()
    assert machine.quota == math.inf


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.0, 1), (1.99, 1), (2.0, 2), (3.5, 3), (math.inf, 4)])
def test_no_more_threads_than_the_quota_unless_asked(
    monkeypatch: pytest.MonkeyPatch, quota: float, expected: int
) -> None:
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota)
    monkeypatch.setattr(processors, "physical_cores", lambda _=(): 4)
    monkeypatch.setattr(processors, "_usable", lambda: set(range(4)))
    assert default_threads() == default_threads(per_processor=True) == expected
    assert Threads.of(None, (), "normal").n == expected
    assert Threads.of(4, (), "normal").n == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_no_more_threads_than_processors_allowed() -> None:
    usual = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(usual)})
        assert default_threads() == default_threads(per_processor=True) == 1
    finally:
        os.sched_setaffinity(0, usual)


def test_too_many_threads_are_said(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("runtime.cli.running.cpu_quota", lambda: 1.5)
    for n, said in ((None, False), (1, False), (2, True)):
        with open_noted(tiny_gguf, RunOptions(threads=n, device="none")) as model:
            assert n in (None, model.threads)
        assert ("2 threads, on a CPU quota of 1.5 processors" in capsys.readouterr().err) == said


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_the_real_machine_has_some_answer(tiny_gguf: Path) -> None:
    assert cpu_quota() > 0
    with runtime.load(tiny_gguf, device="none") as model:
        assert model.threads == default_threads()
