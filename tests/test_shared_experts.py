"""Experts that every token uses, and experts of another width, in every way of running them, against float64 numpy."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from company import UNLIKE, alone, together, whole_together
from experts import FF, SHARING
from oracle import Logits, random_ids, relative
from safetensors.numpy import load_file
from test_experts import floats, load, rewritten

from convert import archs, convert
from convert.checkpoint import open_checkpoint
from convert.measure import measure_sparsity
from convert.plan import Types, make_plan
from convert.verify.reference import NumpyModel
from runtime.analysis.page_facts import facts_of
from runtime.bindings.sparse_ffn import FEW_TOKENS
from runtime.compute.kv_cache import padded_cells
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import UserError
from runtime.hybrid import choose
from runtime.hybrid.costs import PlanOptions, model_costs
from runtime.hybrid.lengths import Longer
from runtime.hybrid.planner import Placement
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions

pytestmark = pytest.mark.numeric

N, FLOATS = 40, 1e-5
IDS = random_ids(N, 4000)
Made = Callable[..., Path]
Expected = Callable[[str], Logits]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("sharing")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            SHARING[name].make(path)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archs, "__path__", [*archs.__path__, str(Path(__file__).parent / "archs")])
        yield get


@pytest.fixture(scope="module")
def file(checkpoint: Made) -> Made:
    """A converted checkpoint in a type and a layout."""

    def get(name: str, type: str = "f32", layout: str = "both", calibration: str = "none") -> Path:  # noqa: A002
        path = checkpoint(name).with_suffix(f".{type}-{layout}-{calibration}.gguf")
        if not path.exists():
            convert(checkpoint(name), path, type=type, layout=layout, calibration=calibration)
        return path

    return get


@pytest.fixture(scope="module")
def expected(checkpoint: Made) -> Callable[[str], Logits]:
    known: dict[str, Logits] = {}

    def get(name: str) -> Logits:
        if name not in known:
            known[name] = SHARING[name].logits(checkpoint(name), IDS)
        return known[name]

    return get


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", SHARING)
def test_a_prompt(name: str, ffn: str, file: Made, expected: Expected) -> None:
    with load(file(name), ffn=ffn) as model:
        assert relative(expected(name), model.logits(IDS)) < FLOATS


def test_a_token_has_the_same_bits_in_any_company(file: Made) -> None:
    texts = [random_ids(10, 4000, seed=seed) for seed in range(FEW_TOKENS)]
    with load(file("latent", "q8_0"), ffn="exact", kv_type="f16") as model:
        assert np.array_equal(together(model.engine, texts), alone(model.engine, texts))


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", ["shared", "latent"])
def test_eight_sequences(name: str, ffn: str, checkpoint: Made, file: Made) -> None:
    with load(file(name), ffn=ffn) as model:
        found = whole_together(model.engine, UNLIKE)
    expected = np.concatenate([SHARING[name].logits(checkpoint(name), ids) for ids in UNLIKE])
    assert relative(expected, found) < FLOATS


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay in the mapped file")
def test_a_budget_of_main_memory(file: Made) -> None:
    """The experts' neurons are read when they fire; the shared expert's are no part of what is read so."""
    options: dict[str, Any] = {"ffn": "exact", "n_ctx": 64, "n_batch": 64}
    with load(file("latent"), **options) as exact, load(file("latent"), ram_budget="64MiB", **options) as model:
        assert np.array_equal(exact.logits(IDS), model.logits(IDS))
        before = model.engine.weights.held_bytes
        with GgufFile(file("latent")) as f:
            small = {
                n: t.nbytes for n, t in f.tensors.items() if not n.endswith(("_exps.weight", "ffn_down_shexp.weight"))
            }
        assert sum(small.values()) <= before <= sum(small.values()) + 64 * len(small)


# --- divided between the CPU and a device ----------------------------------------------------------------------------


@pytest.mark.parametrize("resident_from", [0, 1, 3])
@pytest.mark.parametrize("hot", [0, 32, 64])
@pytest.mark.parametrize("name", ["shared", "latent"])
def test_divided(
    name: str, hot: int, resident_from: int, file: Made, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared expert is where its block is at home, whichever side has the others."""
    planned = choose.place

    def fixed(blocks: Any, head: int, machine: Any) -> Placement:
        where: dict[str, Any] = {"resident_from": resident_from, "head": False, "hot": ((hot,),) * 3, "longer": ()}
        return replace(planned(blocks, head, machine), **where)

    monkeypatch.setattr(choose, "place", fixed)
    with load(file(name), device="CPU", vram_budget="1", ffn="exact") as model:
        assert relative(expected(name), model.logits(IDS)) < FLOATS
        shared, used = SHARING[name].shared, SHARING[name].used
        reached = shared + used * FF
        for i, share in enumerate(model.gate_shares()):
            assert share == 1
            on_device = hot * used + (shared if i >= resident_from else 0)
            assert (
                model.layer_shares()[i] > on_device / reached
                or on_device == reached == model.layer_shares()[i] * reached
            )


@pytest.mark.parametrize("first", [0, 32])
@pytest.mark.parametrize("name", ["shared", "latent"])
def test_more_of_some_experts(
    name: str, first: int, file: Made, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which a device holds more neurons than of the others, beside the shared expert."""
    planned, longer = choose.place, Longer(64, (0, 2, 3), 0.5)
    where: dict[str, Any] = {"resident_from": 0, "head": True, "hot": ((first,),) * 3, "longer": (longer,) * 3}
    monkeypatch.setattr(choose, "place", lambda *a: replace(planned(*a), **where))
    with load(file(name), device="CPU", vram_budget="1", ffn="exact") as model:
        assert relative(expected(name), model.logits(IDS)) < FLOATS
        assert model.gate_shares() == [1.0] * 3


@pytest.mark.parametrize("layout", ["both", "sparse"])
def test_what_a_device_holds(layout: str, file: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the planner counts, and less than a tenth less."""
    with GgufFile(file("latent", layout=layout)) as f:
        structure = f.structure
        options = PlanOptions(SettledOptions("exact", n_ctx=64), (1 << 30,), (1e10,), 1e10, reserve=0)
        blocks, _ = model_costs(f, options)
        names = [
            n for n in f.tensors if n.startswith("blk.0.") and not n.endswith(("_exps.weight", "down_t_shexp.weight"))
        ]
        kept = sum(f.tensors[n].nbytes for n in names)
        keys = 2 * structure.attentions[0].kv_length * options.kv_size * padded_cells(64)
        experts = structure.ffns[0].experts
        assert experts
        # Room for a second piece of the neurons, and for what says which experts it is of.
        second = 64 * 24 + 4 * experts.count**2 if blocks[0].longer else 0
        assert kept + keys <= blocks[0].stored <= kept + keys + 64 * 24 + second
    planned = choose.place
    monkeypatch.setattr(choose, "place", lambda *a: replace(planned(*a), resident_from=0, hot=((0,),) * 3, longer=()))
    with load(file("latent", layout=layout), device="CPU", vram_budget="1", ffn="exact", n_ctx=64) as model:
        assert relative(model.logits(IDS), model.logits(IDS)) == 0
        assert {s.name for s in model.engine.map.own(1)} >= set(names)
        assert not any("down_t" in s.name or "_exps" in s.name for s in model.engine.map.own(1))


# --- what is counted -------------------------------------------------------------------------------------------------


def test_shares_count_all_that_a_token_uses(file: Made, checkpoint: Made) -> None:
    """By the first block's shared expert: its rows with the FFN's input, beside what the experts did."""
    with load(file("shared"), ffn="exact") as model, load(file("shared"), ffn="dense") as dense:
        model.logits(IDS)
        assert model.gate_shares() == [1.0] * 3
        assert all(0.4 < share < 0.6 for share in model.layer_shares())
        assert [block.n_reached for block in model.structure.blocks] == [96 + 2 * FF] * 3
        dense.logits(IDS)
        assert dense.layer_shares() == [1.0] * 3


def silent(source: Path) -> dict[str, npt.NDArray[Any]]:
    """Gates of the shared expert that are 0: no neuron of it fires."""
    name = "blk.0.ffn_gate_shexp.weight"
    return {name: np.zeros_like(floats(source, name))}


def test_the_shared_neurons_are_counted(file: Made, tmp_path: Path) -> None:
    with load(file("shared"), ffn="exact") as model:
        changed = rewritten(file("shared"), tmp_path / "silent.gguf", {}, silent(file("shared")))
        model.logits(IDS)
        with load(changed, ffn="exact") as other:
            other.logits(IDS)
            fired = (model.layer_shares()[0] - other.layer_shares()[0]) * (96 + 2 * FF)
    assert 0.3 * 96 < fired < 0.7 * 96


def mute(weights: dict[str, Any]) -> None:
    weights["model.layers.0.block_sparse_moe.shared.w1.weight"][:] = 0


def test_a_checkpoints_shared_neurons_are_measured(checkpoint: Made, tmp_path: Path) -> None:
    """In the first block all else is the same."""
    SHARING["shared"].make(tmp_path / "shared", mute)  # the name is the seed: the same weights otherwise
    sources = (checkpoint("shared"), tmp_path / "shared")
    with_all, without = (measure_sparsity(source, type="f32", tokens=512) for source in sources)
    reached = 96 + 2 * FF
    assert 0.3 * 96 < (with_all.layers[0].active - without.layers[0].active) * reached < 0.7 * 96
    assert 0.3 * 2 * FF < without.layers[0].active * reached < 0.7 * 2 * FF
    assert len(with_all.frequencies[0]) == 96 + 4 * FF


def test_bytes_of_a_token(file: Made) -> None:
    """Of the shared expert and what stands around latent experts, by hand."""
    with GgufFile(file("latent")) as f:
        s, everything = f.structure, Activity.uniform("dense", 3, 1.0)
        found = bytes_per_token(s, f.tensors, everything)
        d, latent, shared, used = 96, 32, 160, 4
        assert found.ffn == 3 * 4 * (2 * used * FF * latent + 2 * shared * d)
        half = bytes_per_token(s, f.tensors, Activity.uniform("exact", 3, 0.5))
        assert half.ffn == 3 * 4 * 1.5 * (used * FF * latent + shared * d)
        routers = 3 * 4 * (d * 6 + 6)
        assert half.other == 3 * 4 * 2 * d * latent + routers + 3 * 4 * d + 4 * d + 4 * d  # norms, one embedding


@pytest.mark.parametrize("layout", ["both", "sparse"])
def test_parameters(layout: str, file: Made, checkpoint: Made) -> None:
    """As many as the checkpoint has: a down projection that is stored in two layouts counts once."""
    weights = load_file(checkpoint("latent") / "model.safetensors")
    with GgufFile(file("latent", layout=layout)) as f:
        assert facts_of(f)["parameters"] == sum(value.size for value in weights.values())


# --- predictors ------------------------------------------------------------------------------------------------------


def perfect(source: Path) -> dict[str, npt.NDArray[Any]]:
    """A predictor of full rank that knows which neurons of the experts fire: their rows."""
    made: dict[str, npt.NDArray[Any]] = {}
    for i in range(3):
        rows = floats(source, f"blk.{i}.ffn_up_exps.weight")
        made[f"blk.{i}.predictor_in.weight"] = np.eye(32, dtype=np.float32)
        made[f"blk.{i}.predictor_out_exps.weight"] = rows
        made[f"blk.{i}.predictor_out_exps.bias"] = np.zeros(rows.shape[:2], np.float32)
    return made


@pytest.mark.parametrize("options", [{}, {"predictor_bias": math.inf}, {"device": "CPU", "hot": 32}], ids=str)
def test_predicted(options: dict[str, Any], file: Made, expected: Expected, tmp_path: Path) -> None:
    """The experts' neurons are predicted from their own input; the shared expert's are all looked at."""
    keys = {"predictor__kind": "lowrank", "predictor__rank": [32] * 3, "predictor__error": [1.0] * 3}
    path = rewritten(file("latent"), tmp_path / "predicted.gguf", keys, perfect(file("latent")))
    with load(path, ffn="predicted", **options) as model:
        assert relative(expected("latent"), model.logits(IDS)) < FLOATS
        least = 1 if options.get("predictor_bias") else (160 + 0.6 * 4 * FF) / (160 + 4 * FF)
        assert all((share == 1) if least == 1 else (share > 0.5) for share in model.gate_shares())
        if not options:
            assert all(0.5 < share < least for share in model.gate_shares())


@pytest.mark.parametrize("name", ["shared", "latent"])
def test_calibration(name: str, file: Made, checkpoint: Made, expected: Expected) -> None:
    """Experts of another width are calibrated by what they see; the shared expert stays in its order."""
    path = checkpoint(name).with_suffix(".fitted.gguf")
    convert(checkpoint(name), path, type="f32", calibration_tokens=1024)
    with load(path, ffn="exact") as model:
        assert model.structure.neuron_order == "hot"
        assert relative(expected(name), model.logits(IDS)) < FLOATS
    part = "blk.1.ffn_up_shexp.weight"
    assert np.array_equal(floats(path, part), floats(file(name), part))


@pytest.mark.parametrize("name", SHARING)
def test_the_oracle_of_verify(name: str, checkpoint: Made, expected: Expected) -> None:
    opened = open_checkpoint(checkpoint(name))
    assert relative(expected(name), NumpyModel(opened, make_plan(opened, Types("f32"))).logits(IDS)) < FLOATS


# --- mistakes, and what is refused -----------------------------------------------------------------------------------


def doubled(name: str) -> Callable[[Path], dict[str, npt.NDArray[Any]]]:
    return lambda source: {name: 2 * floats(source, name)}


@pytest.mark.parametrize("tensor", ["ffn_up_shexp", "ffn_latent_up", "ffn_latent_down"])
@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_each_tensor_counts(tensor: str, ffn: str, file: Made, expected: Expected, tmp_path: Path) -> None:
    changed = doubled(f"blk.1.{tensor}.weight")(file("latent"))
    wrong = rewritten(file("latent"), tmp_path / "wrong.gguf", {}, changed)
    with load(wrong, ffn=ffn) as model:
        assert relative(expected("latent"), model.logits(IDS)) > 100 * FLOATS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"expert_shared_feed_forward_length": 161}, r"`blk.0.ffn_up_shexp.weight` has shape \[96, 160\], expected \[96, 161\]"),
        ({"expert_shared_feed_forward_length": -1}, "block 0: expert_shared_feed_forward_length is -1, expected 0 to"),
        ({"expert_shared_feed_forward_length": [160, 160]}, "has 2 values, expected 3"),
        ({"expert_latent_length": 33}, r"`blk.0.ffn_latent_down.weight` has shape \[96, 32\], expected \[96, 33\]"),
        ({"expert_latent_length": -1}, "expert_latent_length is -1, expected 0 to"),
        ({"expert_latent_length": 0}, r"`blk.0.ffn_up_exps.weight` has shape \[32, 64, 6\], expected \[96, 64, 6\]"),
        ({"expert_count": 0, "expert_used_count": 0}, "expert_latent_length is 32 without experts, expected 0"),
        (
            {"expert_count": 0, "expert_used_count": 0, "expert_latent_length": 0},
            "block 0: a shared expert of 160 neurons without experts, expected expert_count with it",
        ),
        ({"norm_placement": "post"}, "block 0: a shared expert with norm_placement `post`, expected `pre`"),
        (
            {"predictor__kind": "lowrank", "predictor__rank": [0] * 3, "predictor__error": [1.0] * 3, "predictor__tap": "residual"},
            "predictor.tap is `residual` with latent experts, expected `ffn_norm`",
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(keys: dict[str, Any], message: str, file: Made, tmp_path: Path) -> None:
    damaged = rewritten(file("latent"), tmp_path / "damaged.gguf", keys)
    with pytest.raises(UserError, match=message):
        load(damaged).close()


def gate_of_the_shared(weights: dict[str, Any]) -> None:
    weights["model.layers.0.block_sparse_moe.shared_expert_gate.weight"] = np.ones((1, 96), np.float32)


def narrow(weights: dict[str, Any]) -> None:
    name = "model.layers.1.block_sparse_moe.latent_up.weight"
    weights[name] = weights[name][:, :16]


def missing(weights: dict[str, Any]) -> None:
    del weights["model.layers.2.block_sparse_moe.shared.w2.weight"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gate_of_the_shared, "1 tensors unknown .*shared_expert_gate"),
        (narrow, r"latent_up.weight is \[96, 16\] instead of \[96, 32\]"),
        (missing, "1 tensors missing .*shared.w2.weight"),
    ],
)
def test_checkpoints_that_are_refused(
    spoil: Callable[[dict[str, Any]], None], message: str, checkpoint: Made, tmp_path: Path
) -> None:
    SHARING["latent"].make(tmp_path / "checkpoint", spoil)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "checkpoint", tmp_path / "x.gguf", type="f32", calibration="none")
    assert not (tmp_path / "x.gguf").exists()
