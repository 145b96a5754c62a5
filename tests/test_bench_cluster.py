"""What `bench.cluster` calculates: a pipeline played through step by step takes as long."""

from __future__ import annotations

import pytest

from bench.cluster import large
from bench.pipeline import NETWORKS, Line, best, round_seconds


def played(work: Line, n_stages: int, sizes: list[int], hop: float) -> float:
    """When the last group is back, where a stage does one work after the other and each waits for the stage before."""
    free = [0.0] * n_stages
    back = 0.0
    for size in sizes:
        ready = 0.0
        for stage in range(n_stages):
            began = max(ready, free[stage])
            free[stage] = began + work(size)
            ready = free[stage] + hop
        back = max(back, ready)
    return back


@pytest.mark.parametrize("n_stages", [1, 2, 3, 7])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_rounds_are_as_long_as_played(n_stages: int, groups: int) -> None:
    work = Line(0.5, 0.25)
    wanted = played(work, n_stages, [8 // groups] * groups, 0.01)
    assert round_seconds(work, n_stages, 8, groups, 0.01) == pytest.approx(wanted)
    assert best(work, n_stages, 8, 0.01)[0] >= 8 / wanted * (1 - 1e-12)


def test_lines() -> None:
    assert Line.through({1: 3.0, 2: 5.0, 4: 9.0}) == Line(pytest.approx(1.0), pytest.approx(2.0))
    assert Line.through({1: 3.0, 4: 2.0}) == Line(2.5, 0.0)  # noise: never a negative part
    assert Line.through({2: 1.0, 4: 3.0}) == Line(pytest.approx(0.0), pytest.approx(2 / 3))
    assert Line.through({1: 2.0}) == Line(2.0, 0.0)


def test_no_machine_makes_one_sequence_faster() -> None:
    for row in large(0.2):
        alone = next(r for r in large(0.2) if (r["model"], r["network"]) == (row["model"], row["network"]))
        assert row["1"] <= alone["1"]
        assert row["64"] >= row["16"] >= row["1"]
    assert len({network.name for network in NETWORKS}) == 3
