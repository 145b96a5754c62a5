"""Mixtures of experts beside llama.cpp's own graphs, on a stock file with the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experts import MODELS, Model
from oracle import Logits, max_difference, random_ids, same_argmax

import runtime
from convert import convert
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import copied, copied_keys, write_gguf

pytestmark = pytest.mark.numeric

_OURS = ("ffn_down_t_exps",)
_GATINGS = {"softmax": 1, "sigmoid": 2}  # as llama.cpp counts them
WINDOW = 4096  # of SmallThinker in llama.cpp, whatever a file says
# Every fourth block sees everything and does not rotate: so llama.cpp has it where there is a window.
BLOCKS = {"n_blocks": 5, "rotates": (0, 1, 1, 1, 0), "windowed": (0, 1, 1, 1, 0), "window": WINDOW}


def write_stock(source: Path, target: Path) -> None:
    """A file of llama.cpp's arch `smallthinker` with the weights of one of ours."""
    with GgufFile(source) as file:
        s = file.structure
        a = s.attentions[0]
        keys: dict[str, Any] = {
            "vocab_size": s.vocab_size,
            "context_length": s.context_length,
            "embedding_length": s.embedding_length,
            "block_count": s.block_count,
            "feed_forward_length": s.feed_forward_length,
            "expert_feed_forward_length": s.feed_forward_length,
            "expert_count": s.expert_count,
            "expert_used_count": s.expert_used_count,
            "expert_gating_func": _GATINGS[s.expert_gating],
            "attention.head_count": a.head_count,
            "attention.head_count_kv": a.head_count_kv,
            "attention.key_length": a.head_length,
            "attention.value_length": a.head_length,
            "attention.layer_norm_rms_epsilon": s.norm_epsilon,
            "rope.dimension_count": s.rope_dimensions,
            "rope.freq_base": s.rope_freq_base,
        }
        if s.sliding_window:
            keys["attention.sliding_window"] = s.sliding_window
        tokenizer = {key: value for key, value in copied_keys(source).items() if key.startswith("tokenizer.")}
        described = {"general.name": "twin", **{f"smallthinker.{key}": value for key, value in keys.items()}}
        tensors = [copied(file, name) for name in file.tensors if not any(part in name for part in _OURS)]
        write_gguf(target, described | tokenizer, tensors, "smallthinker")


def llama_logits(path: Path, ids: list[int]) -> Logits:
    """float32 [len(ids), n_vocab], keys and values in F32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids), n_batch=512, logits_all=True, type_k=0, type_v=0, n_threads=2, verbose=True
    )
    try:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])
    finally:
        model.close()


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
    write_stock(tmp_path / "ours.gguf", tmp_path / "stock.gguf")
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
    write_stock(tmp_path / "ours.gguf", tmp_path / "stock.gguf")
    expected = llama_logits(tmp_path / "stock.gguf", ids)[-300:]
    with runtime.load(
        tmp_path / "ours.gguf", ffn="exact", kv_type="f32", n_ctx=len(ids), threads=2, device="none"
    ) as ours:
        found = ours.logits(ids)[-300:]
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995
