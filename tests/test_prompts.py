"""Prompts computed through whole matrices: what `dense` mode computes, counted apart, and only where that pays."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, random_ids, relative

import runtime
from convert import convert
from runtime.bindings import sparse_ffn
from runtime.compute.dense_threshold import dense_from, expected
from runtime.compute.traffic import Activity
from runtime.hybrid import choose
from runtime.hybrid.executor import Executor
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import copied, copied_keys, write_gguf

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
EVERYWHERE, NOWHERE = 1.0, math.inf


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU for which there are none."""
    monkeypatch.setattr(sparse_ffn, "tiles", lambda *_: None)


def after(model: runtime.Model, ids: list[int], from_tokens: float) -> Logits:
    """Logits after a prompt whose FFNs are dense from so many tokens on."""
    engine = model._engine
    engine._dense_from = (from_tokens,) * engine.structure.block_count
    model._sequence.clear()
    return model._sequence.logits(ids)


@pytest.mark.parametrize("name", ["bundled", "llama-gqa", "opt-pre-norm", "opt-post-norm"])
@pytest.mark.parametrize("type_name", ["f32", "q4_0", "q8_0", "q4_k"])
def test_a_dense_prompt_is_that_of_dense_mode(converted: Converted, name: str, type_name: str) -> None:
    """But for attention and head, whose products add up in another order."""
    path, ids = converted(name, type_name), random_ids(70, 4000)
    with runtime.load(path, ffn="dense", kv_type="f32") as model:
        wanted = after(model, ids, NOWHERE)
    with runtime.load(path, ffn="exact", kv_type="f32") as model:
        found = after(model, ids, EVERYWHERE)
        assert relative(wanted, found) < (1e-5 if type_name == "f32" else 0.05)
        assert np.array_equal(after(model, ids, EVERYWHERE), found)


@pytest.mark.parametrize("n_tokens", [2, 33, 300])
@pytest.mark.parametrize(("type_name", "tolerance"), [("f32", 1e-4), ("q4_0", 0.2)])
def test_a_dense_prompt_is_that_of_the_sparse_kernels(
    converted: Converted, type_name: str, tolerance: float, n_tokens: int
) -> None:
    """Quantised, the two layouts of the down projection are rounded differently."""
    with runtime.load(converted("bundled", type_name), ffn="exact", kv_type="f32") as model:
        ids = random_ids(n_tokens, 4000)
        assert relative(after(model, ids, NOWHERE), after(model, ids, EVERYWHERE)) < tolerance


@pytest.mark.usefixtures("without_tiles")
def test_decoding_goes_on_from_a_dense_prompt(converted: Converted) -> None:
    with runtime.load(converted("bundled", "q4_0"), ffn="exact") as model:
        ids = random_ids(64, 4000)
        after(model, ids[:-1], 2)
        assert model._engine._executor.cache._scratch is not None
        last = model._sequence.logits(ids)
        assert model._engine._executor.cache._scratch is None  # what only prompts need is freed
        assert relative(after(model, ids, NOWHERE), last) < 0.2


def test_dense_tokens_are_not_counted_as_sparse(converted: Converted) -> None:
    with runtime.load(converted("bundled", "q4_0"), ffn="exact") as model:
        engine = model._engine
        after(model, random_ids(64, 4000), 2)
        assert [c.seen for c in engine.counters.layers] == [0] * 5 + [1]  # the last block sees the last token only
        engine.counters.reset()
        after(model, random_ids(64, 4000), NOWHERE)
        assert [c.seen for c in engine.counters.layers] == [64] * 5 + [1]


def test_logits_of_every_position_are_the_modes_own(fitted_gguf: Path) -> None:
    """Perplexity must not judge a mode by what another one computes."""
    with runtime.load(fitted_gguf, ffn="predicted") as model:
        ids = random_ids(64, 4000)
        wanted = model.logits(ids)
        model._engine._dense_from = (EVERYWHERE,) * 6
        assert np.array_equal(model.logits(ids), wanted)
        assert all(c.seen == 128 for c in model._engine.counters.layers)


def test_a_file_without_ffn_down_keeps_the_sparse_kernels(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    convert(checkpoint("bundled"), tmp_path / "sparse.gguf", type="q4_0", calibration="none", layout="sparse")
    with runtime.load(tmp_path / "sparse.gguf", ffn="exact") as model:
        assert model._engine._dense_from == (math.inf,) * 6
        model._sequence.logits(random_ids(300, 4000))
        assert [c.seen for c in model._engine.counters.layers] == [300] * 5 + [1]


def test_what_is_expected(converted: Converted, fitted_gguf: Path) -> None:
    with GgufFile(converted("bundled", "f16")) as file:
        assert expected(file, "exact", 0.0).fired == [1.0] * 6  # not calibrated
    with GgufFile(fitted_gguf) as file:
        exact, predicted = expected(file, "exact", 0.0), expected(file, "predicted", 0.0)
        assert exact.gates == [1.0] * 6 == list(expected(file, "predicted", 0.5).gates)
        assert exact.fired == predicted.fired
        assert all(0 < fired < 0.4 for fired in exact.fired)
        assert all((0 < gates < 1) == bool(file.structure.rank(i)) for i, gates in enumerate(predicted.gates))


@pytest.mark.skipif("avx512" not in sparse_ffn.variants(), reason="every variant has limits of its own")
def test_when_tiles_pay(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    with GgufFile(converted("bundled", "q4_0")) as file:
        s, tensors = file.structure, file.tensors

    def tokens(ffn: str, fired: float, gates: float) -> float:
        return dense_from(s, tensors, Activity.uniform(ffn, 6, fired, gates))[0]

    for variant, few, many in (("avx512", 0.2, 0.3), ("avx2", 0.3, 0.4)):
        monkeypatch.setenv("LAZYNEURON_KERNELS", variant)
        assert tokens("exact", few, 1.0) == math.inf  # gates go through tiles, too
        assert tokens("exact", many, 1.0) == 17
        assert tokens("predicted", few, few) == math.inf
        assert tokens("predicted", few, 1.0) == 17


@pytest.mark.usefixtures("without_tiles")
def test_when_whole_matrices_pay(converted: Converted) -> None:
    with GgufFile(converted("bundled", "q4_0")) as file:
        s, tensors = file.structure, file.tensors

    def tokens(fired: float, gates: float) -> float:
        return dense_from(s, tensors, Activity.uniform("exact", 6, fired, gates))[0]

    assert tokens(0.1, 0.12) == math.inf
    assert tokens(0.1, 1.0) == math.inf
    assert tokens(1.0, 1.0) <= tokens(0.8, 1.0) < tokens(0.6, 1.0) < 512


@pytest.fixture(scope="module")
def mixed_gguf(converted: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with blocks of other formats in turn: none of the first one's matrices gains by repacking."""
    out = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    with GgufFile(converted("bundled", "q8_0")) as even, GgufFile(converted("bundled", "q4_0")) as odd:
        streams = [copied(odd if re.match(r"blk\.[135]\.", name) else even, name) for name in even.tensors]
        write_gguf(out, copied_keys(converted("bundled", "q8_0")), streams)
    return out


@pytest.mark.usefixtures("without_tiles")
def test_each_block_is_repacked_by_its_own_formats(mixed_gguf: Path) -> None:
    ids = random_ids(70, 4000)
    with runtime.load(mixed_gguf, ffn="dense", kv_type="f32") as model:
        wanted = after(model, ids, NOWHERE)
    with runtime.load(mixed_gguf, ffn="exact", kv_type="f32") as model:
        few, many = model._engine._dense_from[:2]
        assert model._engine._dense_from == (few, many) * 3
        assert 17 == few < many  # only what is repacked takes longer than its products
        assert relative(wanted, after(model, ids, EVERYWHERE)) < 0.05
        scratch = model._engine._executor.cache._scratch
        assert scratch is not None
        places = {name.split(".")[0] for name in scratch.tensors}
        assert {place for place in places if place.startswith("ffn")} == {"ffn_down", "ffn_gate", "ffn_up"}


@pytest.mark.usefixtures("without_tiles")
def test_a_prompt_for_which_a_devices_memory_grows_keeps_what_it_repacks(
    converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph is not kept yet when those before lose their memory."""
    path, ids = converted("bundled", "q4_0"), random_ids(70, 4000)
    with runtime.load(path, ffn="exact", kv_type="f32") as model:
        wanted = after(model, ids, EVERYWHERE)
    planned = choose.place

    def last_blocks(blocks: Any, head: int, machine: Any) -> Any:
        return replace(planned(blocks, head, machine), resident_from=3, head=True, hot=((0,),) * 3 + ((1024,),) * 3)

    monkeypatch.setattr(choose, "place", last_blocks)
    monkeypatch.setattr(Executor, "reserve", lambda *_: None)
    with runtime.load(path, ffn="exact", kv_type="f32", device="CPU", vram_budget="1") as model:
        assert relative(wanted, after(model, ids, EVERYWHERE)) < 0.02
        assert model._engine._executor.cache._scratch is not None
