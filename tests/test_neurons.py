"""Hot order and predicted mode on converted models: reordering changes nothing, and a wide-open predictor is `exact`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command
from oracle import Logits, random_ids, relative

import runtime
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
NAMES = ["bundled", "llama-biases", "opt-pre-norm"]
FEW = 2048  # tokens of calibration


def logits(path: Path, ids: list[int], **options: Any) -> Logits:
    with runtime.load(path, **options) as model:
        return model.logits(ids)


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_reordering_changes_nothing(converted: Converted, name: str, ffn: str) -> None:
    ids = random_ids(200, 4000)
    plain = logits(converted(name), ids, ffn=ffn, kv_type="f32")
    hot = logits(converted(name, "f32", FEW), ids, ffn=ffn, kv_type="f32")
    assert relative(plain, hot) <= 1e-4
    with GgufFile(converted(name, "f32", FEW)) as file:
        assert file.structure.neuron_order == "hot"
        index = file.read("blk.1.ffn_neuron_index").view(np.int32)
        assert not np.array_equal(index, np.arange(len(index)))


def test_rows_are_where_the_index_says(converted: Converted) -> None:
    with GgufFile(converted("bundled")) as plain, GgufFile(converted("bundled", "f32", FEW)) as hot:
        index = hot.read("blk.2.ffn_neuron_index").view(np.int32)
        for name in ("gate", "up", "down_t"):
            tensor = f"blk.2.ffn_{name}.weight"
            before, after = (f.read(tensor).view(np.float32).reshape(1024, 256) for f in (plain, hot))
            assert np.array_equal(before[index], after)
        before, after = (f.read("blk.2.ffn_down.weight").view(np.float32).reshape(256, 1024) for f in (plain, hot))
        assert np.array_equal(before[:, index], after)


@pytest.mark.parametrize("n_batch", [1, 7, 512])
def test_an_open_predictor_is_exact(fitted_gguf: Path, n_batch: int) -> None:
    ids = random_ids(60, 4000)
    exact = logits(fitted_gguf, ids, ffn="exact", n_batch=n_batch)
    assert relative(exact, logits(fitted_gguf, ids, ffn="predicted", n_batch=n_batch, predictor_bias=1e30)) <= 1e-5


def test_a_closed_predictor_computes_nothing(fitted_gguf: Path) -> None:
    with runtime.load(fitted_gguf, predictor_bias=-math.inf) as model:
        model.logits(random_ids(50, 4000))
        ranks = model.structure.predictor_rank
        assert any(ranks)
        assert all(share == 0 for share, rank in zip(model.gate_shares(), ranks, strict=True) if rank)


def test_predicted_is_the_default_and_reads_less(fitted_gguf: Path, tiny_gguf: Path) -> None:
    read = {}
    for bias in (-1.0, 0.0, 1.0):
        with runtime.load(fitted_gguf, predictor_bias=bias) as model:
            assert model.ffn == "predicted"
            list(model.generate("My fellow citizens,", max_tokens=30, sampling=runtime.Sampling(temperature=0)))
            read[bias] = sum(model.gate_shares())
    assert 0 < read[-1.0] < read[0.0] < read[1.0] < 6
    with runtime.load(tiny_gguf) as model:
        assert model.ffn == "exact"


def test_predicted_stays_close(fitted_gguf: Path, checkpoint: Callable[[str], Path]) -> None:
    """Token by token and in batches, predicted mode computes the same and stays near dense."""
    ids = runtime_ids(fitted_gguf)
    one, many = (logits(fitted_gguf, ids, ffn="predicted", kv_type="f32", n_batch=n) for n in (1, 512))
    dense = logits(fitted_gguf, ids, ffn="dense", kv_type="f32")
    assert (one.argmax(-1) == many.argmax(-1)).mean() >= 0.99
    assert 1e-6 < relative(dense, many) < 0.1


def runtime_ids(path: Path) -> list[int]:
    with runtime.load(path) as model:
        text = (Path(__file__).parent.parent / "examples/heldout.txt").read_text()[:2000]
        return model.tokenize(text)[:300]


def test_predicted_needs_a_predictor(tiny_gguf: Path) -> None:
    with pytest.raises(UserError, match="no predictor that pays") as caught:
        runtime.load(tiny_gguf, ffn="predicted")
    assert "python -m predictors fit" in caught.value.hint


def damaged(path: Path, tmp_path: Path, tensor: str, change: Callable[[np.ndarray[Any, Any]], None], kind: type) -> str:
    copy = tmp_path / "m.gguf"
    shutil.copy(path, copy)
    with GgufFile(copy) as file:
        info = file.tensors[tensor]
    values = np.memmap(copy, kind, "r+", info.offset, info.ne[::-1])
    change(values)
    values.flush()
    with pytest.raises(UserError) as caught:
        runtime.load(copy)
    return caught.value.message


def test_a_damaged_order_is_refused(fitted_gguf: Path, tmp_path: Path) -> None:
    def repeat(values: np.ndarray[Any, Any]) -> None:
        values[3] = values[4]

    def unsort(values: np.ndarray[Any, Any]) -> None:
        values[10] = values[9] + 0.001

    assert "`blk.1.ffn_neuron_index` is no permutation" in damaged(
        fitted_gguf, tmp_path, "blk.1.ffn_neuron_index", repeat, np.int32
    )
    assert "`blk.4.ffn_neuron_freq` is not sorted" in damaged(
        fitted_gguf, tmp_path, "blk.4.ffn_neuron_freq", unsort, np.float32
    )


def test_sparsity_command(fitted_gguf: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    for name in ("curves.png", "curves.html"):
        done = command("runtime", "sparsity", fitted_gguf, "--json", "--plot", tmp_path / name)
        assert done.returncode == 0, done.stderr
    layers = json.loads(done.stdout.splitlines()[-1])["layers"]
    assert len(layers) == 6
    assert all(0.2 < layer["hot"] < 0.8 and 0 < layer["active"] < 0.3 for layer in layers)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "curves.html").read_text()
    assert "carry 80 %" in command("runtime", "sparsity", fitted_gguf).stdout
    refused = command("runtime", "sparsity", tiny_gguf)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 2)
    assert "without calibration" in refused.stderr
    assert command("runtime", "sparsity", fitted_gguf, "--plot", tmp_path / "curves.bmp").returncode == 1
