"""Every family's checkpoints against their reference, in every way of running them. A family adds rows to tests/families.py, a way to MODES."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import CASES
from oracle import Logits, max_difference, random_ids, same_argmax

import runtime
from convert import convert, job
from convert.arch import families
from predictors.fit import BlockFit, ModelFit
from predictors.quantized import Tensor
from runtime.gguf_file import GgufFile

N = 256
RANK = 32
MODES: dict[str, dict[str, Any]] = {  # options of runtime.load
    "dense": {"ffn": "dense"},
    "exact": {"ffn": "exact"},
    "predicted": {"ffn": "predicted", "predictor_bias": math.inf},
}


def made_up_fit(path: Path, **_options: Any) -> ModelFit:
    """Neurons in a random order, and a random predictor for every block: instead of what calibration would find."""
    with GgufFile(path) as file:
        s = file.structure
    rng = np.random.default_rng(0)

    def block() -> BlockFit:
        order = rng.permutation(s.feed_forward_length).astype(np.int32)
        freq = np.sort(rng.random(s.feed_forward_length, np.float32))[::-1].copy()
        shapes = {
            "predictor_in.weight": (s.embedding_length, RANK),
            "predictor_out.weight": (RANK, s.feed_forward_length),
        }
        tensors = [Tensor(name, "f32", shape, random_bytes(rng, shape)) for name, shape in shapes.items()]
        tensors += [
            Tensor("predictor_out.bias", "f32", (s.feed_forward_length,), random_bytes(rng, (s.feed_forward_length,))),
            Tensor("ffn_neuron_index", "i32", order.shape, order.view(np.uint8)),
            Tensor("ffn_neuron_freq", "f32", freq.shape, freq.view(np.uint8)),
        ]
        return BlockFit(order, freq, RANK, "f32", 1.0, tuple(tensors), None)  # type: ignore[arg-type]

    return ModelFit("lowrank", "hot", tuple(block() for _ in range(s.block_count)), {})


def random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape[::-1], np.float32).reshape(-1).view(np.uint8)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, list[int], Logits]]:
    """A row of the table: checkpoint, converted file, ids, and the reference's logits for them."""
    folder = tmp_path_factory.mktemp("families")
    done: dict[str, tuple[Path, Path, list[int], Logits]] = {}

    def get(name: str) -> tuple[Path, Path, list[int], Logits]:
        if name not in done:
            checkpoint, out, ids = folder / name, folder / f"{name}.gguf", random_ids(N, 4000)
            CASES[name].make(checkpoint)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "fit_model", made_up_fit)
                convert(checkpoint, out, type="f32", ffn_type=CASES[name].ffn_type)
            done[name] = checkpoint, out, ids, CASES[name].logits(checkpoint, ids)
        return done[name]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(case: Any, name: str, mode: str) -> None:
    _, path, ids, expected = case(name)
    with runtime.load(path, kv_type="f32", threads=2, **MODES[mode]) as model:
        found = model.logits(ids)
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


@pytest.mark.parametrize("family", families())
def test_every_family_has_two_rows_or_more(family: str) -> None:
    rows = [case for case in CASES.values() if case.family == family]
    assert len(rows) >= 2
    assert {case.config.get("tie_word_embeddings", False) for case in rows} == {True, False}
