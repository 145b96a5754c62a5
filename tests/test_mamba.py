"""Mamba-2 blocks: logits against a reference in float64 and llama.cpp's own graph, in whatever pieces and company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mamba
import numpy as np
import pytest
from oracle import llama_logits, max_difference, random_ids, same_argmax
from test_sequences import whole

import runtime
from runtime.analysis.contents import contents_of
from runtime.bindings import ggml
from runtime.block_runner import BlockRunner
from runtime.commands.conversation import Conversation
from runtime.compute.batch import Batch
from runtime.engine import Engine
from runtime.errors import UserError
from runtime.hybrid import choose
from runtime.hybrid.costs import model_costs
from runtime.hybrid.planner import BlockCosts, Device, Machine, evaluate, place
from runtime.model import open_model
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions
from runtime.sequence import CachedSequence
from runtime.text.sampling import Sampling

pytestmark = pytest.mark.numeric

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
PATTERN = "M-M*-M"
IDS = random_ids(70, mamba.VOCAB)
SHAPES = {
    "three groups": mamba.structure(PATTERN, groups=3),
    "one group": mamba.structure("M*-M", groups=1, heads=2, length=64),
    "attention first": mamba.structure("*-MM", groups=2, heads=4, length=64),
    "FFN first": mamba.structure("-M*", groups=2, heads=4),
    "any sizes": mamba.structure("M-*", groups=3, heads=3, length=5, state=24),
}


@contextmanager
def engine_of(path: Path, **options: Any) -> Iterator[Engine]:
    given = {"kv_type": "f32", "device": "none", "threads": 2, "n_ctx": 512} | options
    with open_model(path, RunOptions(**given)) as model:
        yield model._engine


@pytest.fixture
def path(make_once: MakeOnce) -> Path:
    s = SHAPES["three groups"]
    return make_once("mamba.gguf", lambda path: mamba.write(path, s, mamba.weights(s)))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_references(name: str, tmp_path: Path) -> None:
    s = SHAPES[name]
    weights = mamba.weights(s)
    expected = mamba.logits(s, weights, IDS)
    mamba.write(tmp_path / "m.gguf", s, weights)
    for ffn in ("dense", "exact"):
        with runtime.load(tmp_path / "m.gguf", ffn=ffn, kv_type="f32", threads=2, device="none") as model:
            found = model.logits(IDS)
        assert max_difference(expected, found) <= 2e-3
        assert same_argmax(expected, found) >= 0.995


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "any sizes"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    s = SHAPES[name]
    weights = mamba.weights(s)
    mamba.write(tmp_path / "m.gguf", s, weights)
    mamba.write_stock(tmp_path / "stock.gguf", s, weights)
    expected = llama_logits(tmp_path / "stock.gguf", IDS)
    with runtime.load(tmp_path / "m.gguf", ffn="exact", kv_type="f32", threads=2, device="none") as model:
        found = model.logits(IDS)
    assert max_difference(expected, found) <= 2e-3
    assert same_argmax(expected, found) >= 0.995


@pytest.mark.parametrize("mistake", mamba.MISTAKES)
def test_a_mistake_would_be_found(mistake: str, path: Path) -> None:
    s = SHAPES["three groups"]
    wrong = mamba.logits(s, mamba.weights(s), IDS, mistake)
    with runtime.load(path, ffn="exact", kv_type="f32", threads=2, device="none") as model:
        assert max_difference(wrong, model.logits(IDS)) > 0.1


@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_pieces_of_a_prompt_are_the_tokens_one_by_one(ffn: str, path: Path) -> None:
    with engine_of(path, ffn=ffn) as engine:
        single = np.concatenate([engine.compute(whole([token], at, 1)) for at, token in enumerate(IDS)])
        at = 0
        for n in (1, 2, 3, 17, 40, 7):
            found = engine.compute(whole(IDS[at : at + n], at, 2))
            assert max_difference(single[at : at + n], found) <= 1e-4
            at += n
        assert at == len(IDS)


def test_eight_sequences_at_once_are_each_as_alone(path: Path) -> None:
    texts = [random_ids(20 + k, mamba.VOCAB, seed=k) for k in range(8)]
    with engine_of(path, ffn="exact", sequences=8) as engine:
        alone = []
        for ids in texts:
            engine.cells.clear()
            first = engine.compute(whole(ids[:7]))
            alone.append(np.concatenate([first, *(engine.compute(whole([i], 7 + k)) for k, i in enumerate(ids[7:]))]))
        engine.cells.clear()
        # Prompts of two lengths, then a token of each, of those that are not at their end.
        engine.compute(Batch.together([whole(ids[: 7 - k // 4], 0, 2 * k) for k, ids in enumerate(texts)]))
        at = [7 - k // 4 for k in range(8)]
        while running := [k for k in range(8) if at[k] < len(texts[k])]:
            together = Batch.together([whole(texts[k][at[k] : at[k] + 1], at[k], 2 * k) for k in running])
            for k, found in zip(running, engine.compute(together), strict=True):
                assert max_difference(alone[k][at[k]], found) <= 1e-4
                at[k] += 1


def test_tokens_of_a_sequence_stand_together(path: Path) -> None:
    with engine_of(path) as engine:
        batch = Batch.together([whole([5], 0, 0), whole([6], 0, 1), whole([7], 1, 0)])
        with pytest.raises(ValueError, match="one behind the other"):
            engine.compute(batch)
        assert engine.cells.lengths[:2] == [0, 0]


def test_a_copied_sequence_goes_on_as_its_source(path: Path) -> None:
    with engine_of(path) as engine:
        engine.compute(whole(IDS[:30], 0, 1))
        engine.cells.copy(1, 2)
        found = [engine.compute(whole(IDS[30:40], 30, number)) for number in (1, 2)]
        assert max_difference(*found) == 0
        with pytest.raises(ValueError, match="expected a length that it can be taken back to"):
            engine.cells.copy(1, 0, 20)


def test_a_sequence_goes_back_to_where_it_was_saved_or_to_its_beginning(path: Path) -> None:
    with engine_of(path) as engine:
        engine.compute(whole(IDS[:20]))
        engine.cells.save(0)
        first = engine.compute(whole(IDS[20:40], 20))
        engine.cells.trim(0, 30)
        assert engine.cells.length(0) == 20
        assert max_difference(first, engine.compute(whole(IDS[20:40], 20))) == 0
        engine.cells.copy(0, 1, 20)
        assert max_difference(first, engine.compute(whole(IDS[20:40], 20, 1))) == 0
        engine.cells.trim(0, 10)
        assert engine.cells.length(0) == 0
        again = np.concatenate([engine.compute(whole(IDS[:20])), engine.compute(whole(IDS[20:40], 20))])
        assert max_difference(first, again[20:]) == 0


def test_a_text_that_is_asked_again_or_changed_is_computed_right(path: Path) -> None:
    with engine_of(path, ffn="exact") as engine:
        sequence, fresh = CachedSequence(engine), CachedSequence(engine, 1)

        def of(ids: list[int]) -> None:
            fresh.clear()
            assert max_difference(fresh.logits(ids), sequence.logits(ids)) <= 1e-4

        of(IDS[:30])
        for n in range(31, 36):  # a reply
            of(IDS[:n])
        assert sequence.reusable(IDS[:36]) == 35
        assert sequence.reusable(IDS[:30]) == 29  # /retry: where its prompt ended
        of(IDS[:30])
        of([*IDS[:32], *IDS[40:50]])  # an edit behind the end of the prompt
        of([*IDS[:10], *IDS[40:50]])  # and before
        assert sequence.logits(IDS[:50], last=9).shape == (9, mamba.VOCAB)


def test_a_saved_conversation_goes_on_with_the_same_logits(path: Path, tmp_path: Path) -> None:
    """Its file has texts; another process computes the states again."""
    talk = Conversation(None)
    talk.add("user", "abc def")
    with runtime.load(path, ffn="exact", device="none", kv_type="f32") as model:
        for _ in range(2):
            with model.generate(talk.prompt(), 20, Sampling(temperature=0), cache_prompt=True) as reply:
                talk.add("assistant", "".join(reply))
            talk.add("user", "gh")
        talk.save(tmp_path / "talk.json")
        ids = model.tokenize(talk.prompt())
        wanted = model._sequence.logits(ids)
    again = Conversation(None)
    again.load(tmp_path / "talk.json")
    with runtime.load(path, ffn="exact", device="none", kv_type="f32") as model:
        assert model.tokenize(again.prompt()) == ids
        for _ in range(2):  # and for another reply to the same text
            assert max_difference(wanted, model._sequence.logits(ids)) <= 1e-4


def test_after_an_error_the_text_is_computed_again(path: Path) -> None:
    with engine_of(path, ffn="exact", n_ctx=40, n_batch=16) as engine:
        sequence = CachedSequence(engine)
        expected = sequence.logits(IDS[:30])
        with pytest.raises(UserError, match="expected at most"):
            sequence.logits(IDS)
        assert max_difference(expected, sequence.logits(IDS[:30])) <= 1e-4


@pytest.mark.parametrize("ffn", ["dense", "exact"])
def test_blocks_at_home_on_a_device_compute_the_same(ffn: str, path: Path) -> None:
    with engine_of(path, ffn=ffn, device="CPU", hot=32) as engine:
        assert list(engine.map.mambas(1)) == [0, 2, 5]
        assert engine.device_bytes()[0] > 3 * engine.kv_bytes(0) / 2  # states of three sequences lie there
        sequence, fresh = CachedSequence(engine), CachedSequence(engine, 1)
        expected = mamba.logits(SHAPES["three groups"], mamba.weights(SHAPES["three groups"]), IDS)
        for n in (40, 41, 42, 40, 60):
            assert max_difference(expected[n - 1], sequence.logits(IDS[:n])) <= 2e-3
        assert max_difference(expected[59], fresh.logits(IDS[:60])) <= 2e-3


def test_what_a_device_cannot_compute_stays_on_the_cpu(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(path, ffn="exact") as engine:
        expected = engine.compute(whole(IDS))
    with GgufFile(path) as file:
        options = RunOptions(ffn="exact", kv_type="f32", device="CPU", hot=32, threads=2).for_file(file)
        able = choose.arrange(file, options)
        assert able
        blocks, _ = model_costs(file, choose.machine_options(able.devices, able.budgets, options))
    supports = ggml.ggml_backend_dev_supports_op  # its first call was before: that binds the name anew

    def no_scan(device: ggml.DeviceP, op: ggml.ConstTensorP) -> bool:
        return ggml.ggml_op_name(ggml.TensorP(op.value).struct.op) != b"SSM_SCAN" and bool(supports(device, op))

    with GgufFile(path) as file, monkeypatch.context() as patched:
        patched.setattr("runtime.hybrid.mamba_support.ggml.ggml_backend_dev_supports_op", no_scan)
        arrangement = choose.arrange(file, options)
    assert arrangement
    left = sum(blocks[i].stored for i in SHAPES["three groups"].mambas)
    assert able.placement.bytes[0] - arrangement.placement.bytes[0] == left > 0
    assert arrangement.note == "device CPU cannot compute 3 Mamba blocks: they stay on the CPU"
    assert arrangement.tensor_map.mambas(1) == {}
    assert [i for i, b in enumerate(arrangement.tensor_map.blocks) if b.home == 1] == [1, 3, 4]
    # The planner knows: nothing of them is on the device, and they take longer there than if they were.
    mambas = SHAPES["three groups"].mambas.values()
    states = sum(m.held_bytes(options.kept_states, 0) for m in mambas)
    assert able.placement.bytes[0] - arrangement.placement.bytes[0] > states
    assert arrangement.placement.block_seconds[0] > able.placement.block_seconds[0]
    with Engine(GgufFile(path), options, arrangement) as divided:
        assert max_difference(expected, divided.compute(whole(IDS))) <= 2e-3


def test_the_planner_knows_what_a_device_leaves_to_the_cpu() -> None:
    """Blocks by turns, 100 bytes each; with room for three blocks and the head, all that a device can compute is there.

    A device of ten times the CPU's speed; a crossing takes as long as the CPU needs for 20 bytes.
    """
    one = BlockCosts(stored=100, read=100, predictor=0, neurons=0, cuts=(0,), hot=(0,), cold=(0.0,))
    machine = Machine((Device(350, 10.0),), 1.0, 20.0)
    refused = [choose.left_to_cpu(one, machine) if i % 2 else one for i in range(6)]
    known, unknown = place(refused, 50, machine), place([one] * 6, 50, machine)
    assert (known.resident_from, known.bytes) == (0, (350,))
    assert known.seconds == pytest.approx(3 * 10 + 3 * (100 + 20) + 5 + 20)
    assert (unknown.resident_from, unknown.bytes) == (3, (350,))
    alone = evaluate(refused, 50, machine, 6, False, [(0,)] * 6)
    assert alone.seconds == pytest.approx(650)


def test_calibration_sees_each_text_from_its_beginning(path: Path) -> None:
    s = SHAPES["three groups"]
    weights = mamba.weights(s)
    texts = [random_ids(40, mamba.VOCAB, seed=seed) for seed in (1, 2)]
    with BlockRunner(GgufFile(path), 2, 64) as runner:
        hidden = [runner.embed(np.array(ids, np.int32)) for ids in texts]
        for i in range(s.block_count):
            hidden = [runner.output(i, x) for x in hidden]
    for ids, x in zip(texts, hidden, strict=True):
        found = mamba.head(x.astype(np.float64), weights)
        assert max_difference(mamba.logits(s, weights, ids), found) <= 1e-3


def test_inspect_knows_the_tensors_of_mamba(path: Path) -> None:
    with GgufFile(path) as file:
        groups = {group.kind: group.tensors for group in contents_of(file).groups}
    assert groups["mamba"] == 3 * 7  # with a norm each, which is among the norms
    assert "other" not in groups


def test_states_are_counted_before_they_are_asked_for(path: Path) -> None:
    mambas = SHAPES["three groups"].mambas.values()
    size = 4 * sum(m.conv_state + m.scan_state for m in mambas)
    with engine_of(path) as one, engine_of(path, sequences=4, n_cells=512) as four:
        assert four.kv_held - one.kv_held == 6 * size
        assert four.kv_bytes(10) - one.kv_bytes(10) == 0
        assert four.kv_bytes(0) == 2 * size
        with pytest.raises(ValueError, match="sequence 3, expected 0 to 2"):
            one.compute(whole([5], 0, 3))
