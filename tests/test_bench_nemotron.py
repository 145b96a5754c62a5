"""The benchmarks' models of Nemotron-H's shapes: what is planted is what is measured, and llama.cpp's twin is the same model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle import mode_errors
from twins import difference_from_its_twin

from bench import stock
from bench.firing_rates import plan_firing
from bench.make_model import Recipe, measure, random_ids, write_model
from bench.shapes import shape
from runtime.errors import UserError
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors

TINY = ("tiny-nemotron-h", "tiny-nemotron-3")


@pytest.mark.parametrize("name", TINY)
def test_neurons_fire_and_are_predicted_as_planned(tmp_path: Path, name: str) -> None:
    write_model(Recipe(name, 0.2, "q4_0"), tmp_path / "m.gguf")
    found = measure(tmp_path / "m.gguf", threads=2)
    assert found["layers"]["block"] == [i for i, c in enumerate("M-*M-" if name == TINY[0] else "ME*EM") if c in "-E"]
    assert all(share == pytest.approx(0.2, rel=0.15) for share in found["layers"]["active"])
    assert found["recall"] > 0.85
    exact, predicted = mode_errors(tmp_path / "m.gguf", random_ids(512, 24))
    assert exact < 0.12  # quantised twice
    assert 1e-4 < predicted < 0.25


@pytest.mark.parametrize("name", TINY)
def test_llama_cpp_computes_the_same(tmp_path: Path, name: str) -> None:
    """Mamba-2, attention, and squared ReLU; with a router's bias, weights that are scaled, and a shared expert."""
    assert difference_from_its_twin(name, tmp_path) < 1e-4


def elements(s: Structure) -> tuple[float, float]:
    """Of all matrices but second copies of a down projection, and of those that a token is multiplied with, in 1e9."""
    one = {name: math.prod(ne) for name, ne in required_tensors(s).items() if "down_t" not in name}
    used = s.each("expert_used_count")
    share = max(used) / max(s.each("expert_count")) if max(used) else 1.0
    read = {name: n * (share if "_exps" in name else name != "token_embd.weight") for name, n in one.items()}
    return sum(one.values()) / 1e9, sum(read.values()) / 1e9


def test_shapes_have_the_size_of_the_published_models() -> None:
    """31.6 and 8.9 billion parameters, as their cards say; a token of the first one is multiplied with some 3.2."""
    experts, dense = shape("nemotron-3-nano-30b-a3b"), shape("nemotron-nano-9b-v2")
    assert elements(experts) == (pytest.approx(31.6, abs=0.1), pytest.approx(3.2, abs=0.1))
    assert elements(dense)[0] == pytest.approx(8.9, abs=0.1)
    kinds = [(len(s.mambas), len(s.ffns), len(s.attentions)) for s in (experts, dense)]
    assert kinds == [(23, 23, 6), (27, 25, 4)]


def test_fewer_experts_are_as_much_work() -> None:
    usual, fewer = shape("nemotron-3-nano-30b-a3b", 13), shape("nemotron-3-nano-30b-a3b", 13, experts=16)
    assert [b.n_reached for b in fewer.blocks] == [b.n_reached for b in usual.blocks]
    assert {ffn.experts.count for ffn in fewer.ffns.values() if ffn.experts} == {16}
    assert fewer.blocks[0] == usual.blocks[0]
    for name, count, expected in (("tiny-mixtral", 1, "2 to 8"), ("tiny-mixtral", 9, "2 to 8"), ("tiny", 4, "none")):
        with pytest.raises(UserError, match=f"--experts: {count} in `{name}`, expected {expected}"):
            shape(name, experts=count)


def test_what_llama_cpp_does_not_compute_is_refused() -> None:
    dense, experts = shape("tiny-nemotron-h"), shape("tiny-nemotron-3")
    assert stock.architecture(dense, "it") == "nemotron_h"
    assert stock.architecture(experts, "it") == "nemotron_h_moe"
    both = tuple(2 * (i in (1, 2)) for i in range(5))
    for s, change in (
        (dense, {"ffn_activation": "relu"}),
        (dense, {"rope_dimension_count": 64}),
        (dense, {"head_count_kv": both}),
        (experts, {"expert_gating": "softmax"}),
        (experts, {"expert_bias": False}),
        (experts, {"expert_shared_feed_forward_length": 0}),
    ):
        with pytest.raises(UserError, match="no stock counterpart"):
            stock.architecture(replace(s, **change), "it")


def test_squares_have_the_energy_of_a_closed_form() -> None:
    firing = plan_firing(4096, 0.1)
    drawn = np.maximum(np.random.default_rng(0).normal(size=(40000, 1)) + firing.means[::512], 0)
    assert (drawn**4).mean(0) == pytest.approx(firing.square_energies[::512], rel=0.1, abs=0.03)
