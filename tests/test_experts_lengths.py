"""Mixtures of which a device holds more neurons of some experts than of the others: what is computed, chosen, shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from company import UNLIKE, whole_together
from experts import FF, MODELS, WIDTH
from in_process import command
from oracle import Logits, random_ids, relative
from test_experts import FLOATS, N, rewritten
from test_sides import engine

import runtime
from bench.expert_placement import Mixture, routed
from convert import convert
from predictors.matrices import Tensor
from predictors.replace_predictors import replace_predictors
from runtime.compute.batch import Batch
from runtime.compute.ffns import experts
from runtime.hybrid import choose
from runtime.hybrid.costs import PlanOptions, model_costs, plan_for
from runtime.hybrid.lengths import Longer, colder, longer_cuts
from runtime.hybrid.planner import BlockCosts, Machine, Placement
from runtime.hybrid.tensor_map import BlockSides, Piece, TensorMap
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions

pytestmark = pytest.mark.numeric

# Neurons of every expert on the device, then up to where it has those of some, and of which: fewer than a token uses,
# nearly all, both lengths.
WAYS = {
    "one, whole": (0, Longer(64, (1,), 0.2)),
    "five, whole": (0, Longer(64, (0, 1, 2, 3, 4), 0.6)),
    "two, half": (0, Longer(32, (2, 5), 0.3)),
    "half, and four whole": (32, Longer(64, (0, 2, 3, 5), 0.5)),
}
MODES: dict[str, dict[str, Any]] = {
    "dense": {"ffn": "dense"},
    "exact": {"ffn": "exact"},
    "predicted": {"ffn": "predicted", "predictor_bias": math.inf},
    "verified": {"ffn": "verified"},
}
MODEL = "smallthinker-21b"
Made = Callable[[str], Path]
Expected = Callable[[str], Logits]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lengths")


@pytest.fixture(scope="module")
def file(folder: Path) -> Made:
    """A converted checkpoint, with random predictors in all blocks but the first."""

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            MODELS[name].make(folder / name)
            plain = folder / f"{name}-plain.gguf"
            convert(folder / name, plain, type="f32", calibration="none")
            replace_predictors(plain, path, *random_predictors(MODELS[name].experts))
        return path

    return get


def random_predictors(count: int, rank: int = 8) -> tuple[list[list[Tensor]], dict[str, Any]]:
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> Tensor:
        return Tensor(name, "f32", shape, rng.standard_normal(shape[::-1], np.float32).reshape(-1).view(np.uint8))

    def block() -> list[Tensor]:
        return [
            tensor("predictor_in.weight", WIDTH, rank),
            tensor("predictor_out_exps.weight", rank, FF, count),
            tensor("predictor_out_exps.bias", FF, count),
        ]

    keys = {"kind": "lowrank", "rank": [0, rank, rank], "error": [0.0, 1.0, 1.0]}
    return [[], block(), block()], {f"lazyneuron.predictor.{key}": value for key, value in keys.items()}


@pytest.fixture(scope="module")
def expected(folder: Path, file: Made) -> Expected:
    known: dict[str, Logits] = {}

    def get(name: str) -> Logits:
        if name not in known:
            file(name)
            known[name] = MODELS[name].logits(folder / name, random_ids(N, 4000))
        return known[name]

    return get


@pytest.fixture
def placed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the planner choose a way, for the blocks from one on."""
    planned = choose.place

    def let(way: str, first: int = 0, head: bool = True) -> None:
        k, longer = WAYS[way]
        chosen: dict[str, Any] = {
            "hot": tuple((k if i >= first else 0,) for i in range(3)),
            "longer": tuple(longer if i >= first else None for i in range(3)),
        }
        place = lambda *a: replace(planned(*a), resident_from=first, head=head, **chosen)  # noqa: E731
        monkeypatch.setattr(choose, "place", place)

    return let


def load(path: Path, **options: Any) -> runtime.Model:
    common = {"device": "CPU", "vram_budget": "1", "kv_type": "f32", "threads": 2}
    return runtime.load(path, **common | options)


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "way"),
    [(MODEL, way) for way in WAYS]
    + [("mixtral-drelu-tied", "five, whole"), ("mixtral-drelu-tied", "half, and four whole")]
    + [("smallthinker-softmax", "two, half")],
)
def test_more_neurons_of_some_experts_change_nothing(
    file: Made, expected: Expected, placed: Callable[..., None], name: str, mode: str, way: str
) -> None:
    """A prompt at once, and token by token."""
    placed(way)
    ids, wanted = random_ids(N, 4000), expected(name)
    with load(file(name), **MODES[mode]) as model:
        assert model.arrangement is not None
        assert all(block.of_some_experts for block in model.arrangement.tensor_map.blocks)
        assert relative(wanted, model.logits(ids)) < FLOATS
        model.engine.cells.clear()
        if mode != "verified":  # whose single tokens are drafts
            found = np.concatenate([model.engine.compute(Batch.of([t], k)) for k, t in enumerate(ids[:6])])
            assert relative(wanted[:6], found) < FLOATS


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize(("first", "head"), [(1, True), (2, False)])
def test_any_number_of_blocks(
    file: Made, expected: Expected, placed: Callable[..., None], first: int, head: bool, ffn: str
) -> None:
    placed("half, and four whole", first, head)
    with load(file(MODEL), ffn=ffn) as model:
        assert relative(expected(MODEL), model.logits(random_ids(N, 4000))) < FLOATS


@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_eight_sequences_with_unlike_tokens(file: Made, folder: Path, placed: Callable[..., None], ffn: str) -> None:
    placed("five, whole")
    with load(file(MODEL), ffn=ffn) as model:
        found = whole_together(model.engine, UNLIKE)
    wanted = np.concatenate([MODELS[MODEL].logits(folder / MODEL, ids) for ids in UNLIKE])
    assert relative(wanted, found) < FLOATS


SOME = (1, 2, 7)
OTHERS = tuple(e for e in range(16) if e not in SOME)


@pytest.mark.parametrize("home", [0, 1, 2])
@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_wherever_the_router_is(file: Made, expected: Expected, home: int, ffn: str) -> None:
    """Maps that no planner makes: two devices, either or the CPU being the block's home."""
    pieces = (Piece(1, 0, 32, SOME), Piece(2, 0, 32, OTHERS), Piece(2, 32, 64, SOME), Piece(0, 32, 64, OTHERS))
    made = engine(file(MODEL), ((BlockSides(home, pieces),) * 3, home), ffn=ffn)
    try:
        found = made.compute(Batch.of(random_ids(N, 4000), outputs=range(N)))
    finally:
        made.close()
    assert relative(expected(MODEL), found) < FLOATS


@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_a_mistake_shows(
    file: Made, expected: Expected, placed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, ffn: str
) -> None:
    """Each expert in another one's place."""
    placed("half, and four whole")
    monkeypatch.setattr("runtime.hybrid.sides.members", lambda *a, **k: np.roll(experts.members(*a, **k), 1, axis=0))
    with load(file(MODEL), ffn=ffn) as model:
        assert relative(expected(MODEL), model.logits(random_ids(N, 4000))) > 100 * FLOATS


def test_what_is_counted(file: Made, placed: Callable[..., None]) -> None:
    """Shares are of the neurons that a token can reach, all of which are read in one place or the other; choices are
    counted though the CPU has none of some experts' neurons.
    """
    placed("five, whole")
    ids = random_ids(N, 4000)
    with load(file(MODEL), device="none", vram_budget=None, ffn="exact") as model:
        model.logits(ids)
        alone, choices = model.layer_shares(), model.expert_shares()
    with load(file(MODEL), ffn="exact") as model:
        model.logits(ids)
        assert model.gate_shares() == [1.0] * 3
        assert all(a < b <= 1 for a, b in zip(alone, model.layer_shares(), strict=True))
        assert np.allclose(model.expert_shares(), choices)
    with load(file(MODEL), ffn="predicted") as model:
        model.logits(ids)
        assert all(0 < share <= 1 for share in (*model.gate_shares(), *model.layer_shares()))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((Piece(1, 0, 64, (1,)),), "each of its neurons, of each expert, once"),
        ((Piece(1, 0, 64, (1, 16)), Piece(0, 0, 64)), "pieces of experts"),
        ((Piece(1, 0, 64, ()), Piece(0, 0, 64)), "pieces of experts"),
        ((Piece(1, 0, 64, (2, 1, 7)), Piece(0, 0, 64, OTHERS)), "must rise"),
        ((Piece(1, 0, 64, SOME), Piece(0, 32, 64, OTHERS)), "each of its neurons, of each expert, once"),
        ((Piece(0, 0, 64, SOME), Piece(0, 0, 64, OTHERS)), "begin with the same neuron"),
        (
            (Piece(0, 0, 32), Piece(1, 32, 48, SOME), Piece(2, 32, 48, OTHERS), Piece(0, 48, 64)),
            "between those of the CPU",
        ),
    ],
)
def test_maps_that_make_no_sense(file: Made, pieces: tuple[Piece, ...], text: str) -> None:
    with GgufFile(file(MODEL)) as opened:
        whole = BlockSides(0, (Piece(0, 0, 64),))
        with pytest.raises(ValueError, match=text):
            TensorMap(opened.structure, (whole, whole, BlockSides(1, pieces)), 0, False)


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_the_longer_prefix_is_of_the_experts_that_save_most(seed: int) -> None:
    """Against all choices of so many experts, and the bytes counted anew."""
    rng = np.random.default_rng(seed)
    count, used, cuts = 6, 2, (0, 2, 4, 8)
    shares = rng.dirichlet(np.ones(count)) * used
    read = shares[:, None] * -np.sort(-rng.random((count, 8)), axis=1)
    found = longer_cuts(read, shares, cuts, used, 10.0, 5.0)
    assert len({cut.hot for cut in found}) > 8
    for cut in found:
        a, b, n = cut.first, cut.longer.end, len(cut.longer.experts)
        assert {a, b} < {*cuts}
        left = [read[:, a:].sum() - read[list(some), a:b].sum() + 5 for some in combinations(range(count), n)]
        assert cut.cold == pytest.approx(min(left))
        assert cut.longer.share == pytest.approx(shares[list(cut.longer.experts)].sum() / used)
        assert cut.hot == 10 * (count * a + n * (b - a))
        assert cut.read == 10 * (used * a + min(used, n) * (b - a))
    assert np.allclose(colder(read)[:, 2], read[:, 2:].sum(1))


def test_tokens_differ_in_what_the_cpu_reads() -> None:
    """The mean and the spread that the planner takes, against 4,000 tokens."""
    mixture = Mixture(layers=1, count=64, used=6, n_ff=96, row=10.0, active=0.3)
    chosen = routed(mixture, 0.0, 1.0)
    shares = np.bincount(chosen.ravel(), minlength=64) / len(chosen)
    fired = np.linspace(0.9, 0.1, 96)
    read = shares[:, None] * mixture.row * (1 + 2 * fired)
    found = longer_cuts(read, shares, (0, 32, 64, 96), 6, 30.0)
    for cut in found[:: len(found) // 12]:
        lengths = np.full(64, cut.first)
        lengths[list(cut.longer.experts)] = cut.longer.end
        bytes_ = np.array([mixture.row * (1 + 2 * fired[k:]).sum() for k in lengths])[chosen].sum(1)
        assert cut.cold == pytest.approx(bytes_.mean())
        assert cut.spread == pytest.approx(bytes_.std(), rel=0.1)


@pytest.fixture(scope="module")
def uneven(file: Made, folder: Path) -> Path:
    """A calibrated file whose experts 3 and 9 do most of the work."""
    chosen = np.full(16, 4.1 / 14, np.float32)
    chosen[[3, 9]] = 1.0, 0.9
    tensors: dict[str, npt.NDArray[Any]] = {}
    for i in range(3):
        tensors[f"blk.{i}.expert_freq"] = chosen
        tensors[f"blk.{i}.ffn_neuron_freq_exps"] = np.tile(np.linspace(0.9, 0.1, FF, dtype=np.float32), (16, 1))
        tensors[f"blk.{i}.ffn_neuron_index_exps"] = np.tile(np.arange(FF, dtype=np.int32), (16, 1))
    return rewritten(file(MODEL), folder / "uneven.gguf", {"neuron_order": "hot"}, tensors)


MACHINE = ("--ffn", "exact", "--n-ctx", 64, "--device-bandwidth", 400, "--cpu-bandwidth", 20, "--sync-us", 0)


def a_quarter(path: Path) -> float:
    """GiB that hold a quarter of the neurons, and everything else."""
    options = PlanOptions(SettledOptions(ffn="exact", n_ctx=64), (1 << 40,), (4e11,), 2e10, sync=0)
    with GgufFile(path) as opened:
        blocks, _ = model_costs(opened, options)
        return (plan_for(opened, options).bytes[0] - sum(3 * b.hot[-1] // 4 for b in blocks)) / 2**30


def test_it_is_planned_shown_and_run(uneven: Path, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.hybrid.costs.LONGER", 0.0)  # of so small a model it would be most of the time
    budget = a_quarter(uneven)
    done = command("runtime", "plan", uneven, "--vram-budget", budget, *MACHINE, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    layer = found["layers"][0]
    k, longer, n = layer["hot"][0], layer["longer"], len(layer["longer_experts"])
    assert longer > k
    assert {3, 9} <= {*layer["longer_experts"]} < {*range(16)}
    assert layer["held"] == pytest.approx((16 * k + n * (longer - k)) / (16 * FF))
    assert layer["activations"] > layer["held"]
    assert found["devices"][0]["bytes"] <= budget * 2**30
    assert (
        f"{k}; of {n} experts {longer}" in command("runtime", "plan", uneven, "--vram-budget", budget, *MACHINE).stdout
    )


def test_a_plan_is_kept_within_its_bytes(uneven: Path, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's own choice for a device of this machine, as if the CPU were slow."""
    planned = choose.place

    def with_a_quarter(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> Placement:
        slow = replace(machine, cpu_bandwidth=1e6, sync=0.0, longer=0.0)
        most = planned(blocks, head, slow).bytes[0] - sum(3 * b.hot[-1] // 4 for b in blocks)
        return planned(blocks, head, replace(slow, devices=(replace(slow.devices[0], budget=most),)))

    monkeypatch.setattr(choose, "place", with_a_quarter)
    with load(uneven, ffn="exact", n_ctx=64) as model:
        assert model.arrangement is not None
        placement = model.arrangement.placement
        assert any(placement.longer)
        assert relative(expected(MODEL), model.logits(random_ids(N, 4000))) < FLOATS
        assert 0.5 * placement.bytes[0] < model.device_bytes()[0] <= placement.bytes[0]


def test_uncalibrated_experts_are_alike(file: Made) -> None:
    """Costs at equal prefixes are those of a token's experts."""
    options = PlanOptions(SettledOptions(ffn="exact", n_ctx=64), (1,), (4e11,), 2e10, scattered=1.0)
    with GgufFile(file(MODEL)) as opened:
        (block, *_), _ = model_costs(opened, options)
    assert block.cold == pytest.approx([6 * 3 * 4 * WIDTH * (FF - k) for k in block.cuts])
    assert block.hot_read == 6 / 16
