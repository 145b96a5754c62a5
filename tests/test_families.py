"""Every family's checkpoints against their reference, in every way of running them. A family adds rows to tests/families.py, a way to MODES."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import CASES, GQA, Case, drelu
from oracle import Logits, max_difference, random_ids, same_argmax
from splits import hot

import runtime
from convert import archs, convert, job
from convert.arch import families
from predictors.calibrate import calibrate
from predictors.fit import BlockFit, ModelFit, of_blocks
from predictors.matrices import Tensor
from runtime.bindings.ffn_shape import FfnShape
from runtime.block_runner import BlockRunner
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import GgufFile

pytestmark = pytest.mark.numeric

N = 256
RANK = 32
MODES: dict[str, dict[str, Any]] = {  # options of runtime.load; split: see tests/splits.py
    "dense": {"ffn": "dense"},
    "exact": {"ffn": "exact"},
    "predicted": {"ffn": "predicted", "predictor_bias": 1e30},  # the predictor is asked, and chooses all; with inf it is not
    "half of the neurons on a device": {"ffn": "exact", "device": "CPU", "split": "half"},
    "all neurons on a device": {"ffn": "exact", "device": "CPU", "split": "all"},
    "a block of neurons on a device, predicted": {
        "ffn": "predicted", "predictor_bias": 1e30, "device": "CPU", "split": "one block",
    },
}  # fmt: skip


def made_up_fit(path: Path, **_options: Any) -> ModelFit:
    """Neurons in a random order, and a random predictor for every block: instead of what calibration would find."""
    with GgufFile(path) as file:
        s = file.structure
    rng = np.random.default_rng(0)

    def block(ffn: FfnShape) -> BlockFit:
        stems, ff = names.stems(ffn), ffn.expert_length
        each = (ffn.experts.count,) if ffn.experts else ()
        index = np.stack([rng.permutation(ff).astype(np.int32) for _ in range(ffn.n_ff // ff)])
        freq = -np.sort(-rng.random(index.shape, np.float32))
        shapes = {
            "predictor_in.weight": (ffn.n_embd, RANK),
            f"{stems.predictor_out}.weight": (RANK, ff, *each),
            f"{stems.predictor_out}.bias": (ff, *each),
        }
        tensors = [Tensor(name, "f32", shape, random_bytes(rng, shape)) for name, shape in shapes.items()]
        tensors += [
            Tensor(stems.index, "i32", (ff, *each), index.reshape(-1).view(np.uint8)),
            Tensor(stems.freq, "f32", (ff, *each), freq.reshape(-1).view(np.uint8)),
        ]
        if ffn.experts:
            tensors.append(Tensor(names.EXPERT_FREQ, "f32", each, np.full(each, 0.5, np.float32).view(np.uint8)))
        order = (index + ff * np.arange(len(index), dtype=np.int32)[:, None]).reshape(-1)
        return BlockFit(order, freq.reshape(-1), RANK, "f32", 1.0, tuple(tensors), None)  # type: ignore[arg-type]

    return ModelFit("lowrank", "hot", of_blocks(s, map(block, s.ffns.values())), {})


def random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape[::-1], np.float32).reshape(-1).view(np.uint8)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, list[int], Logits]]:
    """A row of the table: checkpoint, converted file, ids, and the reference's logits for them."""
    folder = tmp_path_factory.mktemp("families")
    done: dict[str, tuple[Path, Path, list[int], Logits]] = {}

    def get(name: str) -> tuple[Path, Path, list[int], Logits]:
        if name not in done:
            checkpoint, out, ids = folder / name, folder / f"{name}.gguf", random_ids(N, 4000)
            CASES[name].make(checkpoint)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "fit_model", made_up_fit)
                convert(checkpoint, out, type="f32", ffn_type=CASES[name].ffn_type)
            done[name] = checkpoint, out, ids, CASES[name].logits(checkpoint, ids)
        return done[name]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(case: Any, name: str, mode: str) -> None:
    _, path, ids, expected = case(name)
    options = {"device": "none"} | MODES[mode]
    if "split" in options:
        options["hot"] = hot(path, options.pop("split"))
    with runtime.load(path, kv_type="f32", threads=2, **options) as model:
        found = model.logits(ids)
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


@pytest.mark.parametrize("family", families())
def test_every_family_has_two_rows_or_more(family: str) -> None:
    rows = [case for case in CASES.values() if case.family == family]
    assert len(rows) >= 2
    assert {case.tied for case in rows} == {True, False}


@pytest.mark.parametrize("name", ["bitnet", "minicpm", "llama-drelu"])
def test_energies_are_those_of_what_neurons_add_to_the_stream(case: Any, name: str) -> None:
    """Calibration weighs a neuron by what reaches the residual stream, norms and scales on the way included."""
    _, path, ids, _ = case(name)
    with GgufFile(path) as file, BlockRunner(file, 2, 32) as runner:
        s = file.structure
        hidden = runner.embed(np.int32(ids[:32]))
        added = runner.block(0, hidden)
        layer = next(iter(calibrate(runner, np.int32([ids[:32]]), (slice(0, 1), slice(0, 1), slice(0, 1)))))
        energy = layer.responses(layer.fit, 0, s.feed_forward_length).energy
        x, (gate, up, down) = (
            added.ffn_input.astype(np.float64),
            (
                runner.rows(f"blk.0.{part}.weight", 0, s.feed_forward_length).astype(np.float64)
                for part in ("ffn_gate", "ffn_up", "ffn_down_t")
            ),
        )
    gates, ups = x @ gate.T, x @ up.T
    h = {"relu2": np.maximum(gates, 0) ** 2, "drelu": np.maximum(gates, 0)}.get(
        s.ffn_activation, gates * (gates > 0.03)
    )
    h *= np.maximum(ups, 0) if s.ffn_activation == "drelu" else ups
    h *= s.residual_scale
    if s.ffn_sub_norm:
        h /= np.sqrt((h**2).mean(1, keepdims=True) + s.norm_epsilon)
    np.testing.assert_allclose(added.residual + h @ down, added.output, atol=1e-3)
    expected = h**2 * (down**2).sum(1) / (added.output.astype(np.float64) ** 2).sum(1)[:, None]
    np.testing.assert_allclose(energy, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "parallel"), [("falcon-40b", True), ("falcon-7b", True), ("falcon-sequential", False)]
)
def test_the_stream_before_a_parallel_ffns_norm_is_the_blocks_input(case: Any, name: str, parallel: bool) -> None:
    """A predictor that taps the stream sees it, not the sum with attention's result."""
    _, path, ids, _ = case(name)
    with GgufFile(path) as file, BlockRunner(file, 2, 32) as runner:
        hidden = runner.embed(np.int32(ids[:32]))
        assert np.array_equal(runner.block(0, hidden).residual, hidden) == parallel


IMAGINARY = """
from convert import naming
from convert.arch import Arch, Field
from convert.rope import Rope

ARCH = Arch(
    family="imaginary",
    architectures=("ImaginaryForCausalLM",),
    activation=Field("act"),
    activations={"relu": "drelu"},
    keys={
        **naming.SIZES, **Rope().keys(), "tied_output": True, "norm": "rms", "norm_epsilon": Field("epsilon"), "ffn_gate": "gated",
    },
    renamed={"width": "hidden_size"},
    tensors={
        **naming.ends(), **naming.block_norms(), **naming.attention(False, False), **naming.gated_ffn(False),
    },
    base_prefix="model.",
)
"""


def test_a_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere on the path of `convert.archs`: nothing else has to know of it."""
    (tmp_path / "archs").mkdir()
    (tmp_path / "archs" / "imaginary.py").write_text(IMAGINARY)
    monkeypatch.setattr(archs, "__path__", [*archs.__path__, str(tmp_path / "archs")])
    written = {"architectures": ["ImaginaryForCausalLM"], "act": "relu", "width": 96, "epsilon": 1e-5}
    absent = {"hidden_act": None, "hidden_size": None, "rms_norm_eps": None}
    case = Case(
        "imaginary", "Llama", {**GQA, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}, written | absent, drelu
    )
    case.make(tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "x.gguf", type="f32", calibration="none")
    ids = random_ids(N, 4000)
    with runtime.load(tmp_path / "x.gguf", kv_type="f32") as model:
        assert max_difference(case.logits(tmp_path / "checkpoint", ids), model.logits(ids)) <= 2e-3


def test_the_runtime_names_no_family() -> None:
    """But for Llama where it is part of a library's name, or of a tokenizer's."""
    names = {*families(), *(name for arch in families().values() for name in arch.architectures)} - {"llama"}
    pattern = re.compile(rf"(?<![a-z])({'|'.join(names)})(?![a-z])|llama(for|_arch| 2| 3)", re.IGNORECASE)
    for path in sorted((Path(__file__).parent.parent / "runtime").rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".txt"):
            found = [line for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
            assert not found, path
