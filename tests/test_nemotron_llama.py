"""Mamba-2, attention and experts with a shared one, in every way of running them, beside llama.cpp's `nemotron_h_moe`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from company import whole_together
from oracle import Logits, llama_logits, max_difference, random_ids, same_argmax
from test_mamba import engine_of

import runtime
from bench import stock
from bench.make_model import Recipe, write_model

pytestmark = pytest.mark.numeric

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
IDS = random_ids(256, 512)
WAYS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "exact": {"ffn": "exact"},
    "predicted": {"ffn": "predicted", "predictor_bias": math.inf},
    "verified": {"ffn": "verified"},
    "divided": {"ffn": "exact", "device": "CPU", "hot": 32},
}


@pytest.fixture(scope="module")
def path(make_once: MakeOnce) -> Path:
    return make_once("nemotron-3.gguf", lambda path: write_model(Recipe("tiny-nemotron-3", 0.2, "f32"), path))


@pytest.fixture(scope="module")
def expected(path: Path, make_once: MakeOnce) -> Callable[[list[int]], Logits]:
    twin = make_once("nemotron-3-stock.gguf", lambda target: stock.write(path, target))
    return lambda ids: llama_logits(twin, ids)


def assert_same(expected: Logits, found: Logits) -> None:
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


def test_logits(path: Path, expected: Callable[[list[int]], Logits]) -> None:
    wanted = expected(IDS)
    for way, options in WAYS.items():
        with runtime.load(path, kv_type="f32", threads=2, n_ctx=256, **{"device": "none"} | options) as model:
            assert bool(model._engine.map.mambas(1)) == (way == "divided")
            assert_same(wanted, model.logits(IDS))


def test_eight_sequences(path: Path, expected: Callable[[list[int]], Logits]) -> None:
    texts = [random_ids(n, 512, seed=n) for n in (1, 3, 17, 24, 2, 5, 9, 30)]
    with engine_of(path, ffn="exact", sequences=8) as engine:
        found = whole_together(engine, texts)
    assert_same(np.concatenate([expected(ids) for ids in texts]), found)
