"""Every named rewrite against plain numpy, whole and in slices, on arrays and on tensors in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert.rewrites import NAMES, Rewrite, ScaledColumns, named, ternary
from runtime.model_file.structure import Attention, Mamba2

MATRIX = np.arange(16 * 5, dtype=np.float32).reshape(16, 5)
HEADS = Attention(
    head_count=4, head_count_kv=2, head_length=2
)  # in rows: queries 0-3, key 4-5, value 6-7, then the same of the other key-value head
GROUPS = Mamba2(head_count=4, head_length=4, state_length=2, group_count=4, conv_length=3)
VECTOR = np.linspace(-1, 1, 16, dtype=np.float32)
SOURCES = {"squeeze": MATRIX[:, None], "column": VECTOR, "minus_exp": VECTOR, "groups": VECTOR}  # else MATRIX
EXPECTED = {
    "squeeze": MATRIX,
    "column": VECTOR[:, None],
    "minus_exp": -np.exp(VECTOR)[:, None],
    "groups": VECTOR.reshape(4, 4),
    "identity": MATRIX,
    "transpose": MATRIX.T,
    "skip_rows_2": MATRIX[2:],
    "add_one": MATRIX + 1,
    "fused_q": MATRIX[[0, 1, 2, 3, 8, 9, 10, 11]],
    "fused_k": MATRIX[[4, 5, 12, 13]],
    "fused_v": MATRIX[[6, 7, 14, 15]],
}
INVERSES = {"identity": "identity", "transpose": "transpose"}  # rows that were left out do not come back


def rewrite(name: str) -> Rewrite:
    return named(name, GROUPS if name == "groups" else HEADS)


def source(name: str) -> np.ndarray:
    return SOURCES.get(name, MATRIX)


def test_every_rewrite_is_tested() -> None:
    assert set(EXPECTED) == NAMES


@pytest.mark.parametrize("name", EXPECTED)
def test_equals_numpy_in_any_slices(name: str) -> None:
    rows = rewrite(name).rows
    expected = EXPECTED[name]
    for step in (1, 2, len(expected)):
        parts = [rows(source(name), at, min(at + step, len(expected))) for at in range(0, len(expected), step)]
        assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("name", EXPECTED)
def test_source_shape(name: str) -> None:
    assert rewrite(name).source_shape(EXPECTED[name].shape) == source(name).shape


@pytest.mark.parametrize(("name", "inverse"), INVERSES.items())
def test_inverse(name: str, inverse: str) -> None:
    there = named(name, HEADS).rows(MATRIX, 0, len(EXPECTED[name]))
    assert np.array_equal(named(inverse, HEADS).rows(there, 0, len(MATRIX)), MATRIX)


@pytest.mark.parametrize("name", EXPECTED)
def test_on_a_tensor_in_a_file(name: str, tmp_path: Path) -> None:
    save_file({"x": source(name)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        found = rewrite(name).rows(file.get_slice("x"), 1, 4)
    assert np.array_equal(found, EXPECTED[name][1:4])


def test_vectors_are_left_alone() -> None:
    assert np.array_equal(named("identity", HEADS).rows(MATRIX[0], 1, 4), MATRIX[0, 1:4])


def test_fused_projections_come_together_again() -> None:
    """The inverse: heads of queries, keys and values interleaved as they were."""
    q, k, v = (named(f"fused_{part}", HEADS).rows(MATRIX, 0, n) for part, n in (("q", 8), ("k", 4), ("v", 4)))
    groups = [np.concatenate([q[4 * g : 4 * g + 4], k[2 * g : 2 * g + 2], v[2 * g : 2 * g + 2]]) for g in range(2)]
    assert np.array_equal(np.concatenate(groups), MATRIX)


def test_ternary_weights() -> None:
    scale = np.abs(MATRIX - 30).mean()
    found = ternary(MATRIX - 30)
    assert np.array_equal(np.unique(found), np.float32([-scale, 0, scale]))
    assert np.array_equal(np.sign(found), np.where(np.abs(MATRIX - 30) > scale / 2, np.sign(MATRIX - 30), 0))


def test_scaled_columns_by_rows_and_by_columns() -> None:
    vector = np.arange(5, dtype=np.float32)
    scaled = ScaledColumns(MATRIX, vector)
    assert np.array_equal(scaled[3:9], (MATRIX * vector)[3:9])
    assert np.array_equal(named("transpose", HEADS).rows(scaled, 1, 4), (MATRIX * vector).T[1:4])
