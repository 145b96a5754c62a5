"""`python -m bench.expert_placement`: each way to use a device's memory, on an instance that can be done by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.expert_placement import MIXTURES, Cost, Mixture, Speeds, by_cache, by_experts, by_neurons, routed

ROOT = Path(__file__).parent.parent
# Two experts of four neurons, of which a token uses one; a row is one byte, the two hottest neurons always fire.
TINY = Mixture(layers=1, count=2, used=1, n_ff=4, row=1.0, active=0.5)
FIRED = np.array([1.0, 1.0, 0.0, 0.0])
CHOSEN = np.array([[0], [0], [1], [0]])
WHOLE = 4 * 3  # bytes of an expert
MISSED = 4 + 2 * 2  # read of one by the CPU: all gates, and the other rows of those that fire


def test_whole_experts() -> None:
    hit, miss = Cost(WHOLE, 0), Cost(0, MISSED)
    assert list(by_experts(TINY, CHOSEN, 0.5, FIRED)) == [hit, hit, miss, hit]


def test_the_hottest_neurons() -> None:
    """Both that fire are on the device: the CPU reads two gates."""
    assert list(by_neurons(TINY, CHOSEN, 0.5, FIRED)) == [Cost(2 * 3, 2)] * 4


def test_a_cache() -> None:
    hit, miss = Cost(WHOLE, 0), Cost(0, MISSED, WHOLE)
    assert list(by_cache(TINY, CHOSEN, 0.5, FIRED)) == [miss, hit, miss, miss]
    assert list(by_cache(TINY, CHOSEN, 1.0, FIRED)) == [miss, hit, miss, hit]
    assert list(by_cache(TINY, CHOSEN, 0.0, FIRED)) == [Cost(0, MISSED)] * 4
    assert list(by_cache(TINY, CHOSEN, 1.0, FIRED, admitted=0)) == [Cost(0, MISSED)] * 4


def test_seconds() -> None:
    """Both sides at once; a copy takes its time on the link, and of main memory."""
    speeds = Speeds(device=4.0, cpu=2.0, link=1.0)
    assert Cost(8, 2).seconds(speeds) == 2
    assert Cost(4, 6).seconds(speeds) == 3
    assert Cost(4, 6, 2).seconds(speeds) == 4
    assert Cost(0, 1, 5).seconds(speeds) == 5


def test_choices() -> None:
    """Distinct experts, as many as a token uses; some again; some more wanted than others."""
    m = MIXTURES["smallthinker-21b"]
    even, skewed, sticky = (routed(m, again, skew, 2000) for again, skew in ((0, 0), (0, 1.5), (0.8, 0)))
    assert all(len(set(token)) == m.used for token in skewed.tolist())
    share = [np.sort(np.bincount(c.ravel(), minlength=m.count))[-16:].sum() / c.size for c in (even, skewed)]
    assert share[0] < 0.3
    assert share[1] > 0.5
    repeated = [np.mean([len({*a} & {*b}) for a, b in pairwise(c)]) / m.used for c in (even, sticky)]
    assert repeated[0] == pytest.approx(m.used / m.count, abs=0.02)
    assert repeated[1] == pytest.approx(0.8 + 0.2 * (m.used / m.count), abs=0.03)


def test_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.expert_placement", "--shape", "smallthinker-4b"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])["ms"]["smallthinker-4b"]
    for times in found.values():
        assert times == sorted(times, reverse=True)  # more memory is never slower
