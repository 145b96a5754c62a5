"""Calibration and predictors of mixtures of experts: what is counted, what is fitted, what is stored."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import STD
from experts import FF, WIDTH, Model
from oracle import random_ids, relative

import runtime
from convert import convert
from predictors import calibration_text, fit_model
from predictors.__main__ import main
from predictors.calibrate import LayerSamples, calibrate
from predictors.evaluate import evaluate
from predictors.margins import FEWEST_TOKENS
from predictors.refit import refit
from predictors.routed import Routed
from runtime.__main__ import main as runtime_main
from runtime.block_runner import BlockRunner
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.numeric

HELDOUT = Path(__file__).parent.parent / "examples/heldout.txt"
TOKENS = 4096
UNSEEN, RANK = 5, 12
MODEL = Model(True, n_blocks=2, experts=8, used=3, sigmoid=True, rotates=(1, 1), windowed=(0, 0))
Array = npt.NDArray[Any]


def plant(weights: dict[str, Array]) -> None:
    """Gates of all experts read the same few directions, and fire for few tokens. The stream's first element is the same
    for every token: a bias, which keeps the router from one of the experts.
    """
    rng = np.random.default_rng(0)
    constant = 6 * STD
    weights["model.embed_tokens.weight"][:, 0] = constant
    directions = rng.normal(size=(RANK, WIDTH)).astype(np.float32)
    for name, values in weights.items():
        if name.endswith(("o_proj.weight", "down.weight")):
            values[:] *= 0.2  # the stream stays what it is
            values[0] = 0
        if name.endswith("gate.weight"):
            values[:] = STD * rng.normal(size=(FF, RANK)) @ directions / np.sqrt(RANK)
            values[:, 0] = -0.3 * np.linalg.norm(values[:, 1:], axis=1)
        if name.endswith("primary_router.weight"):
            values[UNSEEN] = 0
            values[:, 0] = 0
            values[UNSEEN, 0] = -1e3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("planted")
    MODEL.make(made / "planted", plant)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    convert(folder / "planted", folder / "plain.gguf", type="f32", calibration="none")
    return folder / "plain.gguf"


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Path:
    options: dict[str, Any] = {"type": "f32", "calibration_tokens": TOKENS, "energy": 0.99999}
    report = convert(folder / "planted", folder / "fitted.gguf", **options)
    expected = "2 of 16 experts (1 in layer 0, 1 in layer 1) were chosen by no token of the calibration text"
    assert any(note.startswith(expected) for note in report.notes)
    assert any(f"fewer than {FEWEST_TOKENS} of the tokens" in note for note in report.notes)
    return folder / "fitted.gguf"


def windows_of(path: Path) -> Array:
    with Tokenizer(path) as tokenizer:
        return calibration_text.windows(calibration_text.read_corpus(None), tokenizer, TOKENS, 512, 0)


def layers_of(path: Path, n_windows: int) -> Iterator[LayerSamples]:
    windows = windows_of(path)[:n_windows]
    with GgufFile(path) as file, BlockRunner(file, 2, windows.shape[1]) as runner:
        yield from calibrate(runner, windows)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_places_of_experts() -> None:
    routed = Routed(np.array([[2, 0], [0, 3], [2, 3]], np.int32), np.arange(6, dtype=np.float32).reshape(3, 2), 5)
    assert [routed.tokens(e).tolist() for e in range(5)] == [[0, 1], [], [0, 2], [1, 2], []]
    assert [routed.weights(e).tolist() for e in range(5)] == [[1, 2], [], [0, 4], [3, 5], []]
    assert routed.chosen.tolist() == [2, 0, 2, 2, 0]


def test_blocks_say_what_their_experts_do(plain: Path) -> None:
    """Each token's experts, their weights, and what gates say of it, against numpy."""
    with GgufFile(plain) as file, BlockRunner(file, 2, 32) as runner:
        hidden = runner.embed(np.array(random_ids(32, 4000), np.int32))
        for i in range(2):
            result = runner.block(i, hidden)
            assert result.experts is not None and result.expert_weights is not None
            assert result.gate is not None and result.up is not None
            logits = hidden @ runner.rows(f"blk.{i}.ffn_gate_inp.weight", 0, 8).T
            ids = np.argsort(-logits, axis=1)[:, : MODEL.used]
            scores = 1 / (1 + np.exp(-np.take_along_axis(logits, ids, 1)))
            assert np.array_equal(result.experts, ids)
            assert relative(scores / scores.sum(1, keepdims=True), result.expert_weights) < 1e-5
            for role, values in (("gate", result.gate), ("up", result.up)):
                rows = runner.rows(f"blk.{i}.ffn_{role}_exps.weight", 0, 8 * FF).reshape(8, FF, WIDTH)
                expected = np.einsum("nd,nkfd->nkf", result.ffn_input, rows[ids]).reshape(-1, FF)
                assert relative(expected, values) < 1e-5
            hidden = result.output


def test_frequencies_are_of_the_tokens_that_chose_the_expert(fitted: Path, plain: Path) -> None:
    windows = windows_of(plain)
    with GgufFile(fitted) as made, GgufFile(plain) as file, BlockRunner(file, 2, windows.shape[1]) as runner:
        hidden = [runner.embed(window) for window in windows]
        for i in range(2):
            chosen, fired = np.zeros(8), np.zeros((8, FF))
            for k, h in enumerate(hidden):
                result = runner.block(i, h)
                assert result.experts is not None and result.gate is not None
                for expert, gates in zip(result.experts.reshape(-1), result.gate, strict=True):
                    chosen[expert] += 1
                    fired[expert] += gates > 0
                hidden[k] = result.output
            share = fired / np.maximum(chosen, 1)[:, None]
            index = made.read(f"blk.{i}.ffn_neuron_index_exps").view(np.int32).reshape(8, FF)
            freq = made.read(f"blk.{i}.ffn_neuron_freq_exps").view(np.float32).reshape(8, FF)
            assert np.allclose(made.read(f"blk.{i}.expert_freq").view(np.float32), chosen / windows.size)
            assert np.allclose(freq, np.take_along_axis(share, index, 1), atol=1e-6)
            assert chosen[UNSEEN] == 0 and not freq[UNSEEN].any()
            assert index[UNSEEN].tolist() == list(range(FF))
            ties = np.diff(freq[0]) == 0
            assert (np.diff(index[0])[ties] > 0).all()


def test_a_sparse_layout_counts_the_same(folder: Path, plain: Path) -> None:
    """There the blocks compute firing neurons only, so they are counted from the inputs."""
    convert(folder / "planted", folder / "sparse.gguf", type="f32", layout="sparse", calibration="none")
    for sparse, both in zip(layers_of(folder / "sparse.gguf", 4), layers_of(plain, 4), strict=True):
        assert sparse.fired is None and both.fired is not None
        assert np.array_equal(sparse.chosen, both.chosen)
        # A gate near zero may differ by another order of float sums.
        assert np.abs(sparse.frequency - both.frequency).mean() < 1e-4
        assert sparse.active_share == pytest.approx(both.active_share, rel=1e-3)


def test_what_is_kept_is_what_is_computed(plain: Path) -> None:
    for layer in layers_of(plain, 8):
        first = 2 * FF + 8  # some of expert 2
        for part in (layer.validation, layer.test):
            assert part.gate is not None and part.routed is not None
            computed = replace(part, gate=None, up=None)
            kept, again = (layer.responses(p, first, first + 40) for p in (part, computed))
            assert len(kept.gate) == len(part.routed.tokens(2)) == len(layer.tokens(part, first))
            assert relative(again.gate, kept.gate) < 3e-3 and relative(again.energy, kept.energy) < 1e-2


def test_energy_counts_the_routers_weight(plain: Path) -> None:
    for layer in layers_of(plain, 8):
        part, expert = layer.test, 3
        assert part.routed is not None
        first, tokens = expert * FF, part.routed.tokens(expert)
        rows = [layer._rows(f"ffn_{role}_exps", first, first + FF) for role in ("gate", "up", "down_t")]
        gate, up = (part.x[tokens] @ row.T for row in rows[:2])
        made = np.maximum(gate, 0) * up * part.routed.weights(expert)[:, None] * np.linalg.norm(rows[2], axis=1)
        expected = made**2 * part.weight[tokens][:, None]
        assert relative(expected, layer.responses(part, first, first + FF).energy) < 1e-2


# --- what predictors are worth ---------------------------------------------------------------------------------------


def test_planted_structure_is_found(fitted: Path) -> None:
    """Recall on text that no fit saw is what the file promises; so are the bytes."""
    with GgufFile(fitted) as file:
        assert file.structure.predictor_rank == (32, 32)
        assert file.tensors["blk.0.predictor_out_exps.weight"].ne == (32, FF, 8)
        promised = file.metadata["lazyneuron.predictor.recall"]
        bias = file.read("blk.0.predictor_out_exps.bias").view(np.float32).reshape(8, FF)
        assert (bias[UNSEEN] > 1e8).all() and (np.abs(np.delete(bias, UNSEEN, 0)) < 1e3).all()
    found = evaluate(fitted, HELDOUT, tokens=2048)
    dense, exact, predicted = found.modes
    for layer, recall in zip(found.layers, promised, strict=True):
        assert 0.1 < layer.active_share < 0.4
        assert layer.recall > 0.95 and layer.recall == pytest.approx(recall, abs=0.02)
        assert layer.precision > 0.9 and layer.energy_kept > 0.9999
    assert predicted.perplexity == pytest.approx(dense.perplexity, rel=0.01)
    assert predicted.bytes < 0.8 * exact.bytes
    by_layer = sum(f.bytes_predicted for f in found.layers) / sum(f.bytes_dense for f in found.layers)
    assert predicted.bytes == pytest.approx(by_layer, rel=0.03)


def load(path: Path, **options: Any) -> runtime.Model:
    return runtime.load(path, **{"device": "none", "kv_type": "f32", "threads": 2} | options)


@pytest.mark.parametrize("kind", ["lowrank", "signbit"])
def test_every_candidate_is_exact(fitted: Path, tmp_path: Path, kind: str) -> None:
    """And a fitted file's own candidates are those that numpy says, in one token and in many."""
    path = fitted
    if kind != "lowrank":
        path = tmp_path / "o.gguf"
        refit(fitted, path, kind=kind, energy=0.98, tokens=TOKENS)
    ids = random_ids(40, 4000)
    with load(path, ffn="exact") as exact, load(path, predictor_bias=math.inf) as every, load(path) as predicted:
        assert predicted.ffn == "predicted" and any(predicted.structure.predictor_rank)
        expected = exact.logits(ids)
        assert relative(expected, every.logits(ids)) < 1e-5
        many = predicted.logits(ids)
        assert relative(expected, many) < 0.2
        one_by_one = np.concatenate([predicted.logits(ids[: k + 1])[-1:] for k in range(8)])
        assert relative(one_by_one, many[:8]) < 1e-4


def test_verified_gives_the_tokens_of_exact(fitted: Path) -> None:
    texts = []
    for ffn in ("exact", "verified"):
        with load(fitted, ffn=ffn) as model:
            texts.append("".join(model.generate("The state of the union", 24, Sampling(temperature=0))))
    assert texts[0] == texts[1]


def test_refitting_keeps_everything_else(fitted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.gguf"
    options = ["--calibration-tokens", str(TOKENS), "--kind", "signbit", "--energy", "0.98"]
    assert main(["fit", str(fitted), str(out), *options]) == 0
    assert "experts (1 in layer 0, 1 in layer 1) were chosen by no token" in capfd.readouterr().err
    with GgufFile(fitted) as before, GgufFile(out) as after:
        kept = [name for name in before.tensors if ".predictor_" not in name]
        assert [name for name in after.tensors if ".predictor_" not in name] == kept
        assert all(np.array_equal(before.read(name), after.read(name)) for name in kept)
        assert after.structure.predictor == "signbit" and any(after.structure.predictor_rank)


def test_commands_show_experts(fitted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """How unevenly they are chosen, and how many neurons fire of those that a token may use."""
    assert runtime_main(["sparsity", str(fitted), "--json"]) == 0
    layers = json.loads(capfd.readouterr().out.splitlines()[-1])["layers"]
    assert runtime_main(["inspect", str(fitted), "--json"]) == 0
    shown = json.loads(capfd.readouterr().out.splitlines()[-1])
    with GgufFile(fitted) as file:
        for i, layer in enumerate(layers):
            chosen, fired = (
                file.read(f"blk.{i}.{n}").view(np.float32) for n in ("expert_freq", "ffn_neuron_freq_exps")
            )
            assert layer["experts"]["most"] == pytest.approx(chosen.max()) and layer["experts"]["least"] == 0
            assert 0 < layer["experts"]["hot"] < 1
            expected = (chosen * fired.reshape(8, FF).mean(1)).sum() / MODEL.used
            assert layer["active"] == pytest.approx(expected, rel=1e-4)
            assert shown["sparsity"]["layer_shares"][i] == pytest.approx(expected, rel=1e-4)
    assert "ffn_gate" in {group["kind"] for group in shown["groups"]}
    assert runtime_main(["sparsity", str(fitted)]) == 0
    assert "most chosen" in capfd.readouterr().out
    out = tmp_path / "report.html"
    machine = ["--device-bandwidth", "200", "--cpu-bandwidth", "50"]
    assert runtime_main(["report", str(fitted), str(out), "--json", *machine]) == 0
    reported = json.loads(capfd.readouterr().out.splitlines()[-1])["layers"]
    assert [layer["experts"]["most"] for layer in reported] == pytest.approx([ly["experts"]["most"] for ly in layers])
    page = out.read_text(encoding="utf-8")
    table = page[page.index("Table: experts by layer") :].split("</table>")[0]
    assert all(f"<td>{100 * layer['experts']['most']:.1f}%</td>" in table for layer in layers), table


def test_what_is_not_there_for_experts(folder: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predictor kind `mlp` for a mixture of experts, expected lowrank or signbit"):
        fit_model(plain, kind="mlp", tokens=TOKENS)
    for option in ("import_predictor", "activations"):
        given: dict[str, Any] = {option: tmp_path}
        with pytest.raises(UserError, match="for a mixture of experts"):
            convert(folder / "planted", tmp_path / "o.gguf", **given)
    assert list(tmp_path.iterdir()) == []
