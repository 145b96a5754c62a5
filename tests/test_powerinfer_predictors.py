"""PowerInfer's predictors and activation counts, imported: the same decisions, measured at the right place, in the order of the layers' numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_llama
from oracle import max_difference, random_ids
from plain import convert
from powerinfer_files import Array, predictor_arrays, save_predictors
from predictor_harness import native_candidates

import runtime
from predictors import calibration_text
from predictors.hot_order import as_frequencies
from predictors.stored_predictor import stored_predictor
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.numeric

Folder = Callable[[str], Path]
WIDTH, NEURONS, RANK = 32, 256, 20  # the checkpoints' and the predictors'
DEEP = 12  # layers: as texts, 10 and 11 come before 2
TOKENS = 1024


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "model"
    make_llama(folder, num_hidden_layers=DEEP)
    return folder


def save_counts(folder: Path, counts: Array) -> Path:
    (folder / "activation").mkdir(parents=True)
    for i, row in enumerate(counts):
        torch.save(torch.from_numpy(row), folder / "activation" / f"activation_{i}.pt")
    return folder


def decisions(fc1: Array, fc2: Array, x: Array, threshold: float) -> Array:
    """PowerInfer's: whether fc2 relu(fc1 x) is at least the threshold."""
    inner = np.maximum(x.astype(np.float64) @ fc1.astype(np.float64).T, 0)
    found: Array = inner @ fc2.astype(np.float64).T >= threshold
    return found


# --- decisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [None, 0.0, 3.0, -5.0])
def test_decisions_are_reproduced_exactly(
    checkpoint: Folder, tmp_path: Path, variant: str, threshold: float | None
) -> None:
    """Scores are whole numbers, so that not one may differ; many equal the threshold itself."""
    layers = predictor_arrays(2, WIDTH, NEURONS, RANK)
    layers = [(fc1, np.where(np.abs(fc2) > 1, fc2, 0).astype(np.float32)) for fc1, fc2 in layers]
    source = save_predictors(tmp_path / "predictors", layers, threshold)
    convert(checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=source, predictor_type="f32")
    x = np.random.default_rng(1).integers(-2, 3, (64, WIDTH)).astype(np.float32)
    x[0] = 0  # every score is 0
    with GgufFile(tmp_path / "x.gguf") as file:
        for i, (fc1, fc2) in enumerate(layers):
            expected = decisions(fc1, fc2, x, threshold or 0.0)
            assert 0 < expected.mean() < 1
            assert (np.maximum(x @ fc1.T, 0) @ fc2.T == (threshold or 0.0)).sum() > 20
            found = stored_predictor(file, i)
            assert found is not None
            candidate, bias = found
            scores = candidate.scores(candidate.prepare(x), 0, NEURONS)
            assert np.array_equal(scores + bias > 0, expected)
            some = slice(0, WIDTH)  # as many neurons as the harness can tell apart
            rows = candidate.tensors[1]
            few = type(rows)(rows.name, rows.type, (RANK, WIDTH), rows.data[: rows.nbytes // NEURONS * WIDTH])
            native = native_candidates("mlp", (candidate.tensors[0], few), bias[some], x)
            assert np.array_equal(native, expected[:, some])


def test_what_the_file_says(checkpoint: Folder, tmp_path: Path) -> None:
    source = save_predictors(tmp_path / "predictors", predictor_arrays(2, WIDTH, NEURONS, 64), 0.25)
    report = convert(checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=source)
    with GgufFile(tmp_path / "x.gguf") as file:
        s, keys = file.structure, file.metadata
        assert {file.tensors[f"blk.1.predictor_{part}.weight"].type for part in ("in", "out")} == {"q8_0"}
    assert (s.predictor, s.predictor_tap, s.predictor_rank) == ("mlp", "residual", (64, 64))
    assert (s.neuron_order, s.predictor_error) == ("original", (1.0, 1.0))
    assert keys["lazyneuron.predictor.source"] == "predictors"
    assert keys["lazyneuron.predictor.threshold"] == 0.25
    assert "lazyneuron.predictor.recall" not in keys
    assert report.fallbacks == {}


def test_a_rank_that_is_no_multiple_of_a_block(checkpoint: Folder, tmp_path: Path) -> None:
    source = save_predictors(tmp_path / "predictors", predictor_arrays(2, WIDTH, NEURONS, RANK))
    report = convert(checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=source, predictor_type="q4_0")
    assert report.fallbacks == {f"blk.{i}.predictor_out.weight": "f16" for i in (0, 1)}
    with runtime.load(tmp_path / "x.gguf", ffn="predicted") as model:
        assert np.isfinite(model.logits(random_ids(16, 4000))).all()


# --- layers ----------------------------------------------------------------------------------------------------------


def test_more_than_ten_layers_stay_in_order(deep: Path, tmp_path: Path) -> None:
    layers = [(fc1 + i, fc2) for i, (fc1, fc2) in enumerate(predictor_arrays(DEEP, WIDTH, NEURONS, RANK))]
    counts = np.random.default_rng(0).integers(0, 1000, (DEEP, NEURONS))
    predictors, activations = save_predictors(tmp_path / "p", layers), save_counts(tmp_path / "a", counts)
    convert(
        deep,
        tmp_path / "x.gguf",
        import_predictor=predictors,
        activations=activations,
        predictor_type="f32",
        type="f32",
    )
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.structure.neuron_order == "hot"
        assert file.metadata["lazyneuron.calibration.counts"] == "a"
        for i, (fc1, fc2) in enumerate(layers):
            order = file.read(f"blk.{i}.ffn_neuron_index").view(np.int32)
            assert np.array_equal(order, np.argsort(-counts[i], kind="stable"))
            assert np.array_equal(file.read(f"blk.{i}.predictor_in.weight").view(np.float32).reshape(RANK, -1), fc1)
            rows = file.read(f"blk.{i}.predictor_out.weight").view(np.float32).reshape(NEURONS, -1)
            assert np.array_equal(rows, fc2[order])
            freq = file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32)
            assert np.allclose(freq, counts[i][order] / counts[i].max())


def test_the_order_changes_no_result(deep: Path, tmp_path: Path) -> None:
    ids = random_ids(64, 4000)
    predictors = save_predictors(tmp_path / "p", predictor_arrays(DEEP, WIDTH, NEURONS, RANK))
    counts = save_counts(tmp_path / "a", np.random.default_rng(0).integers(0, 1000, (DEEP, NEURONS)))
    made = partial(convert, deep, import_predictor=predictors, predictor_type="f32", type="f32")
    made(tmp_path / "x.gguf")
    made(tmp_path / "y.gguf", activations=counts)
    for mode in ("dense", "exact", "predicted"):
        found = []
        for name in ("x", "y"):
            with runtime.load(tmp_path / f"{name}.gguf", ffn=mode, kv_type="f32") as model:
                found.append(model.logits(ids))
        assert max_difference(*found) <= 2e-3


def test_counts_order_fitted_models_too(checkpoint: Folder, tmp_path: Path) -> None:
    """With the mean that the calibration text shows."""
    counts = np.random.default_rng(0).integers(1, 1000, (2, NEURONS))
    folder = save_counts(tmp_path / "a", counts)
    made = partial(convert, checkpoint("llama-mha"), calibration=None, calibration_tokens=TOKENS)
    made(tmp_path / "x.gguf")
    made(tmp_path / "y.gguf", activations=folder)
    with GgufFile(tmp_path / "x.gguf") as plain, GgufFile(tmp_path / "y.gguf") as counted:
        for i in range(2):
            order = counted.read(f"blk.{i}.ffn_neuron_index").view(np.int32)
            assert np.array_equal(order, np.argsort(-counts[i], kind="stable"))
            means = [file.read(f"blk.{i}.ffn_neuron_freq").view(np.float32).mean() for file in (plain, counted)]
            assert means[0] == pytest.approx(means[1], abs=1e-3)


@pytest.mark.parametrize("share", [None, 0.01, 0.3, 0.62])
def test_frequencies_keep_the_counts_order(share: float | None) -> None:
    counts = np.float32([5, 0, 10, 10, 1, 0, 2, 30])
    found = as_frequencies(counts, share)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.all(np.diff(found[np.argsort(counts)]) >= 0)
    assert np.array_equal(found == 0, counts == 0)
    if share is None:
        assert np.allclose(found, counts / 30)
    else:
        assert found.mean() == pytest.approx(share, abs=1e-6)
        free = found < 1
        assert np.allclose(found[free] * 2, counts[free] / counts[free].max() * found[free].max() * 2)
    assert as_frequencies(np.zeros(3, np.float32), share).tolist() == [0, 0, 0]
    assert as_frequencies(counts, 0.99).mean() == pytest.approx(6 / 8)  # all that have a count


# --- measuring -------------------------------------------------------------------------------------------------------


def seen_by_transformers(checkpoint: Path, windows: Array) -> tuple[list[Array], list[Array]]:
    """By layer: the stream before the FFN's norm, [n_tokens, n_embd], and which neurons fire."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    streams: list[list[Any]] = [[] for _ in model.model.layers]
    gates: list[list[Any]] = [[] for _ in model.model.layers]
    for i, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, given, i=i: streams[i].append(given[0]))
        layer.mlp.gate_proj.register_forward_hook(lambda _m, _given, out, i=i: gates[i].append(out > 0))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor(window[None]))
    return tuple([torch.cat([t[0] for t in layer]).numpy() for layer in kept] for kept in (streams, gates))  # type: ignore[return-value]


def test_figures_equal_transformers(checkpoint: Folder, tmp_path: Path) -> None:
    """Recall and shares of what PowerInfer would decide from the stream that transformers has there."""
    layers, threshold = predictor_arrays(2, WIDTH, NEURONS, RANK), 4.0
    source, out = save_predictors(tmp_path / "predictors", layers, threshold), tmp_path / "x.gguf"
    report = convert(
        checkpoint("llama-mha"), out, type="f32", import_predictor=source, predictor_type="f32", calibration=None, calibration_tokens=TOKENS
    )  # fmt: skip
    with Tokenizer(out) as tokenizer:
        windows = calibration_text.windows(calibration_text.read_corpus(None), tokenizer, TOKENS, 1024, seed=0)
    streams, fired = seen_by_transformers(checkpoint("llama-mha"), windows)
    with GgufFile(out) as file:
        keys = {k.removeprefix("lazyneuron."): v for k, v in file.metadata.items() if k.startswith("lazyneuron.")}
        assert keys["calibration.tokens"] == windows.size
        assert keys["calibration.method"] == "predictors made elsewhere, measured"
        for i, (fc1, fc2) in enumerate(layers):
            predicted = decisions(fc1, fc2, streams[i], threshold)
            expected = {
                "active_share": fired[i].mean(),
                "predicted_share": predicted.mean(),
                "recall": (predicted & fired[i]).sum() / fired[i].sum(),
                "precision": (predicted & fired[i]).sum() / predicted.sum(),
            }
            found = {name: keys[f"predictor.{name}"][i] for name in expected}
            assert found == pytest.approx(expected, abs=1e-4)
            assert keys["predictor.error"][i] > 0
            freq, order = (file.read(f"blk.{i}.ffn_neuron_{part}") for part in ("freq", "index"))
            assert np.allclose(freq.view(np.float32), fired[i].mean(0)[order.view(np.int32)], atol=3 / TOKENS)
    assert report.notes[0].startswith("the imported predictors find ")
    assert report.notes[0].endswith("in exact mode")


def test_predictors_that_do_not_pay(checkpoint: Folder, tmp_path: Path) -> None:
    """Four times as many elements as the gate has."""
    source = save_predictors(tmp_path / "predictors", predictor_arrays(2, WIDTH, NEURONS, 4 * WIDTH))
    report = convert(
        checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=source, calibration=None, calibration_tokens=512
    )
    assert report.notes[0].endswith(": they do not pay, so run it with --ffn exact")


# --- files that are converted already --------------------------------------------------------------------------------


def test_a_converted_file_gets_other_predictors(checkpoint: Folder, tmp_path: Path) -> None:
    """The same as an import with the conversion; neurons that were moved stay where they are, and so does every other byte."""
    layers = predictor_arrays(2, WIDTH, NEURONS, RANK)
    source = save_predictors(tmp_path / "p", layers, 1.0)
    measure: dict[str, Any] = {"calibration": None, "calibration_tokens": TOKENS}
    old, new, at_once = (tmp_path / f"{name}.gguf" for name in ("old", "new", "at_once"))
    convert(checkpoint("llama-mha"), old, **measure)
    convert(old, new, import_predictor=source, predictor_type="f32", **measure)
    convert(checkpoint("llama-mha"), at_once, import_predictor=source, predictor_type="f32", **measure)
    with GgufFile(old) as before, GgufFile(new) as after, GgufFile(at_once) as expected:
        errors = after.structure.predictor_error
        assert errors == pytest.approx(expected.structure.predictor_error, rel=1e-2)  # on neurons in another order
        assert after.structure == replace(expected.structure, predictor_error=errors)
        assert after.metadata.keys() == expected.metadata.keys()
        for name in expected.tensors:
            assert np.array_equal(after.read(name), expected.read(name)), name
            if ".predictor_" not in name:
                assert np.array_equal(after.read(name), before.read(name)), name
        order = after.read("blk.1.ffn_neuron_index").view(np.int32)
        rows = after.read("blk.1.predictor_out.weight").view(np.float32).reshape(NEURONS, -1)
        assert np.array_equal(rows, layers[1][1][order])
        assert after.metadata["lazyneuron.predictor.recall"] == pytest.approx(
            expected.metadata["lazyneuron.predictor.recall"], abs=1e-3
        )


@pytest.mark.parametrize("option", [{"layout": "both"}, {"type": "q8_0"}, {"activations": "a"}, {"ffn_type": "relu"}])
def test_what_a_converted_file_keeps(tiny_gguf: Path, tmp_path: Path, option: dict[str, Any]) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(UserError, match=f"--{name}: does not apply to a file that is converted already"):
        convert(tiny_gguf, tmp_path / "x.gguf", import_predictor="p", **option)


def test_a_file_over_itself(converted: Callable[..., Path], tmp_path: Path) -> None:
    source = save_predictors(tmp_path / "p", predictor_arrays(2, WIDTH, NEURONS, RANK))
    path = tmp_path / "x.gguf"
    path.write_bytes(converted("llama-mha").read_bytes())
    with pytest.raises(UserError, match="is the source itself"):
        convert(path, path, import_predictor=source, force=True)


# --- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('owned').touch()",))


def test_pickles_run_nothing(checkpoint: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    predictors = save_predictors(tmp_path / "p", predictor_arrays(2, WIDTH, NEURONS, RANK))
    torch.save({"fc1.weight": Evil(), "fc2.weight": Evil()}, predictors / "model_1.pt")
    counts = save_counts(tmp_path / "a", np.ones((2, NEURONS)))
    torch.save(Evil(), counts / "activation/activation_0.pt")
    for options in ({"import_predictor": predictors}, {"activations": counts}):
        with pytest.raises(UserError, match="damaged, cut off or not just weights"):
            convert(checkpoint("llama-mha"), tmp_path / "x.gguf", **options)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a", "p"]


def break_predictors(folder: Path, how: str) -> None:
    fc1, fc2 = (torch.ones(RANK, WIDTH), torch.ones(NEURONS, RANK))
    contents: dict[str, Any] = {
        "a bias": {"fc1.weight": fc1, "fc2.weight": fc2, "fc1.bias": torch.ones(RANK)},
        "another width": {"fc1.weight": torch.ones(RANK, 48), "fc2.weight": fc2},
        "another rank": {"fc1.weight": fc1, "fc2.weight": torch.ones(NEURONS, RANK + 1)},
        "integers": {"fc1.weight": fc1.int(), "fc2.weight": fc2},
        "a tensor": fc1,
    }
    if how == "one missing":
        (folder / "model_0.pt").rename(folder / "model_00a.pt")
    elif how == "one too many":
        torch.save(contents["a bias"], folder / "model_2.pt")
    elif how == "cut off":
        (folder / "model_1.pt").write_bytes((folder / "model_1.pt").read_bytes()[:-500])
    elif how == "no number":
        (folder / "config.json").write_text('{"sparse_threshold": "high"}')
    else:
        torch.save(contents[how], folder / "model_1.pt")


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("a bias", "holds fc1.bias, fc1.weight, fc2.weight, expected fc1.weight and fc2.weight"),
        ("another width", "fc1.weight is [20, 48] and fc2.weight [256, 20], expected [rank, 32] and [256, rank]"),
        ("another rank", "fc2.weight [256, 21], expected"),
        ("integers", "tensors of type torch.int32"),
        ("a tensor", "a Tensor, expected a dict of tensors"),
        ("one missing", "no model_0.pt, expected model_0.pt to model_1.pt for the model's 2 layers"),
        ("one too many", "a model_2.pt, expected"),
        ("cut off", "damaged, cut off"),
        ("no number", '`sparse_threshold` is "high", expected a number'),
    ],
)
def test_broken_predictors(checkpoint: Folder, tmp_path: Path, how: str, complaint: str) -> None:
    folder = save_predictors(tmp_path / "p", predictor_arrays(2, WIDTH, NEURONS, RANK))
    break_predictors(folder, how)
    with pytest.raises(UserError) as error:
        convert(checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=folder)
    assert complaint in error.value.message
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        (np.ones((2, 255)), "shape [255], expected [256]"),
        (np.ones((1, NEURONS)), "no activation_1.pt"),
        (-np.ones((2, NEURONS)), "counts below zero"),
        (np.full((2, NEURONS), np.nan), "counts below zero or not finite"),
    ],
)
def test_broken_counts(checkpoint: Folder, tmp_path: Path, counts: Array, complaint: str) -> None:
    folder = save_counts(tmp_path / "a", counts)
    with pytest.raises(UserError) as error:
        convert(checkpoint("llama-mha"), tmp_path / "x.gguf", activations=folder)
    assert complaint in error.value.message
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("options", [{"predictor": "signbit"}, {"energy": 0.9}])
def test_a_fit_and_an_import_at_once(checkpoint: Folder, tmp_path: Path, options: dict[str, Any]) -> None:
    folder = save_predictors(tmp_path / "p", predictor_arrays(2, WIDTH, NEURONS, RANK))
    with pytest.raises(UserError, match="does not apply to imported predictors"):
        convert(checkpoint("llama-mha"), tmp_path / "x.gguf", import_predictor=folder, **options)


def test_a_folder_that_does_not_exist(checkpoint: Folder, tmp_path: Path) -> None:
    for options in ({"import_predictor": tmp_path / "no"}, {"activations": tmp_path / "no"}):
        with pytest.raises(UserError, match=r"no such folder, expected a folder with \w+_0.pt"):
            convert(checkpoint("llama-mha"), tmp_path / "x.gguf", **options)
