"""Models whose blocks differ in kind and in size, in every way of running them, against float64 numpy (tests/unequal.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import command, result_of
from oracle import Logits, kl, random_ids, relative
from unequal import MODELS, WIDTH, WINDOW, Block

import runtime
from convert import archs, convert
from predictors.matrices import Tensor
from predictors.replace_predictors import replace_predictors
from runtime.hybrid import choose
from runtime.hybrid.costs import cuts_of
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

N = 48
FLOATS = 1e-5  # relative: sums of float32 in another order than the reference's
RANK = 32
MODES: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "exact": {"ffn": "exact"},
    "predicted": {"ffn": "predicted", "predictor_bias": math.inf},
}
SPLITS = ("none", "one cut", "half", "all but one", "all", "another one in each block")
Made = Callable[..., Path]
Expected = Callable[[str], Logits]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("unequal")

    def get(name: str) -> Path:
        path = folder / name.replace(" ", "-")
        if not path.exists():
            MODELS[name].make(path)
        return path

    return get


@pytest.fixture(scope="module")
def file(checkpoint: Made) -> Made:
    """A converted checkpoint in a type; predicted: with random predictors in all blocks with FFNs but the first of them."""

    def get(name: str, type: str = "f32", predicted: bool = False, **options: Any) -> Path:  # noqa: A002
        source = checkpoint(name)
        path = source.with_name(f"{source.name}-{type}-{predicted}-{'-'.join(options)}.gguf")
        if not path.exists() and predicted:
            replace_predictors(get(name, type), path, *random_predictors(MODELS[name].blocks))
        elif not path.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(archs, "__path__", [*archs.__path__, str(Path(__file__).parent / "archs")])
                convert(source, path, type=type, **{"calibration": "none"} | options)
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


def random_predictors(blocks: tuple[Block, ...]) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """Tensors of each block, and the keys that describe them."""
    rng = np.random.default_rng(0)
    first = next(i for i, block in enumerate(blocks) if block.ff)
    ranks = [RANK if block.ff and i > first else 0 for i, block in enumerate(blocks)]

    def tensor(name: str, *shape: int) -> Tensor:
        return Tensor(name, "f32", shape, rng.standard_normal(shape[::-1], np.float32).reshape(-1).view(np.uint8))

    tensors = [
        [
            tensor("predictor_in.weight", WIDTH, rank),
            tensor("predictor_out.weight", rank, block.ff),
            tensor("predictor_out.bias", block.ff),
        ]
        if rank
        else []
        for rank, block in zip(ranks, blocks, strict=True)
    ]
    keys = {"kind": "lowrank", "rank": ranks, "error": [float(rank > 0) for rank in ranks]}
    return tensors, {f"lazyneuron.predictor.{key}": value for key, value in keys.items()}


def cuts(name: str, split: str) -> list[int]:
    """How many neurons of each block are on the device."""
    blocks, ways = MODELS[name].blocks, SPLITS[:-1]
    each = {"another one in each block": [ways[(2 * i + 1) % len(ways)] for i in range(len(blocks))]}
    wanted = each.get(split, [split] * len(blocks))

    def cut(ff: int, way: str) -> int:
        at = cuts_of(ff, 1)
        return {"none": 0, "one cut": at[1], "half": at[len(at) // 2], "all but one": at[-2], "all": ff}[way]

    return [cut(block.ff, way) if block.ff else 0 for block, way in zip(blocks, wanted, strict=True)]


def logits(path: Path, **options: Any) -> Logits:
    with runtime.load(path, **{"device": "none", "kv_type": "f32", "threads": 2} | options) as model:
        return model.logits(random_ids(N, 4000))


def test_the_models_have_what_is_to_be_tested() -> None:
    """Attention alone, an FFN alone, both; two lengths of FFN; a block that does not rotate; one that sees a window."""
    for model in MODELS.values():
        kinds = {(block.heads > 0, block.ff > 0) for block in model.blocks}
        assert kinds == {(True, False), (False, True), (True, True)}
        assert len({block.ff for block in model.blocks} - {0}) >= 2
        assert len({block.heads_kv for block in model.blocks} - {0}) >= 2
        assert any(block.heads and not block.rope for block in model.blocks)
        assert any(block.window for block in model.blocks)
    assert N > WINDOW


@pytest.mark.parametrize("name", MODELS)
def test_a_file_says_what_each_block_is(file: Made, name: str) -> None:
    with GgufFile(file(name)) as opened:
        assert opened.metadata["lazyneuron.schema_version"] == 3
        blocks = opened.structure.blocks
    for block, found in zip(MODELS[name].blocks, blocks, strict=True):
        assert (found.ffn.n_ff if found.ffn else 0) == block.ff
        a = found.mixer
        assert (bool(a), a.head_count if a else 0, a.head_count_kv if a else 0) == (
            block.heads > 0,
            block.heads,
            block.heads_kv,
        )
        assert not a or (bool(a.rope), a.window) == (block.rope, WINDOW * block.window)


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(file: Made, expected: Expected, name: str, mode: str, flash_attention: bool) -> None:
    found = logits(file(name, predicted=mode == "predicted"), **MODES[mode], flash_attention=flash_attention)
    assert relative(expected(name), found) <= FLOATS


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_neurons_on_a_device_change_nothing(file: Made, expected: Expected, name: str, mode: str, split: str) -> None:
    path = file(name, predicted=mode == "predicted")
    assert relative(expected(name), logits(path, **MODES[mode], device="CPU", hot=cuts(name, split))) <= FLOATS


@pytest.mark.parametrize("split", ["none", "half", "all"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_blocks_on_a_device_changes_nothing(
    file: Made, expected: Expected, monkeypatch: pytest.MonkeyPatch, name: str, mode: str, split: str
) -> None:
    """Whether the first block there has attention, an FFN, or both; with and without the head."""
    planned, hot = choose.place, cuts(name, split)
    for first in range(len(hot) + 1):
        for head in (True, False) if first in (1, len(hot)) else (True,):
            pieces = tuple((k if i >= first else 0,) for i, k in enumerate(hot))
            place = lambda *a, f=first, h=head, p=pieces: replace(planned(*a), resident_from=f, head=h, hot=p)  # noqa: E731
            monkeypatch.setattr(choose, "place", place)
            found = logits(file(name, predicted=mode == "predicted"), **MODES[mode], device="CPU", vram_budget="1")
            assert relative(expected(name), found) <= FLOATS, (first, head)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_two_devices_change_nothing(
    file: Made, expected: Expected, monkeypatch: pytest.MonkeyPatch, name: str, mode: str
) -> None:
    planned = choose.place
    pieces = tuple((32, 64) if block.ff else (0, 0) for block in MODELS[name].blocks)
    monkeypatch.setattr(choose, "place", lambda *a: replace(planned(*a), resident_from=0, head=True, hot=pieces))
    path = file(name, predicted=mode == "predicted")
    found = logits(path, **MODES[mode], device="CPU,CPU", vram_budget="1,1")
    assert relative(expected(name), found) <= FLOATS


@pytest.mark.parametrize("where", ["CPU alone", "divided"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_and_single_tokens_give_the_same(
    file: Made, expected: Expected, name: str, mode: str, where: str
) -> None:
    """A prompt in batches, the last of them one token longer than the window or shorter, then token by token."""
    ids, rows = random_ids(N, 4000), []

    def forced(known: Any, found: Logits) -> Logits:
        rows.append(found.copy())
        found[:] = -math.inf
        found[ids[min(len(known), N - 1)]] = 0.0
        return found

    there = (
        {"device": "CPU", "hot": cuts(name, "another one in each block")} if where == "divided" else {"device": "none"}
    )
    path, head = file(name, predicted=mode == "predicted"), 28
    with runtime.load(path, kv_type="f32", n_batch=WINDOW + 3, **MODES[mode], **there) as model:
        greedy = runtime.Sampling(temperature=0.0)
        list(model.generate(ids[:head], max_tokens=N - head + 1, sampling=greedy, logits_processors=forced))
    assert relative(expected(name)[head - 1 :], np.array(rows)) <= FLOATS


@pytest.mark.parametrize("mode", ["exact", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_quantised_files_are_no_further_off_when_divided(file: Made, expected: Expected, name: str, mode: str) -> None:
    path = file(name, "q8_0")
    dense = kl(expected(name), logits(path, ffn="dense"))
    assert kl(expected(name), logits(path, **MODES[mode])) <= 1.2 * dense
    assert kl(expected(name), logits(path, **MODES[mode], device="CPU", hot=cuts(name, "half"))) <= 1.2 * dense


@pytest.mark.parametrize("name", MODELS)
def test_calibration_reorders_neurons_and_changes_nothing(file: Made, expected: Expected, name: str) -> None:
    path = file(name, calibration=None, calibration_tokens=1536)
    with GgufFile(path) as opened:
        assert opened.structure.neuron_order == "hot"
        ordered = {int(n.split(".")[1]) for n in opened.tensors if n.endswith("ffn_neuron_index")}
    assert ordered == {i for i, block in enumerate(MODELS[name].blocks) if block.ff}
    assert relative(expected(name), logits(path, ffn="exact")) <= FLOATS


@pytest.mark.parametrize("name", MODELS)
def test_figures_count_the_neurons_that_a_block_has(file: Made, name: str) -> None:
    with runtime.load(file(name), ffn="exact", device="none", kv_type="f32") as model:
        generation = model.generate(random_ids(20, 4000), max_tokens=8)
        list(generation)
        shares, stats = generation.stats.layer_shares, generation.stats
    neurons = [block.ff for block in MODELS[name].blocks]
    assert stats.computed_share == pytest.approx(np.average(shares, weights=neurons))
    for share, block in zip(shares, MODELS[name].blocks, strict=True):
        assert 0.1 < share < 0.9 if block.ff else share == 0.0


def test_what_is_said_of_such_a_model(file: Made, tmp_path: Path) -> None:
    """The figures of each layer are there, also of those without an FFN, and those of the whole model add up."""
    name = "ends with attention"
    model, sizes = file(name, calibration=None, calibration_tokens=2048), [block.ff for block in MODELS[name].blocks]
    machine = ("--device-bandwidth", 272, "--cpu-bandwidth", 25, "--sync-us", 1)
    sparsity = result_of("runtime", "sparsity", model)["layers"]
    assert [layer["active"] > 0 for layer in sparsity] == [n > 0 for n in sizes]
    shares = result_of("runtime", "inspect", model)["sparsity"]
    fired = [layer["active"] for layer in sparsity]
    assert shares["layer_shares"] == pytest.approx(fired)
    assert shares["share"] == pytest.approx(np.mean([share for share, n in zip(fired, sizes, strict=True) if n]))
    plan = result_of("runtime", "plan", model, "--vram-budget", 1, *machine)
    assert [layer["neurons"] for layer in plan["layers"]] == sizes
    page = tmp_path / "page.html"
    placement = result_of("runtime", "report", model, page, *machine)["placement"]
    assert placement["neurons"] == sizes
    assert f"{min(sizes):,} to {max(sizes):,}" in page.read_text(encoding="utf-8")
    assert f"of {min(sizes):,} to {max(sizes):,} neurons" in result_of("convert", "card", model)["card"]
    for words in (("inspect", model), ("sparsity", model), ("plan", model, "--vram-budget", 1, *machine)):
        assert command("runtime", *words).returncode == 0
