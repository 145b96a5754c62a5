"""Mixtures of experts beside llama.cpp's own graphs, on a stock file with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from experts import MODELS, Model
from oracle import llama_logits, max_difference, random_ids, same_argmax

import runtime
from bench import stock
from convert import convert

pytestmark = pytest.mark.numeric

WINDOW = 4096  # of SmallThinker in llama.cpp, whatever a file says
# Every fourth block sees everything and does not rotate: so llama.cpp has it where there is a window.
BLOCKS = {"n_blocks": 5, "rotates": (0, 1, 1, 1, 0), "windowed": (0, 1, 1, 1, 0), "window": WINDOW}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(replace(MODELS["smallthinker-4b"], rotates=(1, 1, 1)), id="sigmoid"),
        pytest.param(Model(True, experts=5, used=2), id="softmax"),
        pytest.param(Model(True, sigmoid=True, experts=16, used=6, **BLOCKS), id="sigmoid, windows"),
        pytest.param(Model(True, tied=True, **BLOCKS), id="softmax, windows"),
    ],
)
def test_smallthinker_is_llama_cpps(model: Model, tmp_path: Path) -> None:
    ids = random_ids(256, 4000)
    model.make(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "ours.gguf", type="f32", calibration="none")
    stock.write(tmp_path / "ours.gguf", tmp_path / "stock.gguf")
    expected = llama_logits(tmp_path / "stock.gguf", ids)
    for ffn in ("dense", "exact"):
        with runtime.load(tmp_path / "ours.gguf", ffn=ffn, kv_type="f32", threads=2, device="none") as ours:
            found = ours.logits(ids)
        assert max_difference(expected, found) <= 2e-3
        assert same_argmax(expected, found) >= 0.995


def test_a_text_that_is_longer_than_the_window(tmp_path: Path) -> None:
    layout = (0, 1)
    model = Model(True, 2, sigmoid=True, rotates=layout, windowed=layout, window=WINDOW, context=8192)
    ids = random_ids(WINDOW + 200, 4000)
    model.make(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "ours.gguf", type="f32", calibration="none")
    stock.write(tmp_path / "ours.gguf", tmp_path / "stock.gguf")
    expected = llama_logits(tmp_path / "stock.gguf", ids)[-300:]
    with runtime.load(
        tmp_path / "ours.gguf", ffn="exact", kv_type="f32", n_ctx=len(ids), threads=2, device="none"
    ) as ours:
        found = ours.logits(ids)[-300:]
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995
