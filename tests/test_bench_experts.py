"""The benchmarks' models with experts: what is planted is what is measured, and llama.cpp's twin is the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import llama_logits, mode_errors
from twins import difference_from_its_twin

from bench import stock
from bench.make_model import Recipe, measure, random_ids, write_model
from bench.pool import decode
from bench.shapes import SHAPES, shape
from runtime.block_runner import BlockRunner
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

RECIPES = {name: Recipe(name, 0.2, "q4_0") for name in ("tiny-smallthinker", "tiny-mixtral")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bench-experts")
    for name, recipe in RECIPES.items():
        write_model(recipe, folder / f"{name}.gguf")
        stock.write(folder / f"{name}.gguf", folder / f"{name}.stock.gguf")
    return {path.name.removesuffix(".gguf"): path for path in folder.iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_neurons_fire_and_are_predicted_as_planned(models: dict[str, Path], name: str) -> None:
    found, wanted = measure(models[name], threads=2), RECIPES[name].active
    assert found["active"] == pytest.approx(wanted, rel=0.15)
    assert wanted < found["predicted_share"] < 1.5 * wanted
    assert 0.85 < found["recall"] < 1


@pytest.mark.parametrize("name", RECIPES)
def test_stored_frequencies_are_those_that_are_measured(models: dict[str, Path], name: str) -> None:
    """Of experts, and of the neurons of those that a token uses."""
    with GgufFile(models[name]) as file, BlockRunner(file, 2, 512) as runner:
        s = file.structure
        hidden = runner.embed(np.array(random_ids(s.vocab_size, 512), np.int32))
        for i, ffn in s.ffns.items():
            assert ffn.experts
            result = runner.block(i, hidden)
            seen = hidden if ffn.experts.tap == "block" else result.ffn_input
            router = file.read(f"blk.{i}.ffn_gate_inp.weight").view(np.float32).reshape(ffn.experts.count, -1)
            chosen = np.argsort(-(seen @ router.T), 1)[:, : ffn.experts.used]
            uses = (chosen[:, :, None] == np.arange(ffn.experts.count)).any(1)  # [token, expert]
            stored = file.read(f"blk.{i}.expert_freq").view(np.float32)
            assert stored.sum() == pytest.approx(ffn.experts.used)
            assert stored.max() > 1.5 * stored.min()
            assert np.abs(uses.mean(0) - stored).max() < 0.1
            assert np.corrcoef(uses.mean(0), stored)[0, 1] > 0.9
            gates = result.ffn_input @ decode(file.read(f"blk.{i}.ffn_gate_exps.weight"), "q4_0", ffn.n_embd).T
            fires = (gates > 0).reshape(len(seen), ffn.experts.count, -1)
            measured = (fires & uses[:, :, None]).sum(0) / uses.sum(0)[:, None]
            planned = file.read(f"blk.{i}.ffn_neuron_freq_exps").view(np.float32).reshape(measured.shape)
            assert (np.diff(planned) <= 0).all()
            assert np.abs(measured - planned).mean() < 0.06
            assert np.corrcoef(measured.reshape(-1), planned.reshape(-1))[0, 1] > 0.9
            index = file.read(f"blk.{i}.ffn_neuron_index_exps").view(np.int32).reshape(measured.shape)
            assert (np.sort(index) == np.arange(ffn.expert_length)).all()
            hidden = result.output


@pytest.mark.parametrize("name", RECIPES)
def test_all_modes_compute_the_same(models: dict[str, Path], name: str) -> None:
    with GgufFile(models[name]) as file:
        ids = random_ids(file.structure.vocab_size, 24)
    exact, predicted = mode_errors(models[name], ids)
    assert exact < 0.12  # quantised twice
    assert 1e-4 < predicted < 0.25


def test_blocks_and_experts_differ(models: dict[str, Path]) -> None:
    with GgufFile(models["tiny-smallthinker"]) as file:
        for part in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_down_t_exps", "predictor_out_exps"):
            blocks = [file.read(f"blk.{i}.{part}.weight") for i in range(file.structure.block_count)]
            assert len({block.tobytes() for block in blocks}) == len(blocks), part
            experts = [expert.tobytes() for block in blocks for expert in block.reshape(8, -1)]
            if part in ("ffn_gate_exps", "predictor_out_exps"):  # the others are made of a few groups of rows
                assert len(set(experts)) == len(experts), part


def test_llama_cpp_computes_the_same_smallthinker(tmp_path: Path) -> None:
    """Its twin has the same weights, router and rotations."""
    assert difference_from_its_twin("tiny-smallthinker", tmp_path) < 2e-3


def test_llama_cpp_loads_a_mixtral(models: dict[str, Path]) -> None:
    logits = llama_logits(models["tiny-mixtral.stock"], random_ids(512, 8))
    assert logits.shape == (8, 512)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_reads_the_matrices_of_its_experts(models: dict[str, Path], name: str) -> None:
    """What llama.cpp reads of its twin, in two ways."""
    with GgufFile(models[name]) as file:
        s, tensors = file.structure, dict(file.tensors)
    experts = s.ffns[0].experts
    assert experts
    unused = ("down_t", "predictor", "neuron", "expert_freq")
    wanted = 0.0
    for full, tensor in tensors.items():
        if full == "token_embd.weight":
            wanted += tensor.nbytes / tensor.ne[1]
        elif not any(part in full for part in unused):
            wanted += tensor.nbytes * (experts.used / experts.count if "_exps" in full else 1)
    dense = bytes_per_token(s, tensors, Activity.uniform("dense", s.block_count, 1.0)).total
    assert dense == pytest.approx(wanted)


def test_a_shape_with_other_layers_goes_on_as_it_began() -> None:
    usual = SHAPES["smallthinker-21b"]
    assert shape("smallthinker-21b", 13).blocks == usual.blocks[:13]
    assert shape("smallthinker-21b", 60).blocks[52:] == usual.blocks[:8]


def test_windows_that_llama_cpp_does_not_know_are_refused() -> None:
    s = shape("smallthinker-21b")
    assert stock.architecture(s, "it") == "smallthinker"
    assert stock.architecture(shape("smallthinker-4b"), "it") == "smallthinker"
    assert stock.architecture(shape("mixtral-8x7b"), "it") == "llama"
    for change in ({"sliding_window": 2048}, {"position": "rope_norm"}, {"sliding_window_pattern": (True,) * 52}):
        with pytest.raises(UserError, match="no stock counterpart"):
            stock.architecture(replace(s, **change), "it")
