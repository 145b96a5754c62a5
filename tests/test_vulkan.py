"""On a real backend of ggml with its own memory, queue and events: Mesa's software Vulkan.

`make test-vulkan` runs these twice, in the device's own precision and in F32 alone. Nothing here is ever skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mamba
import numpy as np
import pytest
from devices import gpu, product
from oracle import Logits, kl, random_ids, relative, same_argmax
from splits import SPLITS, hot

import runtime
from runtime.compute.batch import Batch
from runtime.hybrid import choose
from runtime.hybrid.lengths import Longer

Converted = Callable[..., Path]

MADE = ("llama-gqa", "opt-pre-norm", "opt-post-norm")  # as tests/vulkan.sh names them
EXPERTS = ("mixtral-drelu-tied", "smallthinker-21b")  # and these

pytestmark = pytest.mark.vulkan


@pytest.fixture(scope="session")
def device() -> str:
    """Name of the GPU device, e.g. "Vulkan0"; where there is none, the tests fail."""
    return gpu().name


@pytest.fixture(scope="session")
def half_precision() -> bool:
    """Whether the device may round the factors of large F32 products to F16, which is ggml's default where the device can."""
    return "GGML_VK_DISABLE_F16" not in os.environ


def test_the_device_is_a_gpu_with_its_own_queue_and_events(device: str) -> None:
    info = gpu()
    assert device.startswith("Vulkan")
    assert "llvmpipe" in info.description  # the software driver, not a GPU that happens to be there
    assert info.kind == "GPU"
    assert info.asynchronous
    assert info.events
    assert info.memory_free > 0


@pytest.mark.parametrize("n_tokens", [1, 64])
def test_a_product_on_the_device_is_that_of_float64(half_precision: bool, n_tokens: int) -> None:
    rng = np.random.default_rng(5)
    weights, x = rng.normal(size=(320, 512)).astype(np.float32), rng.normal(size=(n_tokens, 512)).astype(np.float32)
    expected = x.astype(np.float64) @ weights.astype(np.float64).T
    error = np.abs(product(gpu(), weights, x) - expected).max() / np.abs(expected).max()
    rounded = half_precision and n_tokens > 8  # products with few columns are computed in F32 always
    assert error < (2**-11 if rounded else 1e-4)


# --- a model on it ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def model_file(converted: Converted) -> Callable[[str, str], Path]:
    """A model in a type: the bundled one is converted here, the others were where transformers is (see tests/vulkan.sh)."""
    made = Path(os.environ["LAZYNEURON_TEST_MODELS"])
    return lambda name, type_name: converted(name, type_name) if name == "bundled" else made / f"{name}.gguf"


@pytest.fixture(scope="session")
def cpu_only(model_file: Callable[[str, str], Path]) -> Callable[..., Logits]:
    known: dict[tuple[str, str, str], Logits] = {}

    def get(name: str, type_name: str, ffn: str) -> Logits:
        if (name, type_name, ffn) not in known:
            known[name, type_name, ffn] = logits(model_file(name, type_name), device="none", ffn=ffn)
        return known[name, type_name, ffn]

    return get


def logits(path: Path, n: int = 100, **options: Any) -> Logits:
    with runtime.load(path, **{"kv_type": "f32"} | options) as model:
        return model.logits(random_ids(n, 4000))


@pytest.mark.parametrize(
    ("name", "type_name", "ffn", "split"),
    [("bundled", type_name, "exact", split) for type_name in ("f32", "f16") for split in SPLITS]
    + [("bundled", "f32", "dense", "half")]
    + [(name, "f32", "exact", split) for name in MADE for split in ("half", "all")],
)
def test_logits_are_those_of_the_cpu(
    device: str,
    half_precision: bool,
    model_file: Callable[[str, str], Path],
    cpu_only: Callable[..., Logits],
    name: str,
    type_name: str,
    ffn: str,
    split: str,
) -> None:
    path = model_file(name, type_name)
    found = logits(path, device=device, ffn=ffn, hot=hot(path, split))
    assert relative(cpu_only(name, type_name, ffn), found) <= (1e-2 if half_precision else 1e-3)
    assert same_argmax(cpu_only(name, type_name, ffn), found) >= 0.99


@pytest.mark.parametrize("split", ["none", "one block", "all"])
@pytest.mark.parametrize("ffn", ["exact", "dense"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_chosen_by_one_router(
    device: str,
    half_precision: bool,
    model_file: Callable[[str, str], Path],
    name: str,
    ffn: str,
    split: str,
) -> None:
    """The device's choice is the CPU's too. Where products are rounded to F16, which those of few columns are not, some
    tokens of a longer text get other experts. Eight tokens at once: with more this driver dies of ggml's products by
    expert (docs/hybrid.md).
    """
    path, n = model_file(name, "f32"), 4 if half_precision else 100
    expected = logits(path, n, device="none", ffn=ffn)
    found = logits(path, n, device=device, ffn=ffn, hot=hot(path, split), n_batch=8)
    assert relative(expected, found) <= (1e-2 if half_precision else 1e-3)
    assert same_argmax(expected, found) >= 0.99


@pytest.mark.parametrize("first", [0, 32])
@pytest.mark.parametrize("ffn", ["exact", "dense"])
@pytest.mark.parametrize("name", EXPERTS)
def test_more_neurons_of_some_experts(
    device: str,
    half_precision: bool,
    model_file: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    ffn: str,
    first: int,
) -> None:
    """The device finds out itself which experts of each token it has more of. With as many tokens as it takes at once
    without this driver's fault (see above).
    """
    planned, longer = choose.place, Longer(64, (0, 2, 3, 5))
    there: dict[str, Any] = {"resident_from": 0, "head": True, "hot": ((first,),) * 3, "longer": (longer,) * 3}
    path = model_file(name, "f32")
    expected = logits(path, 8, device="none", ffn=ffn)
    monkeypatch.setattr(choose, "place", lambda *a: replace(planned(*a), **there))
    found = logits(path, 8, device=device, ffn=ffn)
    assert relative(expected, found) <= (1e-2 if half_precision else 1e-5)
    assert same_argmax(expected, found) == 1


@pytest.mark.parametrize("ffn", ["exact", "dense"])
@pytest.mark.parametrize(("state", "computed"), [(128, True), (24, False)])
def test_mamba_blocks(device: str, half_precision: bool, tmp_path: Path, ffn: str, state: int, computed: bool) -> None:
    """What the backend computes is on the device; another size stays on the CPU, which one line says."""
    s, path = mamba.structure("M-M*-M", groups=3, state=state), tmp_path / "m.gguf"
    mamba.write(path, s, mamba.weights(s))
    ids = random_ids(100, mamba.VOCAB)
    with runtime.load(path, ffn=ffn, kv_type="f32", device="none") as model:
        expected = model.logits(ids)
    with runtime.load(path, ffn=ffn, kv_type="f32", device=device, hot=32) as model:
        assert list(model._engine.map.mambas(1)) == ([0, 2, 5] if computed else [])
        assert model._engine.arrangement
        note = f"device {device} cannot compute 3 Mamba blocks: they stay on the CPU"
        assert model._engine.arrangement.note == ("" if computed else note)
        found = model.logits(ids[:60]), model.logits(ids), model.logits(ids[:60])  # further, and again
    for logits_there, n in zip(found, (60, 100, 60), strict=True):
        assert relative(expected[:n], logits_there) <= (1e-2 if half_precision else 1e-3)
        assert same_argmax(expected[:n], logits_there) >= 0.99


def test_drafts_with_mamba_blocks(device: str, half_precision: bool, tmp_path: Path) -> None:
    """What is rejected leaves the states on the device."""
    s, path = mamba.structure("M-M*-M", groups=3), tmp_path / "m.gguf"
    mamba.write(path, s, mamba.weights(s))
    ids = random_ids(60, mamba.VOCAB)
    with runtime.load(path, ffn="exact", kv_type="f32", device="none") as model:
        expected = model.logits(ids)
    with runtime.load(path, ffn="exact", kv_type="f32", device=device, hot=32, lookup=True) as model:
        engine = model._engine
        engine.compute(Batch.of(ids[:20], 0))
        engine.compute(Batch.of(ids[20:36], 20))
        engine.cells.trim(0, 25)
        assert engine.cells.length(0) == 25
        found = engine.compute(Batch.of(ids[25:], 25, 0, range(35)))
    assert relative(expected[25:], found) <= (1e-2 if half_precision else 1e-3)


@pytest.mark.parametrize("split", ["half", "all"])
@pytest.mark.parametrize("type_name", ["q8_0", "q4_0"])
def test_quantised_models_are_no_further_from_the_unquantised_one_than_dense(
    device: str, model_file: Callable[[str, str], Path], cpu_only: Callable[..., Logits], type_name: str, split: str
) -> None:
    reference, path = cpu_only("bundled", "f32", "dense"), model_file("bundled", type_name)
    found = logits(path, device=device, ffn="exact", hot=hot(path, split))
    assert kl(reference, found) <= 1.2 * kl(reference, cpu_only("bundled", type_name, "dense"))


def test_the_same_tokens_are_generated(
    device: str, half_precision: bool, model_file: Callable[[str, str], Path]
) -> None:
    """64 greedy tokens after a prompt; where the device rounds to F16, the first 16 of them."""

    def greedy(**options: Any) -> list[int]:
        with runtime.load(model_file("bundled", "f32"), kv_type="f32", ffn="exact", **options) as model:
            generation = model.generate(random_ids(20, 4000), 64, runtime.Sampling(temperature=0.0))
            list(generation)
            return list(generation.token_ids)

    n = 16 if half_precision else 64
    assert greedy(device=device, hot=512)[:n] == greedy(device="none")[:n]


def test_predictors_are_scored_there(device: str, fitted_gguf: Path) -> None:
    def choices(**options: Any) -> tuple[Logits, list[float]]:
        with runtime.load(fitted_gguf, ffn="predicted", kv_type="f32", **options) as model:
            return model.logits(random_ids(40, 4000)), model.gate_shares()

    alone, shares = choices(device="none")
    found, shares_there = choices(device=device, hot=0)
    assert min(shares) < 0.9
    assert np.allclose(shares, shares_there, atol=5e-3)
    assert relative(alone, found) <= 2e-2


@pytest.mark.parametrize("gib", [0, 0.3, 0.31, 1, 100])
def test_budgets_are_kept(device: str, fitted_gguf: Path, gib: float) -> None:
    with runtime.load(fitted_gguf, device=device, vram_budget=gib, n_ctx=256, n_batch=64) as model:
        list(model.generate(random_ids(100, 4000), max_tokens=3))
        assert model.arrangement
        assert not model.arrangement.used or sum(model.device_bytes()) + model.arrangement.scratch <= gib * 2**30
        assert not (gib == 0 and model.arrangement.used)


def test_the_device_computes_while_the_cpu_does(
    device: str, model_file: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Each hot half is queued before the cold half begins, and is seen to end after it."""
    with runtime.load(
        model_file("bundled", "f32"), device=device, hot=512, ffn="exact", trace=tmp_path / "t.json"
    ) as model:
        model.logits([5])
    spans = {e["name"]: e for e in json.loads((tmp_path / "t.json").read_text())["traceEvents"] if e["ph"] == "X"}
    for i in range(6):
        hot_half, cold_half = spans[f"hot {i}"], spans[f"cold {i}"]
        assert hot_half["ts"] <= cold_half["ts"]
        assert hot_half["ts"] + hot_half["dur"] >= cold_half["ts"] + cold_half["dur"]
