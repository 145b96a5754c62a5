"""A model on a device and the CPU against the same model on the CPU alone. The device is a second CPU backend, driven by a thread of its own."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, kl, random_ids, relative, transformers_logits
from splits import SPLITS, hot

import runtime
from convert import convert
from predictors.__main__ import main
from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.hybrid import choose
from runtime.hybrid.costs import PlanOptions
from runtime.hybrid.planner import Placement
from runtime.hybrid.schedule import Compute

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
BUNDLED = Path(__file__).parent.parent / "examples/tiny-relu-llama"
FAMILIES = ("bundled", "llama-gqa", "llama-odd-ff", "llama-biases", "opt-pre-norm", "opt-post-norm", "opt-untied")


def logits(path: Path, ids: list[int], **options: Any) -> Logits:
    with runtime.load(path, **{"device": "none", "kv_type": "f32"} | options) as model:
        return model.logits(ids)


@pytest.fixture(scope="module")
def cpu_only(converted: Converted) -> Callable[..., Logits]:
    """Logits without a device, computed once."""
    known: dict[Any, Logits] = {}

    def get(path: Path, ids: list[int], **options: Any) -> Logits:
        key = (path, len(ids), *sorted(options.items()))
        if key not in known:
            known[key] = logits(path, ids, **options)
        return known[key]

    return get


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("type_name", "tolerance", "ffn"), [("f32", 1e-4, "exact"), ("f32", 1e-4, "dense"), ("f16", 2e-3, "exact")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_split_changes_nothing(
    converted: Converted,
    cpu_only: Callable[..., Logits],
    family: str,
    type_name: str,
    tolerance: float,
    ffn: str,
    split: str,
) -> None:
    path, ids = converted(family, type_name), random_ids(40, 4000)
    found = logits(path, ids, ffn=ffn, device="CPU", hot=hot(path, split))
    assert relative(cpu_only(path, ids, ffn=ffn), found) <= tolerance


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["bundled", "llama-gqa", "opt-pre-norm"])
def test_a_split_is_no_further_from_the_unquantised_model_than_dense(
    checkpoint: Callable[[str], Path],
    converted: Converted,
    cpu_only: Callable[..., Logits],
    family: str,
    type_name: str,
    split: str,
) -> None:
    path, ids = converted(family, type_name), random_ids(128, 4000)
    reference = transformers_logits(checkpoint(family), ids)
    dense = kl(reference, cpu_only(path, ids, ffn="dense"))
    assert kl(reference, logits(path, ids, ffn="exact", device="CPU", hot=hot(path, split))) <= 1.2 * dense


@pytest.mark.parametrize("split", SPLITS)
def test_predictors_that_name_every_neuron_change_nothing(fitted_gguf: Path, split: str) -> None:
    ids = random_ids(40, 4000)
    exact = logits(fitted_gguf, ids, ffn="exact")
    found = logits(fitted_gguf, ids, ffn="predicted", predictor_bias=1e30, device="CPU", hot=hot(fitted_gguf, split))
    assert relative(exact, found) <= 2e-3


def choices(path: Path, ids: list[int], **options: Any) -> tuple[Logits, list[float]]:
    with runtime.load(path, ffn="predicted", kv_type="f32", **options) as model:
        found = model.logits(ids)
        return found, model.gate_shares()


@pytest.mark.parametrize("kind", ["lowrank", "signbit"])
def test_predictors_choose_the_same_cold_neurons(predictor_file: Callable[[str], Path], kind: str) -> None:
    """Scores are computed on the device, choices made on the CPU: the same ones as on the CPU alone, but for scores at the very threshold."""
    path, ids = predictor_file(kind), random_ids(40, 4000)
    alone, shares = choices(path, ids, device="none")
    split, shares_split = choices(path, ids, device="CPU", hot=0)
    assert any(share < 0.9 for share in shares)
    assert np.allclose(shares, shares_split, atol=2e-3)
    assert relative(alone, split) <= 1e-2


@pytest.fixture(scope="module")
def predictor_file(tmp_path_factory: pytest.TempPathFactory, converted: Converted) -> Callable[[str], Path]:
    """The bundled model in F32 with a predictor of one kind."""
    folder = tmp_path_factory.mktemp("predictors")

    def get(kind: str) -> Path:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            arguments = ["fit", str(converted("bundled")), str(path), "--kind", kind, "--calibration-tokens", "4096"]
            assert main(arguments) == 0
        return path

    return get


@pytest.mark.parametrize("head", [1, 7, 300])
def test_generation_is_the_same_text(converted: Converted, head: int) -> None:
    """Prompts of one token, some, and more than a batch's worth; then token by token."""
    path = converted("bundled")

    def greedy(**options: Any) -> list[int]:
        with runtime.load(path, kv_type="f32", n_batch=128, **options) as model:
            generation = model.generate(
                random_ids(head, 4000), max_tokens=64, sampling=runtime.Sampling(temperature=0.0)
            )
            list(generation)
            return list(generation.token_ids)

    assert greedy(device="CPU", hot=512) == greedy(device="none")


def test_two_runs_give_the_same_bits(converted: Converted) -> None:
    path, ids = converted("bundled", "q4_0"), random_ids(60, 4000)
    options: dict[str, Any] = {"device": "CPU", "hot": 256, "threads": 2}
    assert np.array_equal(logits(path, ids, **options), logits(path, ids, **options))


def test_a_file_without_the_device_s_layout_keeps_its_neurons_on_the_cpu(tmp_path: Path) -> None:
    """`ffn_down_t` is for the CPU's kernels only: attention, keys and values and the head can be on the device all the same."""
    path, ids = tmp_path / "sparse.gguf", random_ids(40, 4000)
    convert(BUNDLED, path, type="f32", layout="sparse", calibration="none")
    assert relative(logits(path, ids, ffn="exact"), logits(path, ids, ffn="exact", device="CPU", hot=0)) <= 1e-4
    with pytest.raises(UserError, match="256 hot neurons, expected 0, since the file has no ffn_down"):
        logits(path, ids, device="CPU", hot=256)


def test_blocks_may_differ(converted: Converted) -> None:
    path, ids = converted("bundled"), random_ids(40, 4000)
    split = (0, 1024, 256, 512, 1024, 768)
    with runtime.load(path, device="CPU", hot=split, kv_type="f32", ffn="exact") as model:
        found = model.logits(ids)
        shares = model.layer_shares()
    assert relative(logits(path, ids, ffn="exact"), found) <= 1e-4
    assert [share >= k / 1024 for share, k in zip(shares, split, strict=True)] == [True] * 6
    assert shares[1] == shares[4] == 1.0


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget(path: Path, mib: float, **options: Any) -> runtime.Model:
    return runtime.load(path, device="CPU", vram_budget=f"{mib}MiB", **{"n_ctx": 256, "n_batch": 64} | options)


@pytest.fixture
def fast_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the planner take the stand-in for a device that is worth all it can hold."""
    measured = choose.machine_options

    def faster(*arguments: Any) -> PlanOptions:
        return replace(measured(*arguments), device_bandwidths=(40e12,), cpu_bandwidth=40e9, sync=1e-6)

    monkeypatch.setattr(choose, "machine_options", faster)


@pytest.mark.usefixtures("fast_device")
@pytest.mark.parametrize("mib", [1, 4, 6, 8, 12, 16, 24])
def test_budgets_are_kept(fitted_gguf: Path, mib: float) -> None:
    """All buffers together, also after prompts and after every position's logits."""
    with budget(fitted_gguf, mib) as model:
        list(model.generate(random_ids(100, 4000), max_tokens=3))
        model.logits(random_ids(200, 4000))
        list(model.generate(random_ids(10, 4000), max_tokens=3))
        assert model.arrangement
        assert model.arrangement.used == (mib > 1)
        assert sum(model.device_bytes()) + model.arrangement.scratch <= mib * 2**20


@pytest.mark.usefixtures("fast_device")
def test_more_budget_puts_more_on_the_device(fitted_gguf: Path) -> None:
    def neurons(mib: float) -> int:
        with budget(fitted_gguf, mib) as model:
            return sum(map(sum, model.arrangement.placement.hot)) if model.arrangement else 0

    found = [neurons(mib) for mib in (0, 6, 10, 14, 1000)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 6 * 1024)


def test_no_budget_is_the_cpu_alone(fitted_gguf: Path) -> None:
    ids = random_ids(50, 4000)
    with budget(fitted_gguf, 0, kv_type="f32") as model:
        assert model.arrangement
        assert not model.arrangement.used
        assert model.device_bytes() == ()
        found = model.logits(ids)
    assert np.array_equal(found, logits(fitted_gguf, ids, n_ctx=256, n_batch=64))


@pytest.mark.usefixtures("fast_device")
def test_a_huge_budget_puts_everything_on_the_device(fitted_gguf: Path) -> None:
    with budget(fitted_gguf, 2000) as model:
        assert model.arrangement
        placement = model.arrangement.placement
        assert (placement.resident_from, placement.head) == (0, True)
        assert placement.hot == ((1024,),) * 6
        list(model.generate("Once", max_tokens=2))
        assert model.layer_shares() == [1.0] * 6


@pytest.mark.usefixtures("fast_device")
def test_a_middling_budget_is_split(fitted_gguf: Path) -> None:
    with budget(fitted_gguf, 12) as model:
        assert model.arrangement
        hot = [sum(k) for k in model.arrangement.placement.hot]
        assert 0 < sum(hot) < 6 * 1024
        ids = random_ids(50, 4000)
        found = model.logits(ids)
    assert relative(logits(fitted_gguf, ids, n_ctx=256), found) <= 5e-2


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [(256, 256), (0, 512), (512, 512), (768, 256), (32, 64)])
def test_several_devices_hold_pieces_of_the_prefix(
    converted: Converted, monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, int]
) -> None:
    """The second one's products are added up in main memory, whether or not the CPU has a part of its own."""
    path, ids = converted("bundled"), random_ids(40, 4000)
    planned = choose.place

    def fixed(blocks: Any, head: int, machine: Any) -> Placement:
        found = planned(blocks, head, machine)
        return replace(found, resident_from=0, head=True, hot=(pieces,) * len(blocks))

    monkeypatch.setattr(choose, "place", fixed)
    with runtime.load(path, device="CPU,CPU", vram_budget="1,1", kv_type="f32", ffn="exact") as model:
        found = model.logits(ids)
        first, second = model.device_bytes()
    assert relative(logits(path, ids, ffn="exact"), found) <= 1e-4
    assert second >= 6 * pieces[1] * 3 * 256 * 4 > 0
    assert first > 0


# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_devices", [1, 2])
def test_both_halves_of_an_ffn_are_computed_at_the_same_time(
    converted: Converted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n_devices: int
) -> None:
    """The halves of each block's FFN wait for each other: were one computed after the other, none would ever end."""
    hot: Any = 512 if n_devices == 1 else None
    if n_devices == 2:
        planned = choose.place
        monkeypatch.setattr(
            choose,
            "place",
            lambda *a: replace(planned(*a), resident_from=0, head=True, hot=((256, 256),) * 6),
        )
    device = ",".join(["CPU"] * n_devices)
    names: dict[int | None, str] = {}
    run, meeting, met = Compute.run, threading.Barrier(n_devices + 1, timeout=200), []

    def named(step: Compute) -> None:
        if step.subgraph.name.startswith(("hot", "cold")):
            names[step.subgraph.graph.value] = step.subgraph.name
        run(step)

    with runtime.load(
        converted("bundled"),
        device=device,
        hot=hot,
        vram_budget=",".join("1" * n_devices),
        trace=tmp_path / "t.json",
        threads=1,
    ) as model:
        model.logits([5])
        compute = ggml.ggml_backend_graph_compute  # resolved by its first call

        def together(backend: Any, graph: Any) -> int:
            if graph.value in names:
                met.append(names[graph.value])
                meeting.wait()
            return int(compute(backend, graph))

        monkeypatch.setattr(Compute, "run", named)
        monkeypatch.setattr(ggml, "ggml_backend_graph_compute", together)
        model.logits([5])
        monkeypatch.undo()
    assert Counter(met) == {f"hot {i}": n_devices for i in range(6)} | {f"cold {i}": 1 for i in range(6)}
    spans = last_step(tmp_path / "t.json")
    halves = [[span for name, span in spans if name == f"{half} {i}"] for i in range(6) for half in ("hot", "cold")]
    for hots, colds in zip(halves[::2], halves[1::2], strict=True):
        assert (len(hots), len(colds)) == (n_devices, 1)
        assert all(overlap(h, colds[0]) > 0 for h in hots)  # and the trace shows it


def last_step(path: Path) -> list[tuple[str, tuple[float, float]]]:
    """Name, begin and end in seconds of what the last token took, from a trace file."""
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    last = max(e["args"]["step"] for e in events)
    return [(e["name"], (e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)) for e in events if e["args"]["step"] == last]


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return min(a[1], b[1]) - max(a[0], b[0])
