"""Mixtures of experts in every way of running them, against float64 numpy (tests/experts.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from company import UNLIKE, alone, together, whole_together
from experts import FF, MODELS
from oracle import Logits, random_ids, relative
from safetensors.numpy import load_file

import runtime
from convert import convert
from runtime.analysis.experts import busiest_share
from runtime.bindings import ggml
from runtime.bindings.sparse_ffn import FEW_TOKENS
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.model_file.writer import NewTensor, copied, copied_keys, write_gguf

pytestmark = pytest.mark.numeric

N = 48
FLOATS = 1e-5  # relative: sums of float32 in another order than the reference's
Made = Callable[[str], Path]
Expected = Callable[[str], Logits]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("experts")

    def get(name: str) -> Path:
        path = folder / name
        if not path.exists():
            MODELS[name].make(path)
        return path

    return get


@pytest.fixture(scope="module")
def file(checkpoint: Made) -> Callable[..., Path]:
    """A converted checkpoint in a type, without calibration."""

    def get(name: str, type: str = "f32") -> Path:  # noqa: A002
        path = checkpoint(name).with_suffix(f".{type}.gguf")
        if not path.exists():
            convert(checkpoint(name), path, type=type, calibration="none")
        return path

    return get


@pytest.fixture(scope="module")
def expected(checkpoint: Made) -> Expected:
    known: dict[str, Logits] = {}

    def get(name: str) -> Logits:
        if name not in known:
            known[name] = MODELS[name].logits(checkpoint(name), random_ids(N, 4000))
        return known[name]

    return get


def load(path: Path, **options: Any) -> runtime.Model:
    return runtime.load(path, **{"device": "none", "kv_type": "f32", "threads": 2} | options)


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt(name: str, ffn: str, file: Callable[..., Path], expected: Expected) -> None:
    with load(file(name), ffn=ffn) as model:
        assert relative(expected(name), model.logits(random_ids(N, 4000))) < FLOATS


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_tokens_have_choices_of_their_own(length: int, file: Callable[..., Path], expected: Expected) -> None:
    """Whatever is computed together with a token, it is its own experts that count."""
    ids, name = random_ids(N, 4000), "smallthinker-21b"
    with load(file(name), ffn="exact") as model:
        assert relative(expected(name)[:length], model.logits(ids[:length])) < FLOATS


def test_what_is_counted(file: Callable[..., Path]) -> None:
    """Shares are of the neurons of the chosen experts."""
    with load(file("smallthinker-21b"), ffn="exact") as model:
        model.logits(random_ids(N, 4000))
        assert model.gate_shares() == [1.0] * 3
        assert all(0.4 < share < 0.6 for share in model.layer_shares())


def test_choices_are_counted(file: Callable[..., Path], checkpoint: Made) -> None:
    """By few tokens and by many, in all schedules together; as often as float64 chooses."""
    name, ids = "smallthinker-21b", random_ids(N, 4000)
    with load(file(name), ffn="exact") as model:
        assert model.expert_shares() == [[]] * 3
        model.logits(ids)
        model.logits(ids[:7])
        found = model.expert_shares()
    assert [round(sum(layer), 6) for layer in found] == [6.0] * 3
    seen = load_file(checkpoint(name) / "model.safetensors")
    routed = (
        seen["model.embed_tokens.weight"][[*ids, *ids[:7]]]
        @ seen["model.layers.0.block_sparse_moe.primary_router.weight"].T
    )
    chosen = np.argsort(-routed, 1)[:, :6]
    assert np.allclose(found[0], np.bincount(chosen.ravel(), minlength=16) / len(routed))


def test_whole_matrices_count_nothing(file: Callable[..., Path]) -> None:
    with load(file("smallthinker-21b"), ffn="dense") as model:
        model.logits(random_ids(N, 4000))
        assert model.expert_shares() == [[]] * 3


def test_the_busiest_quarter() -> None:
    assert busiest_share([[], []]) is None
    assert busiest_share([[1.0] * 8, []]) == 0.25
    assert busiest_share([[4, 0, 0, 0, 0], [0, 1, 2, 1]]) == (4 + 2) / 8


@pytest.mark.parametrize("options", [{}, {"device": "CPU", "hot": 32}], ids=["CPU", "divided"])
@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("name", ["mixtral-drelu-tied", "smallthinker-21b"])
def test_eight_sequences_with_unlike_tokens(
    name: str, ffn: str, options: dict[str, Any], checkpoint: Made, file: Callable[..., Path]
) -> None:
    """A batch of unlike tokens, each with the experts and weights of its own."""
    with load(file(name), ffn=ffn, **options) as model:
        found = whole_together(model.engine, UNLIKE)
    expected = np.concatenate([MODELS[name].logits(checkpoint(name), ids) for ids in UNLIKE])
    assert relative(expected, found) < FLOATS


@pytest.mark.parametrize("name", ["mixtral-drelu-tied", "smallthinker-21b", "smallthinker-softmax"])
def test_a_token_has_the_same_bits_in_any_company(name: str, file: Callable[..., Path]) -> None:
    texts = [random_ids(12, 4000, seed=seed) for seed in range(FEW_TOKENS)]
    with load(file(name, "q8_0"), ffn="exact", kv_type="f16") as model:
        assert np.array_equal(together(model.engine, texts), alone(model.engine, texts))


# --- mistakes that would be found ------------------------------------------------------------------------------------


def rewritten(
    source: Path, out: Path, keys: dict[str, Any] | None = None, tensors: dict[str, npt.NDArray[Any]] | None = None
) -> Path:
    """A copy of a model file with other keys (`__` standing for a dot), and with tensors that are changed or added."""
    changed = {f"lazyneuron.{key.replace('__', '.')}": value for key, value in (keys or {}).items()}
    made = {
        name: NewTensor(name, value.shape[::-1], ggml.I32 if value.dtype == np.int32 else ggml.F32, value.nbytes, [
            np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        ])
        for name, value in (tensors or {}).items()
    }  # fmt: skip
    with GgufFile(source) as file:
        kept = [copied(file, name) for name in file.tensors if name not in made]
        write_gguf(out, copied_keys(source) | changed, [*kept, *made.values()])
    return out


def floats(source: Path, name: str) -> npt.NDArray[np.float32]:
    with GgufFile(source) as file:
        return file.read(name).view(np.float32).reshape(file.tensors[name].ne[::-1])


def swapped(source: Path) -> dict[str, npt.NDArray[Any]]:
    """The first block's up rows, with two experts in each other's place."""
    name = "blk.0.ffn_up_exps.weight"
    stacked = floats(source, name)
    return {name: stacked[[1, 0, *range(2, len(stacked))]]}


def biased(source: Path) -> dict[str, npt.NDArray[Any]]:
    """A bias for the choice, large enough to change it."""
    bias = np.random.default_rng(0).normal(size=16).astype(np.float32)
    return {f"blk.{i}.exp_probs_b.bias": bias for i in range(3)}


@pytest.mark.parametrize(
    ("keys", "tensors"),
    [
        pytest.param({"router__tap": "ffn_norm"}, None, id="the router sees the FFN's input"),
        pytest.param({"expert_weights_norm": False}, None, id="weights are not normalised"),
        pytest.param({"expert_gating_func": "softmax"}, None, id="softmax for sigmoid"),
        pytest.param({"expert_gating_func": "softmax_weight"}, None, id="softmax of the chosen"),
        pytest.param({"expert_weights_scale": 1.01}, None, id="a scale"),
        pytest.param({"expert_used_count": 5}, None, id="one expert less"),
        pytest.param({"expert_bias": True}, biased, id="a bias"),
        pytest.param({}, swapped, id="two experts in each other's place"),
    ],
)
@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_mistakes_show(
    keys: dict[str, Any],
    tensors: Callable[[Path], dict[str, npt.NDArray[Any]]] | None,
    ffn: str,
    file: Callable[..., Path],
    expected: Expected,
    tmp_path: Path,
) -> None:
    name = "smallthinker-21b"
    wrong = rewritten(file(name), tmp_path / "wrong.gguf", keys, tensors(file(name)) if tensors else None)
    with load(wrong, ffn=ffn) as model:
        assert relative(expected(name), model.logits(random_ids(N, 4000))) > 100 * FLOATS


@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_a_bias_counts_for_the_choice_alone(ffn: str, file: Callable[..., Path], tmp_path: Path) -> None:
    """The same bias for all experts changes no choice, and no weight either."""
    name = "smallthinker-21b"
    bias = {f"blk.{i}.exp_probs_b.bias": np.full(16, 3, np.float32) for i in range(3)}
    same = rewritten(file(name), tmp_path / "same.gguf", {"expert_bias": True}, bias)
    ids = random_ids(N, 4000)
    with load(file(name), ffn=ffn) as model, load(same, ffn=ffn) as other:
        assert relative(model.logits(ids), other.logits(ids)) < FLOATS


# --- files that are refused ------------------------------------------------------------------------------------------


def with_nan(source: Path) -> dict[str, npt.NDArray[Any]]:
    router = floats(source, "blk.1.ffn_gate_inp.weight").copy()
    router[2, 5] = np.nan
    return {"blk.1.ffn_gate_inp.weight": router}


def ordered(
    index: npt.NDArray[np.int32] | None = None,
    freq: npt.NDArray[np.float32] | None = None,
    chosen: npt.NDArray[np.float32] | None = None,
) -> Callable[[Path], dict[str, npt.NDArray[Any]]]:
    """Tensors of the neurons' order in all blocks, damaged in the second."""
    right: dict[str, npt.NDArray[Any]] = {
        "ffn_neuron_index_exps": np.tile(np.arange(FF, dtype=np.int32), (16, 1)),
        "ffn_neuron_freq_exps": np.full((16, FF), 0.5, np.float32),
        "expert_freq": np.full(16, 0.375, np.float32),
    }
    damaged = {"ffn_neuron_index_exps": index, "ffn_neuron_freq_exps": freq, "expert_freq": chosen}
    found = {f"blk.{i}.{name}": value for i in range(3) for name, value in right.items()}
    found |= {f"blk.1.{name}": value for name, value in damaged.items() if value is not None}
    return lambda _: found


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"expert_count": 17}, None, r"`blk.0.ffn_gate_inp.weight` has shape \[96, 16\], expected \[96, 17\]"),
        ({"expert_count": 1}, None, "block 0: expert_count is 1, expected 0, or 2 to 65536"),
        ({"expert_count": -1}, None, "expert_count is -1"),
        ({"expert_used_count": 17}, None, "block 0: expert_used_count is 17, expected 1 to 16"),
        ({"expert_used_count": 0}, None, "block 0: expert_used_count is 0, expected 1 to 16"),
        ({"expert_used_count": [6, 6]}, None, "`lazyneuron.expert_used_count` has 2 values, expected 3"),
        ({"expert_count": 0}, None, "block 0: expert_used_count is 6, expected 0 without experts"),
        ({"expert_gating_func": "hash"}, None, "is `hash`, expected one of softmax, sigmoid, softmax_weight"),
        ({"router__tap": "residual"}, None, "is `residual`, expected one of ffn_norm, block"),
        ({"expert_bias": True}, None, "tensors missing, the first is `blk.0.exp_probs_b.bias`"),
        ({"expert_weights_scale": 0.0}, None, "must be positive"),
        ({"ffn__bias": True}, None, "block 0: `ffn.bias` with experts, expected false"),
        ({"ffn__sub_norm": True}, None, "block 0: `ffn.sub_norm` with experts, expected false"),
        ({"feed_forward_length": 1 << 24, "expert_count": 1 << 16}, None, "expected at most 2147483647"),
        ({}, with_nan, "`blk.1.ffn_gate_inp.weight` has numbers that are not finite"),
        ({"neuron_order": "hot"}, ordered(index=np.zeros((16, FF), np.int32)), "no permutation of 0 to 63 in each expert"),
        (
            {"neuron_order": "hot"},
            ordered(freq=np.tile(np.linspace(0, 1, FF, dtype=np.float32), (16, 1))),
            "`blk.1.ffn_neuron_freq_exps` is not sorted from hot to cold in each expert",
        ),
        ({"neuron_order": "hot"}, ordered(chosen=np.full(16, 1.5, np.float32)), "`blk.1.expert_freq` is not within 0 to 1"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(
    keys: dict[str, Any],
    tensors: Callable[[Path], dict[str, npt.NDArray[Any]]] | None,
    message: str,
    file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = file("smallthinker-21b")
    damaged = rewritten(source, tmp_path / "damaged.gguf", keys, tensors(source) if tensors else None)
    with pytest.raises(UserError, match=message):
        load(damaged).close()


def test_an_order_is_read(file: Callable[..., Path], expected: Expected, tmp_path: Path) -> None:
    """The undamaged form of what is refused above."""
    name = "smallthinker-21b"
    right = rewritten(file(name), tmp_path / "right.gguf", {"neuron_order": "hot"}, ordered()(file(name)))
    with load(right, ffn="exact") as model:
        assert relative(expected(name), model.logits(random_ids(N, 4000))) < FLOATS


# --- checkpoints that are refused ------------------------------------------------------------------------------------


def lacking(weights: dict[str, npt.NDArray[Any]]) -> None:
    del weights["model.layers.1.block_sparse_moe.experts.3.up.weight"]


def extra(weights: dict[str, npt.NDArray[Any]]) -> None:
    for part in ("gate", "up", "down"):
        name = "model.layers.0.block_sparse_moe.experts.{}." + part + ".weight"
        weights[name.format(16)] = weights[name.format(0)]


def unequal(weights: dict[str, npt.NDArray[Any]]) -> None:
    name = "model.layers.0.block_sparse_moe.experts.3.up.weight"
    weights[name] = np.concatenate([weights[name], weights[name]])


def infinite(weights: dict[str, npt.NDArray[Any]]) -> None:
    weights["model.layers.2.block_sparse_moe.primary_router.weight"][1, 7] = np.inf


@pytest.mark.parametrize(
    ("config", "spoil", "message"),
    [
        ({}, lacking, r"1 tensors missing \(model.layers.1.block_sparse_moe.experts.3.up.weight\)"),
        ({}, extra, "3 tensors unknown"),
        ({}, unequal, r"experts.3.up.weight is \[128, 96\] instead of \[64, 96\]"),
        ({}, infinite, "layers.2.block_sparse_moe.primary_router.weight: values that are not finite"),
        ({"moe_num_active_primary_experts": 17}, None, "expert_used_count is 17, expected 1 to 16"),
        ({"moe_num_primary_experts": 17}, None, r"9 tensors missing \(model.layers.0.block_sparse_moe.experts.16.down"),
        ({"moe_enable_secondary_experts": True}, None, "`moe_enable_secondary_experts` is true, expected false"),
        ({"moe_layer_layout": [1, 0, 1]}, None, r"`moe_layer_layout` is \[1, 0, 1\], expected 1"),
        ({"n_group": 4, "topk_group": 2}, None, "`n_group` is 4, expected 1"),
        ({"topk_method": "noaux_tc"}, None, "`topk_method` is \"noaux_tc\", expected \"greedy\""),
        ({"num_hash_layers": 3}, None, "`num_hash_layers` is 3, expected 0"),
        ({"shared_expert_intermediate_size": 64}, None, "`shared_expert_intermediate_size` is 64, expected 0"),
        ({"n_shared_experts": 1}, None, "`n_shared_experts` is 1, expected 0"),
        ({"norm_topk_prob": False}, None, "`norm_topk_prob` is false, expected true"),
        ({"routed_scaling_factor": 2.5}, None, "`routed_scaling_factor` is 2.5, expected 1"),
        ({"rope_layout": [1, 0]}, None, "has 2 values, expected 3"),
        ({"sliding_window_layout": [1, 0]}, None, "has 2 values, expected 3"),
    ],
)  # fmt: skip
def test_checkpoints_that_are_refused(
    config: dict[str, Any], spoil: Callable[[dict[str, Any]], None] | None, message: str, tmp_path: Path
) -> None:
    model, source, out = MODELS["smallthinker-21b"], tmp_path / "checkpoint", tmp_path / "out" / "x.gguf"
    model.make(source, spoil or (lambda _: None))
    values = json.loads((source / "config.json").read_text()) | config
    (source / "config.json").write_text(json.dumps(values))
    out.parent.mkdir()
    with pytest.raises(UserError, match=message):
        convert(source, out, type="f32", calibration="none")
    assert not list(out.parent.iterdir())


def test_predictors_of_a_checkpoint_are_left_aside(tmp_path: Path) -> None:
    """Whatever their names are: TurboSparse-Mixtral's are not published."""
    ones = np.ones((8, 96), np.float32)
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.predictor.fc1.weight" for i in range(3) for e in range(8)]
    name, source = "mixtral-drelu-tied", tmp_path / "checkpoint"
    MODELS[name].make(source, lambda weights: weights.update(dict.fromkeys(names, ones)))
    report = convert(source, tmp_path / "x.gguf", type="f32", calibration="none")
    assert f"24 tensors of the checkpoint are left aside ({names[0]}, ...)" in report.notes
    ids = random_ids(N, 4000)
    with load(tmp_path / "x.gguf", ffn="exact") as model:
        assert relative(MODELS[name].logits(source, ids), model.logits(ids)) < FLOATS


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    """As transformers saves them where it is asked for its own form of them."""

    def fused(weights: dict[str, npt.NDArray[Any]]) -> None:
        for i in range(3):
            at = f"model.layers.{i}.block_sparse_moe.experts."
            parts = [[weights.pop(f"{at}{e}.{part}.weight") for e in range(8)] for part in ("w1", "w3", "w2")]
            weights[f"{at}gate_up_proj"] = np.concatenate([np.stack(parts[0]), np.stack(parts[1])], 1)
            weights[f"{at}down_proj"] = np.stack(parts[2])

    MODELS["mixtral-drelu-tied"].make(tmp_path / "checkpoint", fused)
    with pytest.raises(UserError, match="72 tensors missing") as caught:
        convert(tmp_path / "checkpoint", tmp_path / "x.gguf", type="f32", calibration="none")
    assert "all experts are in one tensor" in str(caught.value.hint)
