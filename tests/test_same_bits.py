"""A token's logits have the same bits whatever number of tokens is computed with it, up to FEW_TOKENS, in the modes that skip neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CHECKPOINTS
from oracle import Logits, random_ids

import runtime
from convert import convert
from runtime.bindings.sparse_ffn import FEW_TOKENS
from runtime.compute.batch import Batch
from runtime.engine import Engine

pytestmark = pytest.mark.numeric

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
Converted = Callable[..., Path]
MODES = ("exact", "predicted")


def computed(engine: Engine, ids: list[int], sizes: list[int], sequence: int = 0) -> Logits:
    """All logits of a sequence that comes in pieces of these sizes, the last one as often as needed."""
    engine.cells.trim(sequence)
    rows, at = [], 0
    while at < len(ids):
        n = sizes[min(len(rows), len(sizes) - 1)]
        rows.append(engine.compute(Batch.of(ids[at : at + n], at, sequence, range(len(ids[at : at + n])))))
        at += n
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def fitted(make_once: MakeOnce, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """The bundled model in a format, with predictors."""

    def made(type_name: str) -> Path:
        options = {"type": type_name, "calibration_tokens": 2048}
        return make_once(
            f"same-bits-{type_name}.gguf", lambda path: convert(checkpoint("bundled"), path, force=True, **options)
        )

    return made


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ffn", MODES)
@pytest.mark.parametrize("type_name", ["q4_0", "q8_0", "f16", "bf16", "f32"])
def test_one_by_one_and_in_batches(fitted: Callable[[str], Path], type_name: str, ffn: str, threads: int) -> None:
    ids = random_ids(48, 4000)
    with runtime.load(fitted(type_name), ffn=ffn, threads=threads, device="none", n_ctx=256) as model:
        engine = model._engine
        wanted = computed(engine, ids, [1])
        for size in (2, 3, 5, 8, FEW_TOKENS):
            assert np.array_equal(computed(engine, ids, [size]), wanted), size


@pytest.mark.parametrize("ffn", MODES)
@pytest.mark.parametrize("kv_type", ["f16", "f32"])
def test_at_any_number_of_cells(fitted: Callable[[str], Path], ffn: str, kv_type: str) -> None:
    """Where ggml's attention would divide the cells of one query among threads, and with cells of others behind its own."""
    ids = random_ids(560, 4000)
    options: dict[str, Any] = {"ffn": ffn, "threads": 2, "device": "none", "n_ctx": 1024, "kv_type": kv_type}
    with runtime.load(fitted("q4_0"), **options) as model:
        engine = model._engine
        wanted = computed(engine, ids, [500, 1])[500:]
        assert np.array_equal(computed(engine, ids, [500, 9])[500:], wanted)
        computed(engine, ids[:500], [500])
        computed(engine, random_ids(440, 4000, seed=5), [440], sequence=1)
        ends = [engine.compute(Batch.of(ids[500 + k : 501 + k], 500 + k, 0)) for k in range(40)]
        assert np.array_equal(np.concatenate(ends), wanted[:40])


@pytest.mark.parametrize("ffn", MODES)
def test_company_of_other_sequences(fitted: Callable[[str], Path], ffn: str) -> None:
    texts = [random_ids(20, 4000, seed=seed) for seed in range(FEW_TOKENS)]
    with runtime.load(fitted("q4_0"), ffn=ffn, threads=2, device="none", n_ctx=1024) as model:
        engine = model._engine
        wanted = [computed(engine, ids, [1]) for ids in texts]
        engine.cells.clear()
        steps = [
            engine.compute(Batch.together([Batch.of(ids[k : k + 1], k, s) for s, ids in enumerate(texts)]))
            for k in range(20)
        ]
    for s, rows in enumerate(wanted):
        assert np.array_equal(np.stack([step[s] for step in steps]), rows)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family(converted: Converted, name: str) -> None:
    ids = random_ids(24, 90)
    with runtime.load(converted(name, "q4_0"), ffn="exact", threads=2, device="none") as model:
        wanted = computed(model._engine, ids, [1])
        for size in (3, FEW_TOKENS):
            assert np.array_equal(computed(model._engine, ids, [size]), wanted)
