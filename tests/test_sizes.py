"""Amounts of memory and disk: one meaning for each unit, and none for a number that could mean anything."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from runtime.base.sizes import parse_budgets, parse_size
from runtime.errors import UserError
from runtime.model_file.shard_writer import shard_size

UNITS = {
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "Gi": 2**30, "gib": 2**30,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "g": 10**9,
    "B": 1,
}  # fmt: skip


@pytest.mark.parametrize(("unit", "size"), UNITS.items())
@pytest.mark.parametrize("text", ["3{}", "3 {}", " 3{} ", "3.0{}", "3.{}"])
def test_units_mean_the_same_everywhere(text: str, unit: str, size: int) -> None:
    text = text.format(unit)
    assert parse_size(text, "x") == shard_size(text) == parse_budgets(text)[0] == 3 * size


@pytest.mark.parametrize(
    ("value", "sizes"),
    [
        (None, ()),
        ("6", (6 << 30,)),
        (6, (6 << 30,)),
        (0.5, (1 << 29,)),
        (np.float32(0.5), (1 << 29,)),
        (np.int64(2), (2 << 30,)),
        (1e-7, (107,)),
        ("6,4", (6 << 30, 4 << 30)),
        ("800MiB, 1GiB", (800 << 20, 1 << 30)),
        (".5", (1 << 29,)),
        ("0", (0,)),
        (0, (0,)),
        ("1023", (1023 << 30,)),
        ("5000GiB", (5000 << 30,)),
        ("0.1GiB", (107374182,)),
    ],
)
def test_budgets_without_a_unit_are_in_gib(value: Any, sizes: tuple[int, ...]) -> None:
    assert parse_budgets(value) == sizes


NO_SIZES = [
    "",
    " ",
    "lots",
    "-6",
    "-6GiB",
    "nan",
    "inf",
    "1e3",
    "6GiBB",
    "6PB",
    "6 G B",
    "0x10",
    "1_000",
    "٣GiB",
    "6G6",
    "G",
    ".",
    "9" * 5000,
    "6;4",
]


@pytest.mark.parametrize("text", [*NO_SIZES, "6,", ",6"])
def test_what_is_no_size(text: str) -> None:
    for parse in (parse_budgets, shard_size):
        with pytest.raises(UserError, match="expected") as caught:
            parse(text)
        assert len(caught.value.message) < 150


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, -0.5, True, [6, 4], b"6", 6j])
def test_what_is_no_budget(value: Any) -> None:
    with pytest.raises(UserError, match=r"memory budget `.*, expected GiB"):
        parse_budgets(value)


def test_a_number_without_a_unit_is_refused_where_it_could_be_anything() -> None:
    with pytest.raises(UserError, match="--split-max-size `45` has no unit, expected 45G or 45M"):
        shard_size("45")
    with pytest.raises(UserError, match="has no unit"):
        shard_size(45)  # type: ignore[arg-type]
    for value in ("6144", 6144, "6000000000", 1 << 33, 6144.0):
        with pytest.raises(UserError, match="is in GiB, expected less than 1024") as caught:
            parse_budgets(value)
        assert "MiB" in caught.value.hint


@pytest.mark.parametrize("text", ["8589934592GiB", "9223373TB", "99999999999999999999999999999999TB"])
def test_what_no_machine_has(text: str) -> None:
    for parse in (parse_budgets, shard_size):
        with pytest.raises(UserError, match="expected less than 8 EiB"):
            parse(text)


@pytest.mark.parametrize("text", ["0", "0G", "0.4B"])
def test_an_empty_shard(text: str) -> None:
    with pytest.raises(UserError, match="--split-max-size"):
        shard_size(text)


@pytest.mark.parametrize("size", [300_000_001, (1 << 33) + 1, (1 << 37) - 1])
def test_a_size_with_fifteen_digits_is_the_byte_that_was_meant(size: int) -> None:
    """As the report writes budgets."""
    assert parse_budgets(f"{size / 2**20:.15g}MiB") == (size,)
