"""Mixtures of experts in every way of running them, against float64 numpy (tests/experts.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experts import MODELS
from oracle import Logits, random_ids, relative

import runtime
from convert import convert

pytestmark = pytest.mark.numeric

N = 48
FLOATS = 1e-5  # relative: sums of float32 in another order than the reference's
Made = Callable[[str], Path]
Expected = Callable[[str], Logits]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("experts")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            MODELS[name].make(path)
        return path

    return get


@pytest.fixture(scope="module")
def file(checkpoint: Made) -> Callable[..., Path]:
    """A converted checkpoint in a type, without calibration."""

    def get(name: str, type: str = "f32") -> Path:  # noqa: A002
        path = checkpoint(name).with_suffix(f".{type}.gguf")
        if not path.exists():
            convert(checkpoint(name), path, type=type, calibration="none")
        return path

    return get


@pytest.fixture(scope="module")
def expected(checkpoint: Made) -> Expected:
    known: dict[str, Logits] = {}

    def get(name: str) -> Logits:
        if name not in known:
            known[name] = MODELS[name].logits(checkpoint(name), random_ids(N, 4000))
        return known[name]

    return get


def load(path: Path, **options: Any) -> runtime.Model:
    return runtime.load(path, **{"device": "none", "kv_type": "f32", "threads": 2} | options)


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt(name: str, ffn: str, file: Callable[..., Path], expected: Expected) -> None:
    with load(file(name), ffn=ffn) as model:
        assert relative(expected(name), model.logits(random_ids(N, 4000))) < FLOATS


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_tokens_have_choices_of_their_own(length: int, file: Callable[..., Path], expected: Expected) -> None:
    """Whatever is computed together with a token, it is its own experts that count."""
    ids, name = random_ids(N, 4000), "smallthinker-21b"
    with load(file(name), ffn="exact") as model:
        assert relative(expected(name)[:length], model.logits(ids[:length])) < FLOATS


def test_what_is_counted(file: Callable[..., Path]) -> None:
    """Shares are of the neurons of the chosen experts."""
    with load(file("smallthinker-21b"), ffn="exact") as model:
        model.logits(random_ids(N, 4000))
        assert model.gate_shares() == [1.0] * 3
        assert all(0.4 < share < 0.6 for share in model.layer_shares())
