"""Where computing threads run: options are checked, applied, and change no result."""

from __future__ import annotations

import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.base.processors import Threads, chosen_cpus, parse_cpus, physical_cores
from runtime.base.worker import on_worker
from runtime.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks the system for a thread's processors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), ("0-3,6", (0, 1, 2, 3, 6)), ("5,1-2", (1, 2, 5)), (" 0 - 1, 3", (0, 1, 3)), ("510-511", (510, 511))],
)
def test_lists_of_processors(text: str, expected: tuple[int, ...]) -> None:
    assert parse_cpus(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "a", "1-", "-1", "3-1", "0-512", "0,,1", "0,", "1_0", "٣", "1.5", "0-30000000", f"0-{9 * 10**4000}", "0-1-2"],
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError):
        parse_cpus(text)


def test_a_long_range_is_refused_before_it_is_made() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            parse_cpus("0-30000000,5-40000000")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_processors_from_python() -> None:
    assert chosen_cpus("0-1") == chosen_cpus([0, 1]) == chosen_cpus(range(2)) == chosen_cpus(np.arange(2)) == (0, 1)
    assert chosen_cpus(()) == chosen_cpus("") == ()
    for cpus in ("x", 3, None, [0.5], [-1], [512], ["0"], [True], range(10**12)):
        with pytest.raises(UserError, match=r"^cpus"):
            chosen_cpus(cpus)  # type: ignore[arg-type]


def test_what_the_machine_does_not_have() -> None:
    with pytest.raises(UserError, match="processor 511"):
        Threads.of(None, (0, 511), "normal")
    with pytest.raises(UserError, match="threads is 513"):
        Threads.of(513, (), "normal")
    with pytest.raises(UserError, match="priority `urgent`"):
        Threads.of(1, (), "urgent")


def test_default_is_a_thread_per_core() -> None:
    assert Threads.of(None, (), "normal").n == physical_cores() >= 1
    assert Threads.of(None, (0,), "normal").n == 1


@linux
def test_a_refused_priority_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.raises(UserError, match="priority `high`: Operation not permitted"):
        Threads.of(1, (), "high")


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_keep_to_their_processors(tiny_gguf: Path, threads: int) -> None:
    ids = list(range(20, 40))
    everywhere = os.sched_getaffinity(0)
    with runtime.load(tiny_gguf, threads=threads, n_ctx=64) as model:
        expected = model.logits(ids)
    try:
        with runtime.load(tiny_gguf, threads=threads, n_ctx=64, cpus=[0], priority="low") as model:
            model.logits(ids)
            assert np.array_equal(model.logits(ids), expected)
            assert on_worker(lambda: os.sched_getaffinity(0)) == {0}
            assert on_worker(lambda: os.sched_getscheduler(0)) == os.SCHED_BATCH
    finally:
        on_worker(lambda: os.sched_setaffinity(0, everywhere))
        on_worker(lambda: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)))
    assert os.sched_getaffinity(0) == everywhere
