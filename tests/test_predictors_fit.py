"""Calibration and fits of whole models: what is counted, what is kept, what is refused, and what the bundled model gets out of it."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_llama
from oracle import random_ids, relative
from plain import convert

import runtime
from predictors import calibration_text, fit_model
from predictors.__main__ import main
from predictors.calibrate import LayerSamples, calibrate, default_tokens, split
from predictors.evaluate import Evaluation, evaluate
from predictors.fit import fit_candidates
from predictors.replace_predictors import replace_predictors
from runtime.block_runner import BlockRunner
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import copied, copied_keys, write_gguf
from runtime.text.tokenizer import Tokenizer

Converted = Callable[..., Path]
HELDOUT = Path(__file__).parent.parent / "examples/heldout.txt"
FEW = 2048


def refit(model: Path, out: Path, *options: object) -> Path:
    assert main(["fit", str(model), str(out), "--calibration-tokens", str(FEW), "--force", *map(str, options)]) == 0
    return out


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected a calibration text"),
        (b"  \n ", "empty, expected a calibration text"),
        (b"caf\xe9", "byte 3 is 0xe9, expected UTF-8 text"),
        (b"Too short a text. " * 20, "tokens of calibration text, expected at least"),
    ],
)
def test_calibration_texts_that_will_not_do(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    assert main(["fit", str(tiny_gguf), str(tmp_path / "o.gguf"), "--calibration", str(corpus)]) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and message in error and "corpus.txt" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [corpus]


def test_options_that_will_not_do(tiny_gguf: Path) -> None:
    for options, message in (
        ({"kind": "oracle"}, "predictor kind `oracle`, expected one of"),
        ({"energy": 1.5}, "energy 1.5, expected"),
        ({"predictor_type": "q2_K"}, "predictor type `q2_K`, expected one of auto"),
        ({"tokens": 3}, "3 calibration tokens, expected at least"),
        ({"tokens": 10**6}, "tokens of calibration text, expected at least"),
    ):
        with pytest.raises(UserError, match=message):
            fit_model(tiny_gguf, **options)  # type: ignore[arg-type]


def test_windows(tiny_gguf: Path) -> None:
    corpus = calibration_text.read_corpus(None)
    with Tokenizer(tiny_gguf) as tokenizer:
        first, again, other = (calibration_text.windows(corpus, tokenizer, 4096, 1024, seed) for seed in (0, 0, 1))
        assert first.shape == (4096 // 204, 204)
        assert (first[:, 0] == tokenizer.bos).all() and (first[:, 1:] != tokenizer.bos).all()
        ids = tokenizer.encode(corpus.text, add_special=False)
        assert ids[: 203 * 5] == calibration_text.cut(np.array(ids, np.int32), [1], 204)[:5, 1:].ravel().tolist()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len({tuple(window) for window in first.tolist()}) == len(first)


def test_shares_of_the_windows() -> None:
    assert [s.stop - s.start for s in split(48)] == [37, 8, 3]
    assert [s.stop - s.start for s in split(32)] == [25, 5, 2]
    assert [s.stop - s.start for s in split(3)] == [1, 1, 1]


def test_tokens_are_bounded_for_wide_models(tiny_gguf: Path) -> None:
    with GgufFile(tiny_gguf) as file:
        s = file.structure
    assert default_tokens(s) == 24576
    for n_embd in (4096, 8192, 16384):
        wide = replace(s, embedding_length=n_embd)
        assert default_tokens(wide) * n_embd * 2 * 4 <= 1 << 29


def test_every_layer_keeps_its_own_counts(tmp_path: Path) -> None:
    """Twelve layers: frequencies agree with what the runtime's operators count, layer by layer."""
    make_llama(tmp_path / "twelve", num_hidden_layers=12)
    convert(tmp_path / "twelve", tmp_path / "m.gguf", type="f32")
    fit = fit_model(tmp_path / "m.gguf", tokens=FEW)
    with Tokenizer(tmp_path / "m.gguf") as tokenizer:
        windows = calibration_text.windows(calibration_text.read_corpus(None), tokenizer, FEW, 1024, 0)
    with runtime.load(tmp_path / "m.gguf", ffn="exact", kv_type="f32") as model:
        for window in windows:
            model.logits(window)
        counted = model.layer_shares()
    found = [float(block.freq.mean()) for block in fit.blocks]
    assert len(found) == 12
    assert np.allclose(found, counted, atol=2e-4)
    assert len({round(share, 4) for share in counted}) > 6  # layers do differ


def test_frequencies_and_order(tiny_gguf: Path) -> None:
    fit = fit_model(tiny_gguf, tokens=FEW)
    with Tokenizer(tiny_gguf) as tokenizer:
        windows = calibration_text.windows(calibration_text.read_corpus(None), tokenizer, FEW, 1024, 0)
    with BlockRunner(GgufFile(tiny_gguf), 2, windows.shape[1]) as runner:
        hidden = [runner.embed(window) for window in windows]
        for i, block in enumerate(fit.blocks):
            counts = np.zeros(1024)
            for k, h in enumerate(hidden):
                result = runner.block(i, h)
                assert result.gate is not None
                counts += (result.gate > 0).sum(0)
                hidden[k] = result.output
            fired = counts / windows.size
            assert np.array_equal(np.sort(block.order), np.arange(1024))
            assert (np.diff(block.freq) <= 0).all()
            assert np.allclose(block.freq, fired[block.order], atol=1e-6)
            ties = np.diff(block.freq) == 0
            assert (np.diff(block.order)[ties] > 0).all()


def test_what_neurons_say_is_kept_of_the_windows_that_judge(tiny_gguf: Path) -> None:
    with Tokenizer(tiny_gguf) as tokenizer:
        windows = calibration_text.windows(calibration_text.read_corpus(None), tokenizer, FEW, 1024, 0)
    with BlockRunner(GgufFile(tiny_gguf), 2, windows.shape[1]) as runner:
        for layer in calibrate(runner, windows):
            assert layer.fit.gate is None and layer.fit.up is None
            for part in (layer.validation, layer.test):
                assert part.gate is not None and part.up is not None
                computed = replace(part, gate=None, up=None)
                assert relative(layer.gate(computed, 100, 300), layer.gate(part, 100, 300)) < 3e-3
                kept, again = (layer.responses(p, 100, 300) for p in (part, computed))
                assert (kept.fired != again.fired).mean() < 2e-3
                assert relative(again.energy, kept.energy) < 1e-2
                assert layer.frequency[100:300] == pytest.approx(all_fired(layer, 100, 300), abs=3e-3)


def all_fired(layer: LayerSamples, first: int, end: int) -> np.ndarray:
    parts = (replace(part, gate=None) for part in (layer.fit, layer.validation, layer.test))
    return np.concatenate([layer.gate(part, first, end) > 0 for part in parts]).mean(0)


# --- files -----------------------------------------------------------------------------------------------------------


def test_fit_keeps_everything_else(fitted_gguf: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    for model, order in ((fitted_gguf, "hot"), (tiny_gguf, "original")):
        out = refit(model, tmp_path / "o.gguf", "--kind", "signbit", "--energy", "0.99")
        with GgufFile(model) as before, GgufFile(out) as after:
            kept = [name for name in before.tensors if ".predictor_" not in name]
            assert [name for name in after.tensors if ".predictor_" not in name] == kept
            assert all(np.array_equal(before.read(name), after.read(name)) for name in kept)
            assert after.structure.neuron_order == order
            assert after.structure.predictor == "signbit"
            ours = ("lazyneuron.predictor.", "lazyneuron.calibration.")
            for key, value in before.metadata.items():
                if not key.startswith(ours):
                    assert np.array_equal(after.metadata[key], value), key


def test_same_seed_same_bytes(tiny_gguf: Path, tmp_path: Path) -> None:
    first, second, other = (
        refit(tiny_gguf, tmp_path / f"{i}.gguf", "--seed", seed).read_bytes() for i, seed in enumerate((3, 3, 4))
    )
    assert first == second != other


def test_predictor_none_and_back(fitted_gguf: Path, tmp_path: Path) -> None:
    without = refit(fitted_gguf, tmp_path / "none.gguf", "--kind", "none")
    with GgufFile(without) as file:
        assert file.structure.predictor == "none"
        assert file.structure.predictor_rank == ()
        assert file.structure.neuron_order == "hot"
        assert not any(".predictor_" in name for name in file.tensors)
    again = refit(without, tmp_path / "again.gguf")
    with runtime.load(again) as model:
        assert model.ffn == "predicted"


def test_targets_that_will_not_do(tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.gguf"
    shutil.copy(tiny_gguf, there)
    for arguments, message in (
        ((tiny_gguf, there), "exists already"),
        ((tiny_gguf, tmp_path), "a folder, expected a file name"),
        ((tiny_gguf, tmp_path / "no" / "o.gguf"), "no such folder"),
        ((there, there, "--force"), "is the source itself"),
        ((tmp_path / "absent.gguf", tmp_path / "o.gguf"), "No such file"),
        ((tiny_gguf, tmp_path / "o.gguf", "--kind", "oracle"), "invalid choice"),
    ):
        assert main(["fit", *map(str, arguments)]) == 1
        error = capfd.readouterr().err
        assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == [there]


def test_an_interrupt_leaves_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    """It comes as soon as the text has been read, which comes through a pipe."""
    corpus = tmp_path / "corpus.txt"
    os.mkfifo(corpus)
    for stop in (signal.SIGINT, signal.SIGTERM):
        words = ("predictors", "fit", str(tiny_gguf), str(tmp_path / "o.gguf"), "--calibration", str(corpus))
        with subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True) as process:
            corpus.write_bytes(calibration_text.DEFAULT_CORPUS.read_bytes())
            process.send_signal(stop)
            _, error = process.communicate(timeout=600)
        assert process.returncode in (130, 143), error
        assert "Traceback" not in error
        assert list(tmp_path.iterdir()) == [corpus]


def test_a_failed_write_leaves_nothing(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        replace_predictors(tiny_gguf, tmp_path / "o.gguf", [[]], {})  # tensors for one block only
    assert list(tmp_path.iterdir()) == []


# --- what it is worth ------------------------------------------------------------------------------------------------


def test_all_energy_is_exact(tiny_gguf: Path, tmp_path: Path) -> None:
    out = refit(tiny_gguf, tmp_path / "o.gguf", "--energy", 1)
    ids = random_ids(100, 4000)
    with runtime.load(out) as model, runtime.load(tiny_gguf, ffn="exact") as exact:
        assert model.structure.predictor_rank == (0,) * 6
        assert model.ffn == "exact"
        assert np.array_equal(model.logits(ids), exact.logits(ids))


@pytest.mark.parametrize("kind", ["lowrank", "signbit"])
def test_infinite_bias_is_exact(tiny_gguf: Path, tmp_path: Path, kind: str) -> None:
    out = refit(tiny_gguf, tmp_path / "o.gguf", "--kind", kind, "--energy", 0.98)
    ids = random_ids(100, 4000)
    with runtime.load(out, predictor_bias=math.inf) as model, runtime.load(tiny_gguf, ffn="exact") as exact:
        assert model.ffn == "predicted"
        assert relative(exact.logits(ids), model.logits(ids)) <= 1e-5


@pytest.mark.parametrize("kind", ["lowrank", "signbit"])
def test_evaluation_agrees_with_the_runtime(tiny_gguf: Path, tmp_path: Path, kind: str) -> None:
    """Shares computed in numpy from the stored tensors are those that the operators count."""
    found = evaluate(refit(tiny_gguf, tmp_path / "o.gguf", "--kind", kind), HELDOUT, tokens=FEW)
    by_layer = sum(f.bytes_predicted for f in found.layers) / sum(f.bytes_dense for f in found.layers)
    # The runtime's inputs are those of predicted mode, a little different from layer to layer.
    assert modes(found)["predicted"].bytes == pytest.approx(by_layer, rel=0.03)
    assert modes(found)["exact"].bytes == pytest.approx(0.38, abs=0.02)
    assert all(f.recall > 0.5 and f.energy_kept > 0.9 for f in found.layers)


def test_evaluation_of_a_predictor_that_looks_at_the_residual(fitted_gguf: Path, tmp_path: Path) -> None:
    """As imported ones do; fits never make one, so this one's candidates are wrong, but the same for both."""
    out = tmp_path / "o.gguf"
    with GgufFile(fitted_gguf) as file:
        keys = copied_keys(fitted_gguf) | {"lazyneuron.predictor.tap": "residual"}
        write_gguf(out, keys, [copied(file, name) for name in file.tensors])
        usual = file.metadata["lazyneuron.predictor.predicted_share"][0]
    first = evaluate(out, HELDOUT, tokens=FEW).layers[0]
    with Tokenizer(out) as tokenizer, runtime.load(out, ffn="predicted") as model:
        corpus = calibration_text.read_corpus(HELDOUT)
        for window in calibration_text.cut(*calibration_text.encode(corpus, tokenizer), 512)[: FEW // 512]:
            model.logits(window.tolist())
        assert model.gate_shares()[0] == pytest.approx(first.predicted_share, rel=0.01)
    assert abs(first.predicted_share - usual) > 0.05


def modes(found: Evaluation) -> dict[str, object]:
    return {m.mode: m for m in found.modes}


def test_evaluation_of_a_sparse_layout(
    checkpoint: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoint("bundled"), tmp_path / "m.gguf", layout="sparse")
    refit(tmp_path / "m.gguf", tmp_path / "o.gguf")
    assert main(["evaluate", str(tmp_path / "o.gguf"), str(HELDOUT), "--tokens", "1024", "--json"]) == 0
    assert "compared with exact" in capfd.readouterr().out


def assert_good(path: Path, worse: float, read: float) -> None:
    """On text that no fit saw, predicted is at most so much worse than dense, for at most such a share of the bytes."""
    dense, exact, predicted = evaluate(path, HELDOUT, tokens=4096).modes
    assert (dense.mode, exact.mode, predicted.mode) == ("dense", "exact", "predicted")
    assert predicted.perplexity <= dense.perplexity * (1 + worse)
    assert predicted.bytes <= read
    assert 0.35 < exact.bytes < 0.40


@pytest.mark.numeric
def test_the_bundled_model_stays_good(fitted_gguf: Path) -> None:
    with GgufFile(fitted_gguf) as file:
        assert file.metadata["lazyneuron.predictor.energy"] == pytest.approx(0.997)
    assert_good(fitted_gguf, worse=0.005, read=0.14)


def test_the_bundled_model_stays_good_with_quantised_weights(converted: Converted, tmp_path: Path) -> None:
    """Fitted once; what is chosen for less energy reads less."""
    fitted = fit_candidates(converted("bundled", "q4_0"))
    for energy, worse, read in ((0.997, 0.005, 0.24), (0.98, 0.025, 0.17)):
        made = fitted.at(energy, reorder=False)
        replace_predictors(
            converted("bundled", "q4_0"), tmp_path / "o.gguf", [b.tensors for b in made.blocks], made.metadata
        )
        assert_good(tmp_path / "o.gguf", worse, read)
