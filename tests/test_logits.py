"""Logits of converted checkpoints against transformers, and the proof that this comparison catches mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CHECKPOINTS
from oracle import Logits, kl, max_difference, random_ids, same_argmax, transformers_logits

import runtime
from runtime.compute.batch import Batch
from runtime.engine import Engine
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions

pytestmark = pytest.mark.numeric

N = 512
NAMES = ["bundled", *CHECKPOINTS]
Folder = Callable[[str], Path]
Converted = Callable[..., Path]
_references: dict[str, Logits] = {}


def reference(checkpoint: Folder, name: str) -> tuple[list[int], Logits]:
    ids = random_ids(N, 4000)
    if name not in _references:
        _references[name] = transformers_logits(checkpoint(name), ids)
    return ids, _references[name]


def our_logits(path: Path, ids: list[int], **options: Any) -> Logits:
    with runtime.load(path, **options) as model:
        return model.logits(ids)


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_f32_equals_transformers(checkpoint: Folder, converted: Converted, name: str, flash: bool, ffn: str) -> None:
    ids, expected = reference(checkpoint, name)
    found = our_logits(converted(name), ids, kv_type="f32", ffn=ffn, flash_attention=flash)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


@pytest.mark.parametrize(
    ("type_name", "kv_type", "limit"),
    [("f32", "f16", 1e-5), ("f16", "f16", 1e-4), ("bf16", "f16", 1e-4), ("q8_0", "f16", 2e-3)],
)
@pytest.mark.parametrize("name", NAMES)
def test_rounded_types_stay_close(
    checkpoint: Folder, converted: Converted, name: str, type_name: str, kv_type: str, limit: float
) -> None:
    ids, expected = reference(checkpoint, name)
    found = our_logits(converted(name, type_name), ids, kv_type=kv_type)
    assert 0 <= kl(expected, found) <= limit


def with_metadata(path: Path, ids: list[int], **changes: Any) -> Logits:
    """Our logits when the file's description is changed."""
    file = GgufFile(path)
    file.metadata.update({f"lazyneuron.{key.replace('__', '.')}": value for key, value in changes.items()})
    engine = Engine(file, RunOptions(ffn="exact", threads=2, n_ctx=N, kv_type="f32").for_file(file))
    try:
        return engine.compute(Batch.of(ids, outputs=range(len(ids))))
    finally:
        engine.close()


def assert_caught(expected: Logits, found: Logits) -> None:
    """Far beyond what the comparisons above let pass."""
    assert max_difference(expected, found) > 10 * 2e-3
    assert kl(expected, found) > 10 * 1e-5


MISTAKES = {
    "another rope_theta": ("llama-mha", {"rope__freq_base": 20000.0}),
    "the other rope layout": ("llama-mha", {"position": "rope_norm"}),
    "a norm epsilon of 1e-3": ("llama-mha", {"norm_epsilon": 1e-3}),
    "a norm epsilon of 1e-3 (layer norm)": ("opt-pre-norm", {"norm_epsilon": 1e-3}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(checkpoint: Folder, converted: Converted, mistake: str) -> None:
    name, changes = MISTAKES[mistake]
    ids, expected = reference(checkpoint, name)
    assert max_difference(expected, with_metadata(converted(name), ids)) <= 2e-3
    assert_caught(expected, with_metadata(converted(name), ids, **changes))


def test_silu_for_relu_is_caught(checkpoint: Folder, converted: Converted) -> None:
    ids = random_ids(N, 4000)
    silu = transformers_logits(checkpoint("llama-mha"), ids, hidden_act="silu")
    assert_caught(silu, our_logits(converted("llama-mha"), ids, kv_type="f32"))


def test_a_position_offset_off_by_one_is_caught(checkpoint: Folder, converted: Converted, tmp_path: Path) -> None:
    ids, expected = reference(checkpoint, "opt-pre-norm")
    path = tmp_path / "shifted.gguf"
    shutil.copy(converted("opt-pre-norm"), path)
    with GgufFile(path) as file:
        info = file.tensors["position_embd.weight"]
    table = np.memmap(path, np.float32, "r+", info.offset, info.ne[::-1])
    table[:] = np.roll(table, 1, axis=0)
    table.flush()
    assert_caught(expected, our_logits(path, ids, kv_type="f32"))
