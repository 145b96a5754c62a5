"""An FFN of which each token scans some ranges of rows only, against float64 numpy; what experts of a mixture are to the operators."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ffn_harness import Array, Ffn, Ranges, as_rounded, make, reference, relative_error, run_native, structure
from predictor_harness import native_candidates
from test_kernels import TYPES, bound, unsure

from predictors.matrices import plain
from runtime.bindings import sparse_ffn

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

N_EMBD, N_FF = 256, 352


def some_ranges(n_tokens: int, k: int, rng: np.random.Generator, n_ff: int = N_FF) -> Ranges:
    """A table of ranges of unequal lengths with gaps between them, and k of them, in any order, for each token."""
    cuts = np.sort(rng.choice(np.arange(n_ff + 1), 2 * (k + 3), replace=False))
    table = cuts.reshape(-1, 2)
    chosen = np.stack([rng.permutation(len(table))[:k] for _ in range(n_tokens)])
    return Ranges(table, chosen, rng.uniform(0.05, 1.5, chosen.shape).astype(np.float32))


def check(ffn: Ffn, x: Array, threads: int, ranges: Ranges) -> None:
    expected, fires = reference(ffn, as_rounded(x, ffn.type_name), ranges)
    found, counted = run_native(ffn, x, threads, ranges=ranges)
    assert relative_error(found, expected) <= bound(ffn.type_name)
    assert np.array_equal(counted.gates, (~np.isnan(ranges.per_row(ffn.s.feed_forward_length))).sum(1))
    assert abs(counted.fired.sum() - fires.sum()) <= 1 + 0.005 * fires.size * unsure(ffn.type_name)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("type_name", TYPES)
def test_random_ranges(type_name: str, n_tokens: int, gated: bool) -> None:
    rng = np.random.default_rng(1)
    ffn = make(structure(N_EMBD, N_FF, gated, "relu", bias=True), type_name, 0.3, rng)
    x = rng.normal(0, 1, (n_tokens, N_EMBD)).astype(np.float32)
    check(ffn, x, 2, some_ranges(n_tokens, 4, rng))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("n_tokens", [1, 2, 16, 40, 100])
@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu"])
def test_threads_and_batches(activation: str, n_tokens: int, threads: int) -> None:
    """With the sum of squares, which the weights go into as well."""
    rng = np.random.default_rng(2)
    ffn = make(structure(N_EMBD, N_FF, True, activation, bias=True, sub_norm=True), "f32", 0.4, rng)
    x = rng.normal(0, 1, (n_tokens, N_EMBD)).astype(np.float32)
    check(ffn, x, threads, some_ranges(n_tokens, 3, rng))


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("type_name", ["f32", "q4_0", "q4_K"])
def test_one_range_of_all_rows_is_the_same_bits(type_name: str, n_tokens: int) -> None:
    rng = np.random.default_rng(3)
    ffn = make(structure(N_EMBD, N_FF, True, "relu2", bias=True), type_name, 0.3, rng)
    x = rng.normal(0, 1, (n_tokens, N_EMBD)).astype(np.float32)
    whole = Ranges(np.array([[0, N_FF]]), np.zeros((n_tokens, 1), int), np.ones((n_tokens, 1)))
    assert np.array_equal(run_native(ffn, x, 2, ranges=whole)[0], run_native(ffn, x, 2)[0])


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_an_index_outside_of_the_table_is_no_range(n_tokens: int) -> None:
    rng = np.random.default_rng(4)
    ffn = make(structure(N_EMBD, N_FF, True, "relu", bias=True), "f32", 0.3, rng)
    x = rng.normal(0, 1, (n_tokens, N_EMBD)).astype(np.float32)
    ranges = some_ranges(n_tokens, 3, rng)
    ranges.chosen[:, 1], ranges.chosen[-1, 2] = -1, 2**31 - 1
    check(ffn, x, 2, ranges)
    nowhere = replace(ranges, chosen=np.full_like(ranges.chosen, -1))
    without_rows = replace(ranges, table=ranges.table[:, :1].repeat(2, 1))
    for nothing in (nowhere, without_rows):
        found, counted = run_native(ffn, x, 2, ranges=nothing)
        assert not found.any()
        assert not counted.fired.any()


@pytest.mark.parametrize("n_tokens", [1, 20])
def test_ranges_that_overlap_stay_within_the_memory(n_tokens: int) -> None:
    """What they give is not defined; under the sanitizer nothing else may be written."""
    rng = np.random.default_rng(5)
    ffn = make(structure(64, 70, True, "relu", bias=True), "f32", 1, rng)
    ranges = Ranges(
        np.array([[0, 70], [0, 40], [20, 70]]), np.tile([1, 2, 1, 0, 2], (n_tokens, 1)), np.ones((n_tokens, 5))
    )
    found, counted = run_native(ffn, rng.normal(0, 1, (n_tokens, 64)), 3, ranges=ranges)
    assert np.isfinite(found).all()
    assert (counted.fired <= 70 * 5).all()


@pytest.mark.parametrize("wrong", [[], [[-1, 3]], [[4, 3]], [[0, 3], [2, 353]]])
def test_a_wrong_table_is_refused(wrong: list[list[int]]) -> None:
    ffn = sparse_ffn.describe(structure(N_EMBD, N_FF, True, "relu").blocks[0].ffn, (0, 0, 0), 1)
    with pytest.raises(ValueError, match="ranges of 352 rows"):
        sparse_ffn.divide(ffn, wrong)


@pytest.mark.parametrize("n_tokens", [1, 9])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_predictor_scores_the_chosen_ranges_only(n_tokens: int, threads: int) -> None:
    """Candidates are those with a positive score among the rows that a token scans."""
    rng = np.random.default_rng(6)
    n_embd, n_ff = 128, 100
    rows, bias = rng.normal(size=(n_ff, n_embd)).astype(np.float32), rng.normal(size=n_ff).astype(np.float32)
    x = rng.normal(size=(n_tokens, n_embd)).astype(np.float32)
    ranges = some_ranges(n_tokens, 3, rng, n_ff)
    found = native_candidates("lowrank", (plain("predictor_out.weight", "f32", rows),), bias, x, threads, ranges)
    scores = x.astype(np.float64) @ rows.T.astype(np.float64) + bias
    assert np.array_equal(found, (scores > 0) & ~np.isnan(ranges.per_row(n_ff)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("type_name", ["f32", "q4_0", "q4_K"])
def test_few_tokens_have_the_same_bits_as_each_alone(type_name: str, threads: int) -> None:
    rng = np.random.default_rng(7)
    ffn = make(structure(N_EMBD, N_FF, True, "relu2", bias=True), type_name, 0.3, rng)
    x = rng.normal(0, 1, (16, N_EMBD)).astype(np.float32)
    ranges = some_ranges(16, 4, rng)
    together = run_native(ffn, x, threads, ranges=ranges)[0]
    for t in range(16):
        own = replace(ranges, chosen=ranges.chosen[t : t + 1], weights=ranges.weights[t : t + 1])
        assert np.array_equal(run_native(ffn, x[t : t + 1], threads, ranges=own)[0][0], together[t])
