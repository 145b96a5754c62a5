"""Every named rewrite against plain numpy, whole and in slices, on arrays and on tensors in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from convert.rewrites import REWRITES

MATRIX = np.arange(7 * 5, dtype=np.float32).reshape(7, 5)
EXPECTED = {"identity": MATRIX, "transpose": MATRIX.T, "skip_rows_2": MATRIX[2:]}
INVERSES = {"identity": "identity", "transpose": "transpose"}  # rows that were left out do not come back


def test_every_rewrite_is_tested() -> None:
    assert set(EXPECTED) == set(REWRITES)


@pytest.mark.parametrize("name", EXPECTED)
def test_equals_numpy_in_any_slices(name: str) -> None:
    rows = REWRITES[name].rows
    expected = EXPECTED[name]
    for step in (1, 2, len(expected)):
        parts = [rows(MATRIX, at, min(at + step, len(expected))) for at in range(0, len(expected), step)]
        assert np.array_equal(np.concatenate(parts), expected)


@pytest.mark.parametrize("name", EXPECTED)
def test_source_shape(name: str) -> None:
    assert REWRITES[name].source_shape(EXPECTED[name].shape) == MATRIX.shape


@pytest.mark.parametrize(("name", "inverse"), INVERSES.items())
def test_inverse(name: str, inverse: str) -> None:
    there = REWRITES[name].rows(MATRIX, 0, len(EXPECTED[name]))
    assert np.array_equal(REWRITES[inverse].rows(there, 0, len(MATRIX)), MATRIX)


@pytest.mark.parametrize("name", EXPECTED)
def test_on_a_tensor_in_a_file(name: str, tmp_path: Path) -> None:
    save_file({"x": MATRIX}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        found = REWRITES[name].rows(file.get_slice("x"), 1, 4)
    assert np.array_equal(found, EXPECTED[name][1:4])


def test_vectors_are_left_alone() -> None:
    assert np.array_equal(REWRITES["identity"].rows(MATRIX[0], 1, 4), MATRIX[0, 1:4])
