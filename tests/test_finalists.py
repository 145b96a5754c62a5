"""Candidates judged on some neurons first, and the decomposition that those of `lowrank` come from."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from predictor_harness import Array, made_up_layer

from predictors import lowrank, mlp, signbit
from predictors.calibrate import LayerSamples
from predictors.choose_candidate import Cost, judge, sketch
from predictors.finalists import FEWEST, covering, finalists, spread
from predictors.margins import measure, measure_some
from predictors.matrices import matrix
from predictors.predictor import FitOptions, Proposal
from runtime.bindings.ffn_shape import Experts, FfnShape

AUTO = FitOptions(("q4_0", "q8_0"))
COST = Cost(144, 288, FEWEST)


def wide_layer(rank: int, n_tokens: int = 400) -> LayerSamples:
    rng = np.random.default_rng(rank)
    gate = rng.normal(size=(FEWEST, rank)) @ rng.normal(size=(rank, 256)) / np.sqrt(rank)
    gate += 0.1 * rng.normal(size=gate.shape)
    return made_up_layer(gate, -1.3 * np.linalg.norm(gate, axis=1), n_tokens, rng)


def eigenvectors(gram: Array, covariance: Array, n: int) -> Array:
    """The rows that `lowrank.leading` is to find, by a whole decomposition."""
    lower = np.linalg.cholesky(covariance)
    values, vectors = np.linalg.eigh(lower.T @ gram @ lower)
    scale = np.sqrt(np.maximum(values[::-1][:n], 0))
    return np.asarray(np.linalg.solve(lower.T, vectors[:, ::-1][:, :n]).T * scale[:, None])


def left_over(gram: Array, covariance: Array, rows: Array) -> float:
    """The share of the pre-activations' variance that the best linear function of these rows' products misses."""
    spread = covariance @ rows.T
    moments = rows @ spread
    moments += 1e-9 * np.trace(moments) / len(moments) * np.eye(len(moments))
    whole = np.trace(gram @ covariance)
    return float((whole - np.trace(np.linalg.solve(moments, spread.T @ gram @ spread))) / whole)


@pytest.mark.parametrize(("inputs", "rows"), [(0.0, 0.0), (0.5, 0.5), (2.0, 1.0)])
def test_leading_directions(inputs: float, rows: float) -> None:
    """Flat spectra, falling ones and steep ones: what is missed is within one percent of the least that can be."""
    rng, d = np.random.default_rng(0), 320
    turned = [np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(2)]
    at = np.arange(1.0, d + 1)
    covariance = (turned[0] * at**-inputs) @ turned[0].T
    covariance += 1e-2 * np.trace(covariance) / d * np.eye(d)
    gram = (turned[1] * at**-rows) @ turned[1].T
    found = lowrank.leading(np.float32(gram), np.float32(covariance), 128)
    best = eigenvectors(gram, covariance, 128)
    for r in (16, 64, 128):
        assert left_over(gram, covariance, found[:r]) <= 1.01 * left_over(gram, covariance, best[:r]) + 1e-6


def test_fewer_directions_than_asked_for() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 256))
    gram, covariance = np.float32(rows.T @ rows), np.eye(256, dtype=np.float32)
    found = lowrank.leading(gram, covariance, 96)
    assert found.shape == (96, 256) and np.isfinite(found).all()
    assert left_over(gram, covariance, found[:20]) < 1e-5
    assert (np.abs(found[20:]).max(1) < 1e-2 * np.abs(found[:20]).max()).all()


@pytest.mark.parametrize("kind", ["lowrank", "signbit", "mlp"])
def test_candidates_of_some_neurons_have_the_rows_of_all(kind: str) -> None:
    layer, neurons = wide_layer(40), np.array([3, 700, 701, 2047], np.int32)
    if kind == "mlp":
        rng = np.random.default_rng(2)
        inner, outer = (
            matrix(n, "q8_0", np.float32(rng.normal(size=s))) for n, s in (("i", (64, 256)), ("o", (FEWEST, 64)))
        )
        whole = mlp.Mlp((inner, outer), 64, "q8_0", (inner.floats(), outer.floats()))
        proposals = [Proposal(lambda some: mlp._some(whole, some))]
    else:
        proposals = list({"lowrank": lowrank.fit, "signbit": signbit.fit}[kind](layer, AUTO))
    for proposal in proposals:
        some, all_of_them = proposal.make(neurons), proposal.make(None)
        x = all_of_them.prepare(layer.test.x)
        assert np.allclose(some.scores(x, 0, 4), all_of_them.scores(x, 0, FEWEST)[:, neurons], rtol=1e-3, atol=1e-3)
        assert some.tensors[-1].shape[-1] == 4 and some.tensors[-1].shape[:-1] == all_of_them.tensors[-1].shape[:-1]
        assert some.tensors[-1].nbytes * FEWEST == all_of_them.tensors[-1].nbytes * 4


def test_few_rows_serve_all_columns() -> None:
    values = np.array([[1.0, 1.0, 9.0, 9.0], [1.001, 1.001, 1.001, 9.0], [9.0, 9.0, 1.0, 1.0], [8.0, 8.0, 8.0, 8.0]])
    assert covering(values) == [1, 2]
    assert covering(values[[0, 2]]) == [0, 1]


@pytest.mark.parametrize("n_ff", [2048, 2049, 11008, 14336, 16385])
def test_some_neurons_lie_evenly(n_ff: int) -> None:
    ranges = spread(FfnShape(64, n_ff, True, "relu"))
    assert all(0 <= first < end <= n_ff for first, end in ranges)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    assert n_ff / 8 - 256 <= sum(end - first for first, end in ranges) <= n_ff / 8
    assert ranges[-1][1] > n_ff * 0.75 or len(ranges) < 4


def test_some_neurons_of_each_expert() -> None:
    ranges = spread(FfnShape(64, 32 * 768, True, "relu", experts=Experts(32, 4)))
    assert {first // 768 for first, _ in ranges} == set(range(32))
    assert all(first // 768 == (end - 1) // 768 for first, end in ranges)
    assert sum(end - first for first, end in ranges) == 32 * 768 // 8


def test_finalists_lose_little() -> None:
    """At every price the best of the finalists, judged on all neurons, is about as good as the best of all."""
    layer = wide_layer(40, 1000)
    proposals = list(lowrank.fit(layer, AUTO))
    chosen = finalists(layer, proposals, COST)
    assert 0 < len(chosen) < len(proposals)
    candidates = [proposal.make(None) for proposal in proposals]
    judged = [judge(c, m, COST) for c, m in zip(candidates, measure(layer, candidates), strict=True)]
    values = np.array(
        [sketch(j.candidate, m[:2], COST, 1.0) for j, m in zip(judged, measure(layer, candidates), strict=True)]
    )
    kept = [k for k, proposal in enumerate(proposals) if proposal in chosen]
    assert (values[kept].min(0) <= 1.02 * values.min(0)).all()


def test_small_layers_are_judged_whole() -> None:
    rng = np.random.default_rng(3)
    layer = made_up_layer(rng.normal(size=(512, 256)), np.zeros(512), 50, rng)
    proposals = list(lowrank.fit(layer, AUTO))
    assert len(proposals) > 2 and finalists(layer, proposals, COST) == proposals


def test_a_sample_measures_what_all_do() -> None:
    layer = wide_layer(40)
    (proposal,) = signbit.fit(layer, AUTO)
    ranges = [(0, 64), (512, 600), (2000, 2048)]
    neurons = np.concatenate([np.arange(*r, dtype=np.int32) for r in ranges])
    ((scale, some),) = measure_some(layer, [proposal.make(neurons)], ranges)
    ((whole_scale, whole, _),) = measure(layer, [proposal.make(None)])
    assert np.allclose(scale.spread, whole_scale.spread[neurons], rtol=1e-4)
    assert np.allclose(some.fired, whole.fired[neurons], atol=1e-6)
    assert np.allclose(some.total, whole.total[neurons], rtol=1e-4)
