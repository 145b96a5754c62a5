"""What the result of a sparse FFN may not depend on: the order of the neurons, the number of threads, the other tokens of the batch.

They change the order of float additions, and nothing else: within 1e-6 of the largest |y|. No coefficient may be rounded by what stands beside it.
"""

from __future__ import annotations

import numpy as np
import pytest
from ffn_harness import Array, Ffn, make, run_native, structure
from test_kernels import TYPES

from runtime.bindings import sparse_ffn

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("variant")]

SAME = 1e-6
N_EMBD, N_FF = 512, 704


def uneven(type_name: str, gated: bool, rng: np.random.Generator) -> Ffn:
    """Neurons whose strengths differ by orders of magnitude, so that a coefficient rounded by its neighbours' shows."""
    ffn = make(structure(N_EMBD, N_FF, gated, "relu", bias=True), type_name, 0.3, rng)
    bias = ffn.packed["gate_bias"].view(np.float32).copy()
    bias[::50] += 100
    ffn.packed["gate_bias"] = bias.view(np.uint8)
    return ffn


def reordered(ffn: Ffn, order: Array) -> Ffn:
    packed = {
        name: np.ascontiguousarray(rows.reshape(len(order), -1)[order]).reshape(rows.shape)
        for name, rows in ffn.packed.items()
    }
    return Ffn(ffn.s, ffn.type_name, packed, ffn.exact)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("type_name", TYPES)
def test_order_threads_and_batch(type_name: str, gated: bool) -> None:
    rng = np.random.default_rng(1)
    ffn = uneven(type_name, gated, rng)
    x = rng.normal(0, 1, (37, N_EMBD)).astype(np.float32)
    expected, counted = run_native(ffn, x[:1], 1)
    found = {f"order {i}": run_native(reordered(ffn, rng.permutation(N_FF)), x[:1], 1) for i in range(3)}
    found |= {f"{threads} threads": run_native(ffn, x[:1], threads) for threads in (2, 3, 5)}
    for n_tokens, threads in ((2, 1), (7, 2), (17, 3), (37, 5), (37, 1), (37, 2)):
        y, batch = run_native(ffn, x[:n_tokens], threads)
        found[f"first of {n_tokens}, {threads} threads"] = y[:1], batch
        y, batch = run_native(ffn, x[n_tokens - 1 :: -1], threads)
        found[f"last of {n_tokens}, {threads} threads"] = y[-1:], batch
    assert 0.1 * N_FF < counted.fired[0] < 0.5 * N_FF
    assert all(b.fired[-1 if "last" in what else 0] == counted.fired[0] for what, (_, b) in found.items())
    differences = {what: float(np.abs(y - expected).max() / np.abs(expected).max()) for what, (y, _) in found.items()}
    assert {what: d for what, d in differences.items() if d > SAME} == {}


@pytest.mark.parametrize("type_name", ["f32", "q4_0", "q4_K", "q6_K"])
def test_a_thousand_neurons(type_name: str) -> None:
    """So do the errors of the additions themselves where as many neurons fire as in a model of 7B."""
    rng = np.random.default_rng(2)
    ffn = make(structure(256, 4096, True, "relu", bias=True), type_name, 0.3, rng)
    x = rng.normal(0, 1, (3, 256)).astype(np.float32)
    expected, counted = run_native(ffn, x[:1], 1)
    assert counted.fired[0] > 1000
    for found in (run_native(ffn, x, 2)[0][:1], run_native(reordered(ffn, rng.permutation(4096)), x[:1], 3)[0]):
        assert np.abs(found - expected).max() <= SAME * np.abs(expected).max()


def test_memory_is_bounded_by_threads_and_by_tokens() -> None:
    """Partial sums: a few rows for each thread, however many tokens there are."""
    row = 4 * 8192
    for threads in (1, 2, 16, 64):
        ffn = sparse_ffn.describe(structure(8192, 28672, True, "relu").blocks[0].ffn, (0, 0, 0), threads)
        for n_tokens in (1, 2, 16, 33, 512, 4096):
            # Twice a tile of 32 tokens, a row to unpack into and one to add up; where that is enough, the product itself.
            product = n_tokens * row * sparse_ffn.tokens_alone(ffn, n_tokens)
            assert sparse_ffn.down_size(ffn, n_tokens) <= product + 68 * threads * row + 64
            assert sparse_ffn.tokens_alone(ffn, n_tokens) == (n_tokens > max(16, 32 * (threads - 1)))
        for n_tokens in (1, 16):
            assert sparse_ffn.gate_size(ffn, n_tokens) <= n_tokens * 28672 * 8 + (24 * n_tokens + 64) * threads
        sparse_ffn.predict(ffn, 1024, 0, 0.0)
        assert sparse_ffn.predict_size(ffn, 4096) <= 4096 // 8 * 28672 + 4 * 28672 + 64 * threads * (row // 8 + 64) + 64


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_fewer_threads_than_there_is_room_for(n_tokens: int) -> None:
    rng = np.random.default_rng(3)
    ffn = make(structure(64, 96, True, "relu", bias=True), "f32", 0.5, rng)
    x = rng.normal(0, 1, (n_tokens, 64)).astype(np.float32)
    expected, _ = run_native(ffn, x, 2)
    found, _ = run_native(ffn, x, 2, room=7)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("type_name", TYPES)
def test_other_company_gives_the_same_bits(type_name: str, gated: bool) -> None:
    """In a batch of one size, a token's result and its counts do not depend on what the other tokens are."""
    rng = np.random.default_rng(4)
    ffn = uneven(type_name, gated, rng)
    own = rng.normal(0, 1, (1, N_EMBD)).astype(np.float32)
    for n_tokens, threads in ((2, 1), (2, 2), (7, 3), (17, 2), (33, 3)):
        for at in {0, n_tokens // 2, n_tokens - 1}:
            found = []
            for scale in (0.0, 1.0, 30.0):  # of the others: few, some, or other neurons fire
                x = (scale * rng.normal(0, 1, (n_tokens, N_EMBD))).astype(np.float32)
                x[at] = own
                y, counted = run_native(ffn, x, threads)
                found.append((y[at].tobytes(), counted.fired[at], counted.gates[at]))
            assert len(set(found)) == 1, (n_tokens, threads, at)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("type_name", TYPES)
def test_few_tokens_have_the_same_bits_as_each_alone(type_name: str, gated: bool) -> None:
    """What makes an answer that was verified in batches the same as one that was not."""
    rng = np.random.default_rng(5)
    ffn = uneven(type_name, gated, rng)
    x = rng.normal(0, 1, (sparse_ffn.FEW_TOKENS, N_EMBD)).astype(np.float32)
    x[3] *= 0.01  # another number of neurons
    for threads in (1, 2, 3):
        alone = [run_native(ffn, x[t : t + 1], threads) for t in range(len(x))]
        for n_tokens in (2, 3, 5, 8, 16):
            y, counted = run_native(ffn, x[:n_tokens], threads)
            assert [t for t in range(n_tokens) if y[t].tobytes() != alone[t][0].tobytes()] == [], (threads, n_tokens)
            assert counted.fired.tolist() == [one.fired[0] for _, one in alone[:n_tokens]]
