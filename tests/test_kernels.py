"""The native operators against float64 numpy on their own dequantised weights: types x shapes x tokens x threads x activity.

ggml rounds the activations of a dot product to the type that suits the weights (8-bit integers for quantised ones). The reference gets the activations so rounded, and then agrees to float precision.
What the rounding itself does is checked apart, where no neuron is at its threshold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from ffn_harness import Ffn, as_rounded, make, reference, relative_error, run_native, structure

from runtime.bindings import sparse_ffn
from runtime.errors import UserError

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_K",
    "q3_K",
    "q4_K",
    "q5_K",
    "q6_K",
    "iq4_nl",
    "iq4_xs",
)
TOLERANCE = 1e-5  # relative error of y; sums in float32 over a few hundred terms
# These accumulations round each coefficient to bfloat16, by at most 2**-8 of itself.
IN_BFLOAT16 = {("avx512", type_name): 2**-8 for type_name in ("q4_0", "q4_K", "q5_K", "q6_K")}
# ggml multiplies q4_1 and q5_1 rows with activations (q8_1) that carry their own sum in half precision.
SUM_IN_F16 = {(variant, type_name): 2e-3 for variant in ("portable", "neon", "i8mm") for type_name in ("q4_1", "q5_1")}
ROUNDED = {"f32": 1e-5, "f16": 1e-3, "bf16": 4e-3}  # with the activations' rounding; 1e-2 for quantised types


def dot_bound(type_name: str) -> float:
    """Of the relative error of dot products with rows of a type, for the chosen variant."""
    return SUM_IN_F16.get((sparse_ffn.VARIANTS[sparse_ffn.variant()], type_name), TOLERANCE)


def bound(type_name: str) -> float:
    """The same of an FFN's product."""
    return IN_BFLOAT16.get((sparse_ffn.VARIANTS[sparse_ffn.variant()], type_name), dot_bound(type_name))


def unsure(type_name: str) -> bool:
    """Whether a neuron near its threshold may fire here and not in the reference."""
    return dot_bound(type_name) > TOLERANCE


def check(
    type_name: str,
    n_tokens: int,
    threads: int,
    active: float,
    gated: bool = True,
    activation: str = "relu",
    threshold: float = 0.0,
    shape: tuple[int, int] = (256, 352),
) -> None:
    rng = np.random.default_rng(1)
    s = structure(*shape, gated, activation, threshold, bias=True)
    ffn = make(s, type_name, active, rng)
    x = rng.normal(0, 1, (n_tokens, s.embedding_length)).astype(np.float32)
    expected, fires = reference(ffn, as_rounded(x, type_name))
    found, counted = run_native(ffn, x, threads)
    assert relative_error(found, expected) <= bound(type_name)
    assert np.array_equal(counted.gates, [s.feed_forward_length] * n_tokens)
    assert abs(counted.fired.sum() - fires.sum()) <= 1 + 0.005 * fires.size * unsure(type_name)


@pytest.mark.parametrize("type_name", TYPES)
def test_rounding_of_activations_costs_less_than_a_percent(type_name: str) -> None:
    rng = np.random.default_rng(6)
    ffn = make(structure(256, 352, True, "relu", bias=True), type_name, 1, rng)
    x = rng.normal(0, 1, (5, 256)).astype(np.float32)
    assert relative_error(run_native(ffn, x, 2)[0], reference(ffn, x.astype(np.float64))[0]) <= ROUNDED.get(
        type_name, 1e-2
    )


@pytest.mark.parametrize("name", ["mmx", *sorted(set(sparse_ffn.VARIANTS) - set(sparse_ffn.variants()))])
def test_a_variant_that_is_unknown_or_that_this_cpu_lacks_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAZYNEURON_KERNELS", name)
    expected = f"LAZYNEURON_KERNELS is `{name}`, expected one of {', '.join(sparse_ffn.variants())} on this CPU"
    with pytest.raises(UserError) as refused:
        sparse_ffn.variant()
    assert str(refused.value).splitlines() == [expected]


@pytest.mark.parametrize("active", [0, 0.01, 0.1, 1])
@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("type_name", TYPES)
def test_types_and_activity(type_name: str, n_tokens: int, active: float) -> None:
    check(type_name, n_tokens, threads=2, active=active)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n_tokens", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("type_name", ["f32", "q4_0"])
def test_threads_and_batches(type_name: str, n_tokens: int, threads: int) -> None:
    check(type_name, n_tokens, threads, active=0.2)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("n_tokens", "threads"), [(17, 1), (33, 2), (64, 3), (100, 5)])
@pytest.mark.parametrize("type_name", ["f32", "q4_0", "q4_K"])
def test_gates_that_are_given(type_name: str, n_tokens: int, threads: int, gated: bool) -> None:
    """Of many tokens, whose gates a product of the whole matrix gave."""
    rng = np.random.default_rng(3)
    ffn = make(structure(256, 352, gated, "relu", bias=True), type_name, 0.2, rng)
    x = rng.normal(0, 1, (n_tokens, 256)).astype(np.float32)
    rounded = as_rounded(x, type_name)
    gates = rounded @ ffn.exact["gate" if gated else "up"].T
    expected, fires = reference(ffn, rounded)
    found, counted = run_native(ffn, x, threads, gates=gates)
    variant = sparse_ffn.VARIANTS[sparse_ffn.variant()]
    assert relative_error(found, expected) <= IN_BFLOAT16.get((variant, type_name), TOLERANCE)
    assert abs(counted.fired.sum() - fires.sum()) <= 1
    assert np.array_equal(counted.gates, [352] * n_tokens)


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize(
    ("gated", "activation", "threshold"),
    [
        (False, "relu", 0),
        (False, "relu2", 0),
        (True, "relu2", 0),
        (True, "drelu", 0),
        (True, "fatrelu", 0.7),
        (False, "fatrelu", 0.7),
    ],
)
def test_activations(gated: bool, activation: str, threshold: float, n_tokens: int) -> None:
    check("f32", n_tokens, 2, 0.4, gated, activation, threshold)


@pytest.mark.parametrize("shape", [(32, 1), (64, 3), (96, 1000), (4096, 64)])
@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_shapes(type_name: str, shape: tuple[int, int], n_tokens: int) -> None:
    check(type_name, n_tokens, 3, 0.5, shape=shape)


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
def test_rows_that_are_no_multiple_of_a_vector(type_name: str) -> None:
    check(type_name, 3, 2, 0.5, shape=(50, 40))


@pytest.mark.parametrize("shape", [(32, 1), (256, 352), (50, 40)])
@pytest.mark.parametrize("n_tokens", [1, 2, 33])
@pytest.mark.parametrize("activation", ["relu2", "drelu"])
def test_the_sum_of_squares(activation: str, n_tokens: int, shape: tuple[int, int]) -> None:
    """One more number per token, and the others bit for bit as without it."""
    rng = np.random.default_rng(8)
    ffn = make(structure(*shape, True, activation, bias=True, sub_norm=True), "f32", 0.4, rng)
    x = rng.normal(0, 1, (n_tokens, shape[0])).astype(np.float32)
    expected, _ = reference(ffn, x.astype(np.float64))
    found, _ = run_native(ffn, x, 3)
    assert relative_error(found[:, :-1], expected[:, :-1]) <= TOLERANCE
    np.testing.assert_allclose(found[:, -1], expected[:, -1], rtol=TOLERANCE, atol=1e-12)
    plain = Ffn(replace(ffn.s, ffn_sub_norm=False), ffn.type_name, ffn.packed, ffn.exact)
    assert np.array_equal(run_native(plain, x, 3)[0], found[:, :-1])


def test_no_neuron_fires_gives_zero() -> None:
    rng = np.random.default_rng(2)
    ffn = make(structure(64, 96, True, "relu", bias=True), "f32", 0, rng)
    found, counted = run_native(ffn, rng.normal(0, 1, (4, 64)), 2)
    assert not found.any()
    assert np.array_equal(counted.fired, [0] * 4)


def test_without_biases() -> None:
    rng = np.random.default_rng(3)
    ffn = make(structure(64, 96, True, "relu"), "f32", 0.5, rng)
    x = rng.normal(0, 1, (3, 64))
    expected, fires = reference(ffn, x)
    found, counted = run_native(ffn, x, 2)
    assert relative_error(found, expected) < 1e-5
    assert np.array_equal(counted.fired, fires.sum(1))


def test_the_reference_tells_activations_apart() -> None:
    """A kernel with another activation than asked for would fail the tests above."""
    rng = np.random.default_rng(4)
    ffn = make(structure(64, 96, True, "relu", bias=True), "f32", 0.4, rng)
    x = rng.normal(0, 1, (3, 64))
    found, _ = run_native(ffn, x, 1)
    for other, threshold in (("relu2", 0.0), ("drelu", 0.0), ("fatrelu", 0.7)):
        wrong = make(structure(64, 96, True, other, threshold, bias=True), "f32", 0.4, rng)
        wrong.exact.update(ffn.exact)
        assert relative_error(found, reference(wrong, x)[0]) > 0.02


@pytest.mark.parametrize("n_tokens", [1, 33])
def test_same_bits_every_time(n_tokens: int) -> None:
    rng = np.random.default_rng(5)
    ffn = make(structure(256, 352, True, "relu", bias=True), "q4_K", 0.3, rng)
    x = rng.normal(0, 1, (n_tokens, 256))
    first = run_native(ffn, x, 3)[0]
    assert all(np.array_equal(first, run_native(ffn, x, 3)[0]) for _ in range(5))
