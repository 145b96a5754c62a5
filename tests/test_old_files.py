"""Files of schema 1 and 2 as they were written when these were the newest: still read, with the same meaning.

tests/data holds them, their schema at the end of their names. What they compute is tests/format_reference.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from format_reference import FormatReference
from oracle import Logits, relative

import runtime
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

DATA = Path(__file__).parent / "data"
SHARD = "-00001-of-00002"
FILES = sorted(path.stem for path in DATA.glob("*.gguf") if "-00002-" not in path.stem)
# Relative: sums in another order; activations rounded to the format's 16 bits before each product (bf16: to 8 bits of
# mantissa), or to 8-bit numbers (0.5 % in each of a dozen products, and neurons near their threshold fire or do not).
BOUNDS = {"f32": 1e-5, "f16": 2e-3, "bf16": 2e-2, "q8_0": 0.1, "q4_0": 0.1}
SPLITS = ("none", "half", "all")
N_FF = 64  # of all of them
IDS = [1, *np.random.default_rng(0).integers(3, 270, 39).tolist()]


Mode = dict[str, Any]
Expected = Callable[[str, Mode], Logits]


@pytest.fixture(scope="module")
def expected() -> Expected:
    """What a file computes in a mode, with so many neurons of each block on a device."""
    known: dict[Any, Logits] = {}

    def get(name: str, mode: Mode) -> Logits:
        predicted, hot = mode.get("predictor_bias") == 0, N_FF if mode["ffn"] == "dense" else mode.get("hot", 0)
        if (name, predicted, hot) not in known:
            paths = sorted(DATA.glob(f"{name.removesuffix(SHARD)}*.gguf"))
            known[name, predicted, hot] = FormatReference(paths, predicted, hot).logits(IDS)
        return known[name, predicted, hot]

    return get


def modes(name: str) -> list[Mode]:
    with GgufFile(DATA / f"{name}.gguf") as file:
        s = file.structure
    found: list[Mode] = [{"ffn": "exact"}] + [{"ffn": "dense"}] * (s.layout == "both")
    # Scores that are computed from rounded numbers choose other neurons than the reference's.
    biases = (math.inf, 0.0) if bound(name) == BOUNDS["f32"] else (math.inf,)
    return found + [{"ffn": "predicted", "predictor_bias": bias} for bias in biases if any(s.predictor_rank)]


def bound(name: str) -> float:
    return next((BOUNDS[kind] for kind in BOUNDS if f"-{kind}-" in name), BOUNDS["f32"])


def test_both_schemas_are_there() -> None:
    versions = []
    for name in FILES:
        with GgufFile(DATA / f"{name}.gguf") as file:
            versions.append(file.metadata["lazyneuron.schema_version"])
        assert name.removesuffix(SHARD).endswith(f"-{versions[-1]}")
    assert set(versions) == {1, 2}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_computes_what_the_format_says(expected: Expected, name: str, threads: int) -> None:
    for mode in modes(name):
        options = {"device": "none", "kv_type": "f32", "threads": threads}
        with runtime.load(DATA / f"{name}.gguf", **options, **mode) as model:
            found = model.logits(IDS)
        assert relative(expected(name, mode), found) <= bound(name), mode


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FILES)
def test_so_it_does_divided_between_a_device_and_the_cpu(expected: Expected, name: str, split: str) -> None:
    with GgufFile(DATA / f"{name}.gguf") as file:
        sparse = file.structure.layout == "sparse"
    hot = 0 if sparse else {"none": 0, "half": N_FF // 2, "all": N_FF}[split]  # a device computes with ffn_down
    for mode in modes(name):
        divided: Mode = {**mode, "device": "CPU", "hot": hot}
        with runtime.load(DATA / f"{name}.gguf", kv_type="f32", threads=2, **divided) as model:
            found = model.logits(IDS)
        assert relative(expected(name, divided), found) <= bound(name), mode
