"""What a fit counts natively, against the same in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.bindings.counting import count_margins, moments

pytestmark = pytest.mark.native


@pytest.mark.parametrize(("n_tokens", "n"), [(1, 1), (37, 63), (200, 130)])
def test_margins(n_tokens: int, n: int) -> None:
    rng = np.random.default_rng(n)
    scores = rng.normal(0, 3, (n_tokens, n)).astype(np.float32)
    fired, energy = rng.random((n_tokens, n)) < 0.3, rng.random((n_tokens, n)).astype(np.float32)
    slope, offset = rng.random(n).astype(np.float32), rng.normal(5, 2, n).astype(np.float32)
    bins = np.clip(scores * slope + offset, 0, 9).astype(int)
    assert n == 1 or set(bins.ravel()) == set(range(10))
    predicted, hits, kept = count_margins(scores, fired, energy, slope, offset, 10)
    for b in range(10):
        there = bins == b
        assert np.array_equal(predicted[:, b], there.sum(0))
        assert np.array_equal(hits[:, b], (there & fired).sum(0))
        assert kept[:, b] == pytest.approx((energy * (there & fired)).sum(0, dtype=np.float64))


@pytest.mark.parametrize("n", [1, 64, 130])
def test_moments(n: int) -> None:
    rng = np.random.default_rng(n)
    s, g = (rng.normal(100, 1, (77, n)).astype(np.float32) for _ in range(2))
    exact = [x.astype(np.float64) for x in (s, g)]
    expected = [a.sum(0) for a in (exact[0], exact[1], exact[0] ** 2, exact[1] ** 2, exact[0] * exact[1])]
    assert np.allclose(moments(s, g), expected, rtol=1e-12)
