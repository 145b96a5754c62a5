"""Blocks, and pieces of their neurons, on any side: the same logits as on the CPU alone. Devices are further CPU backends."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, random_ids, relative

from runtime.compute.batch import Batch
from runtime.compute.trace import Trace
from runtime.engine import Engine
from runtime.hybrid.bandwidth import cpu
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.planner import Placement
from runtime.hybrid.tensor_map import BlockSides, Piece, TensorMap, cpu_alone
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.model_file.writer import NewTensor, write_gguf
from runtime.options import RunOptions

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
Sides = tuple[BlockSides, ...]
N_DEVICES = 2
PROMPT = 12


def cut(*lengths: tuple[int, int]) -> tuple[Piece, ...]:
    """Pieces from (side, number of neurons)."""
    ends = np.cumsum([0, *(n for _, n in lengths)]).tolist()
    return tuple(Piece(side, first, first + n) for (side, n), first in zip(lengths, ends, strict=False))


# Of the bundled model, which has six blocks of 1,024 neurons; 0 is the CPU. No planner makes these.
BY_HAND: dict[str, tuple[Sides, int]] = {
    "whole blocks here and there": (
        tuple(BlockSides(side, cut((side, 1024))) for side in (2, 0, 1, 2, 0, 1)), 0,
    ),
    "pieces everywhere": (
        (
            BlockSides(2, cut((0, 96), (1, 224), (2, 704))),
            BlockSides(0, cut((1, 256), (0, 256), (2, 256), (0, 256))),
            BlockSides(1, cut((0, 32), (2, 960), (0, 32))),
            BlockSides(1, cut((2, 1024))),
            BlockSides(0, cut((1, 512), (2, 512))),
            BlockSides(2, cut((2, 32), (2, 992))),
        ),
        1,
    ),
    "attention on devices, neurons on the CPU": (
        tuple(BlockSides(1 + i % 2, cut((0, 512), (0, 512))) for i in range(6)), 2,
    ),
    "attention on the CPU, neurons on devices": (
        tuple(BlockSides(0, cut((1 + i % 2, 1024))) for i in range(6)), 2,
    ),
    "the CPU's own in pieces": (tuple(BlockSides(0, cut((0, 160), (0, 864))) for _ in range(6)), 1),
    "the head alone": (tuple(BlockSides(0, cut((0, 1024))) for _ in range(6)), 1),
}  # fmt: skip


def drawn(s: Structure, seed: int, step: int = 1) -> tuple[Sides, int]:
    """Homes, cuts (multiples of `step`) and the head's side, drawn by lot."""
    rng = np.random.default_rng(seed)

    def block(n_ff: int) -> BlockSides:
        cuts = np.unique(rng.integers(1, max(2, n_ff // step), rng.integers(0, 4))) * step
        ends = [0, *(c for c in cuts.tolist() if c < n_ff), n_ff]
        pieces = [(int(rng.integers(0, N_DEVICES + 1)), b - a) for a, b in itertools.pairwise(ends)]
        return BlockSides(int(rng.integers(0, N_DEVICES + 1)), cut(*pieces) if n_ff else ())

    sizes = [b.ffn.n_ff if b.ffn else 0 for b in s.blocks]
    return tuple(block(n_ff) for n_ff in sizes), int(rng.integers(0, N_DEVICES + 1))


def engine(path: Path, sides: tuple[Sides, int] | None, trace: Trace | None = None, **options: Any) -> Engine:
    file = GgufFile(path)
    settled = RunOptions(**{"kv_type": "f32", "threads": 2, "n_ctx": 128} | options).for_file(file)
    arrangement = None
    if sides:
        blocks, head = sides
        tensor_map = TensorMap(file.structure, blocks, head, settled.ffn == "predicted")
        planned = Placement(0, True, (), (), (), (), {})
        arrangement = Arrangement((cpu(),) * N_DEVICES, (1 << 30,) * N_DEVICES, planned, tensor_map)
    return Engine(file, settled, arrangement, trace)


def logits(path: Path, ids: list[int], sides: tuple[Sides, int] | None = None, **options: Any) -> Logits:
    """Of a prompt's tokens, of the last one of another prompt, and of tokens that follow it one by one."""
    made = engine(path, sides, **options)
    try:
        found = [made.compute(Batch.of(ids, outputs=range(len(ids))))]
        made.cells.clear()
        found.append(made.compute(Batch.of(ids[:PROMPT])))
        found += [made.compute(Batch.of([ids[i]], i)) for i in range(PROMPT, len(ids))]
        return np.concatenate(found)
    finally:
        made.close()


@pytest.mark.parametrize(("type_name", "ffn", "tolerance"), [("f32", "exact", 1e-4), ("f32", "dense", 1e-4), ("f16", "exact", 2e-3)])  # fmt: skip
@pytest.mark.parametrize("name", BY_HAND)
def test_any_side_computes_the_same(
    converted: Converted, name: str, type_name: str, ffn: str, tolerance: float
) -> None:
    path, ids = converted("bundled", type_name), random_ids(20, 4000)
    assert relative(logits(path, ids, ffn=ffn), logits(path, ids, BY_HAND[name], ffn=ffn)) <= tolerance


FAMILIES = ("llama-gqa", "llama-biases", "opt-pre-norm", "opt-post-norm", "falcon-7b", "bitnet", "minicpm", "nemotron")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_any_side_computes_any_family(converted: Converted, family: str, seed: int) -> None:
    path, ids = converted(family), random_ids(20, 250)
    with GgufFile(path) as file:
        sides = drawn(file.structure, seed)
    for ffn in ("exact", "dense"):
        assert relative(logits(path, ids, ffn=ffn), logits(path, ids, sides, ffn=ffn)) <= 1e-4


@pytest.mark.parametrize("name", BY_HAND)
def test_predictors_that_name_every_neuron_change_nothing(fitted_gguf: Path, name: str) -> None:
    ids = random_ids(20, 4000)
    found = logits(fitted_gguf, ids, BY_HAND[name], ffn="predicted", predictor_bias=1e30)
    assert relative(logits(fitted_gguf, ids, ffn="exact"), found) <= 2e-3


def test_scores_of_every_piece_choose_the_same_neurons(fitted_gguf: Path) -> None:
    """Devices compute the scores of two pieces of each block; the CPU chooses among their neurons."""
    batch = Batch.of(ids := random_ids(40, 4000), outputs=range(len(ids)))
    found = []
    for sides in (None, BY_HAND["attention on devices, neurons on the CPU"]):
        made = engine(fitted_gguf, sides, ffn="predicted")
        found.append((made.compute(batch), made.counters.gate_shares()))
        made.close()
    (alone, shares), (elsewhere, shares_elsewhere) = found
    assert any(share < 0.9 for share in shares)
    assert np.allclose(shares, shares_elsewhere, atol=2e-3)
    assert relative(alone, elsewhere) <= 1e-2


# --- blocks of unequal kinds and sizes --------------------------------------------------------------------------------

MIXED = Structure(
    source_architecture="test", vocab_size=64, context_length=64, embedding_length=32, block_count=5,
    feed_forward_length=(64, 0, 96, 64, 64), head_count=(4, 4, 0, 2, 4), head_count_kv=(2, 4, 0, 1, 4), head_length=8,
    norm="rms", norm_epsilon=2.0**-17, position="rope_neox", ffn_gate="gated", ffn_activation="relu",
    rope_dimension_count=(8, 0, 0, 4, 8), sliding_window=8, sliding_window_pattern=(False, True, False, True, False),
)  # fmt: skip


@pytest.fixture(scope="module", params=["pre", "post"])
def mixed_gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks without attention or without an FFN, of two sizes, one without rotation, two with a window."""
    path, rng = tmp_path_factory.mktemp("mixed") / "m.gguf", np.random.default_rng(5)
    s = replace(MIXED, norm_placement=request.param)
    shapes, made = required_tensors(s), {}
    for name, ne in shapes.items():
        values = rng.standard_normal(ne[::-1], np.float32) / math.sqrt(ne[0])
        made[name] = 1 + values / 8 if "norm" in name else values
    for name in shapes:
        if name.endswith("ffn_down_t.weight"):
            made[name] = np.ascontiguousarray(made[name.replace("down_t", "down")].T)
    tensors = [
        NewTensor(name, ne, 0, made[name].nbytes, (made[name].astype(np.float32),)) for name, ne in shapes.items()
    ]
    write_gguf(path, s.to_metadata(), tensors)
    return path


@pytest.mark.parametrize("seed", range(12))
def test_any_side_computes_blocks_that_differ(mixed_gguf: Path, seed: int) -> None:
    ids = random_ids(30, 60)
    with GgufFile(mixed_gguf) as file:
        sides = drawn(file.structure, seed)
    options: dict[str, Any] = {"n_ctx": 64}
    for ffn in ("exact", "dense"):
        alone = logits(mixed_gguf, ids, ffn=ffn, **options)
        assert relative(alone, logits(mixed_gguf, ids, sides, ffn=ffn, **options)) <= 1e-5


# --- what is refused, and what a trace shows --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces", [cut((0, 1000)), cut((0, 512), (1, 0), (2, 512)), (Piece(0, 0, 512), Piece(1, 500, 1024))]
)
def test_pieces_that_do_not_hold_each_neuron_once(converted: Converted, pieces: tuple[Piece, ...]) -> None:
    with GgufFile(converted("bundled")) as file:
        s = file.structure
    blocks = cpu_alone(s, False).blocks
    with pytest.raises(ValueError, match="block 3: "):
        TensorMap(s, (*blocks[:3], BlockSides(1, pieces), *blocks[4:]), 0, False)


def spans(path: Path) -> list[tuple[str, str, int]]:
    """Track, name and step, in the order of their beginnings."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    timed = sorted((e for e in events if e["ph"] == "X"), key=lambda e: float(e["ts"]))
    return [(tracks[e["tid"]], e["name"], e["args"]["step"]) for e in timed]


def test_a_trace_of_the_cpu_alone(converted: Converted, tmp_path: Path) -> None:
    made = engine(converted("bundled"), None, Trace(tmp_path / "t.json"))
    for i in range(3):
        made.compute(Batch.of([5 + i], i))
    made.close()
    assert spans(tmp_path / "t.json") == [("CPU", "model", step) for step in range(3)]


def test_a_trace_names_what_each_side_computes(converted: Converted, tmp_path: Path) -> None:
    sides = (
        BlockSides(0, cut((0, 1024))),
        BlockSides(1, cut((1, 1024))),
        BlockSides(1, cut((1, 256), (2, 256), (0, 512))),
        BlockSides(2, cut((2, 1024))),
        BlockSides(2, cut((2, 1024))),
        BlockSides(0, cut((0, 1024))),
    )
    made = engine(converted("bundled"), (sides, 0), Trace(tmp_path / "t.json"))
    made.compute(Batch.of([5]))
    made.close()
    found = spans(tmp_path / "t.json")
    assert {step for _, _, step in found} == {0}
    by_track = {track: [name for t, name, _ in found if t == track] for track, _, _ in found}
    assert by_track == {
        "CPU": ["front", "cold 2", "head"],
        "device CPU": ["blocks 1-2", "hot 2", "sum"],
        "device CPU 1": ["hot 2", "blocks 3-4"],
    }
