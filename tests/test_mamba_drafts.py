"""Drafts with Mamba blocks: what is rejected leaves the states, and the tokens are those without drafts."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mamba
import numpy as np
import pytest
from oracle import random_ids
from test_mamba import engine_of
from test_sequences import whole
from test_verified import assert_same_tokens, continued

import runtime
from runtime.compute.batch import Batch
from runtime.compute.recurrent_cells import RecurrentCells
from runtime.generation import Floats
from runtime.model_file.reader import GgufFile
from runtime.sequence import CachedSequence
from runtime.speculation import Speculation

pytestmark = pytest.mark.numeric

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
IDS = random_ids(80, mamba.VOCAB)
SHAPES = {
    "three groups": mamba.structure("M-M*-M-", groups=3),
    "any sizes": mamba.structure("-M-*M", groups=3, heads=3, length=5, state=24),
}


@pytest.fixture
def path(make_once: MakeOnce) -> Callable[[str], Path]:
    def made(name: str) -> Path:
        s, weights = mamba.predicted(SHAPES[name], mamba.weights(SHAPES[name]), rank=40)
        return make_once(f"mamba-drafts-{name}.gguf", lambda path: mamba.write(path, s, weights))

    return made


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("three groups", "exact", {"ffn": "verified"}),
        ("three groups", "exact", {"ffn": "exact", "lookup": True}),
        ("any sizes", "predicted", {"ffn": "predicted", "lookup": True}),
        ("any sizes", "exact", {"ffn": "verified", "lookup": True}),
    ],
)
def test_greedy_tokens(
    path: Callable[[str], Path], drafting: str, name: str, mode: str, options: dict[str, Any]
) -> None:
    assert_same_tokens(path(name), 2, 120, mode, device="none", **options)


def test_a_conversation_goes_on_from_what_was_kept(path: Callable[[str], Path], drafting: str) -> None:
    """The next turns, and another answer to the first one."""
    texts = []
    for ffn in ("exact", "verified"):
        with runtime.load(path("three groups"), ffn=ffn, device="none") as model:
            ids = IDS[:20]
            for turn in range(3):
                ids = [*ids, *continued(model, ids, 20, cache_prompt=True).token_ids, *IDS[turn : turn + 5]]
            first = continued(model, ids, 5, cache_prompt=True)
            again = continued(model, ids, 30, cache_prompt=True)
            assert again.stats.cached_tokens == len(ids) - 1
            assert again.token_ids[:5] == first.token_ids
            texts.append([*ids, *again.token_ids])
    assert texts[0] == texts[1]


class Likeliest:
    """Drafts greedily."""

    def sample(self, logits: Floats) -> int:
        return int(np.argmax(logits))


@pytest.mark.parametrize("turn", [1, 7])
def test_several_sequences_in_turn(path: Callable[[str], Path], drafting: str, turn: int) -> None:
    """Others compute between a batch and what is known of it, so that its log is lost."""
    prompts, n = [random_ids(12 + k, mamba.VOCAB, seed=k) for k in range(3)], 21
    with runtime.load(path("three groups"), ffn="exact", device="none") as plain:
        wanted = [continued(plain, ids, n).token_ids for ids in prompts]
    options: dict[str, Any] = {"ffn": "verified", "lookup": True, "kv_type": "f16"}
    with engine_of(path("three groups"), **options) as engine, GgufFile(path("three groups")) as file:
        texts = [list(ids) for ids in prompts]
        sequences = [CachedSequence(engine, k) for k in range(3)]
        ahead = [Speculation(sequence, file, lambda: nullcontext(Likeliest())) for sequence in sequences]
        for ids, sequence in zip(texts, sequences, strict=True):
            ids.append(int(np.argmax(sequence.logits(ids)[0])))
        for _ in range((n - 1) // turn):
            for ids, speculation in zip(texts, ahead, strict=True):
                for _ in range(min(turn, n - 1)):
                    ids.append(int(np.argmax(speculation.logits(ids, n)[0])))
    assert sum(speculation.did.drafted for speculation in ahead) > n
    assert [ids[len(prompt) :][:n] for ids, prompt in zip(texts, prompts, strict=True)] == [
        tokens[: len(ids) - len(prompt)] for tokens, ids, prompt in zip(wanted, texts, prompts, strict=True)
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_sequence_goes_back_to_any_length_within_the_last_batch(path: Callable[[str], Path], name: str) -> None:
    """Bit for bit what it is token by token; and so does a copy of it."""
    with engine_of(path(name), ffn="exact", lookup=True, kv_type="f16") as engine:
        single = [engine.compute(whole([token], at)) for at, token in enumerate(IDS[:40])]
        for n, kept in [(16, 0), (16, 1), (16, 15), (5, 2), (2, 1), (3, 2)]:
            engine.cells.clear()
            engine.compute(whole(IDS[:10]))
            assert np.array_equal(engine.compute(whole(IDS[10 : 10 + n], 10)), np.concatenate(single[10 : 10 + n]))
            assert engine.cells.reachable(0, 10 + kept) == 10 + kept
            engine.cells.copy(0, 1, 10 + kept)
            engine.cells.trim(0, 10 + kept)
            for sequence in (1, 0):
                found = engine.compute(whole(IDS[10 + kept : 13 + kept], 10 + kept, sequence))
                assert np.array_equal(found, np.concatenate(single[10 + kept : 13 + kept]))


def test_without_drafts_nothing_is_kept_for_them(path: Callable[[str], Path]) -> None:
    with engine_of(path("three groups"), ffn="exact") as plain, engine_of(path("three groups"), lookup=True) as drafts:
        for engine in (plain, drafts):
            engine.compute(whole(IDS[:10]))
            engine.compute(whole(IDS[10:14], 10))
        assert (plain.cells.reachable(0, 12), drafts.cells.reachable(0, 12)) == (0, 12)
        mambas = SHAPES["three groups"].mambas.values()
        assert drafts.kv_held - plain.kv_held == sum(2 * m.state_bytes + 64 * m.log_length for m in mambas)


@pytest.mark.parametrize("hot", [0, 32])
def test_beside_a_device(path: Callable[[str], Path], drafting: str, hot: int) -> None:
    """A device's products of several tokens may differ from those of one: each token is the likeliest but for that."""
    options: dict[str, Any] = {"device": "CPU", "hot": hot}
    with runtime.load(path("three groups"), ffn="verified", **options) as model:
        assert list(model._engine.map.mambas(1)) == [0, 2, 5]
        found = continued(model, IDS[:20], 60)
    with runtime.load(path("three groups"), ffn="exact", device="none") as plain:
        logits = plain.logits([*IDS[:20], *found.token_ids])[19:-1]
    assert found.stats.drafted_tokens > found.stats.accepted_tokens
    chosen = logits[np.arange(len(found.token_ids)), found.token_ids]
    assert (logits.max(1) - chosen).max() <= 0.01 * np.ptp(logits)


def test_an_error_while_drafts_are_checked(path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before the batch is still there."""
    with engine_of(path("three groups"), ffn="exact", lookup=True, kv_type="f16") as engine:
        engine.compute(whole(IDS[:20]))
        wanted = engine.compute(whole(IDS[20:23], 20))
        engine.cells.trim(0, 20)
        with monkeypatch.context() as patched:
            patched.setattr("runtime.hybrid.schedule.Schedule._run", interrupted)
            for _ in range(2):  # in the replay, then in the batch
                with pytest.raises(KeyboardInterrupt):
                    engine.compute(whole(IDS[20:25], 20))
        assert engine.cells.length(0) == 20
        assert np.array_equal(engine.compute(whole(IDS[20:23], 20)), wanted)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


# --- the table of rows -----------------------------------------------------------------------------------------------


class Rows:
    """What rows of states would hold, in place of the numbers: the tokens that they come of."""

    def __init__(self, n: int) -> None:
        self.rows: list[tuple[int, ...]] = [(-1,)] * n
        self.log: tuple[int, ...] = ()

    def compute(self, cells: RecurrentCells, batch: Batch, texts: dict[int, tuple[int, ...]]) -> None:
        """What the engine does for a batch that `cells` has taken in."""
        while cells.moves:
            move = cells.moves.popleft()
            more = self.log[: move.length]  # of a copy, nothing
            self.rows[move.row] = () if move.kind == "begin" else self.rows[move.source] + more
        found: dict[int, tuple[int, ...]] = {}
        lengths, numbers = batch.runs()
        at = 0
        for length, number, read, written in zip(lengths, numbers.tolist(), *map(list, cells.states), strict=True):
            # Sequences are computed one after the other, and write at once.
            assert self.rows[read] == texts[number], "states of another text"
            tokens = tuple(batch.tokens[at : at + length].tolist())
            found[written] = self.rows[written] = self.rows[read] + tokens
            texts[number] += tokens
            at += length
        assert all(self.rows[row] == text for row, text in found.items()), "two sequences wrote to one row"
        if cells.logs(batch):
            self.log = tuple(batch.tokens.tolist())


@pytest.mark.parametrize("logged", [0, 4])
def test_rows_hold_what_they_should(logged: int) -> None:
    """Random batches, copies and ways back: a sequence always goes on from what it was."""
    chance, n = random.Random(logged), 4
    cells = RecurrentCells(4096, n, n + (3 if logged else 1), logged)
    rows, texts = Rows(n + (3 if logged else 1)), dict.fromkeys(range(n), ())
    for _ in range(3000):
        action, sequence = (
            chance.choice(["go on", "go on", "trim", "trim", "copy", "save", "draft"]),
            chance.randrange(n),
        )
        known, length = texts[sequence], chance.randint(0, len(texts[sequence]))
        if action == "go on" and sum(map(len, texts.values())) < 3000:
            some = chance.sample(range(n), chance.choice([1, 1, 1, 2, n]))
            taken = [Batch.of(chance.choices(range(9), k=chance.randint(1, 6)), len(texts[k]), k) for k in some]
            cells.take(Batch.together(taken))
            rows.compute(cells, Batch.together(taken), texts)
        elif action == "trim":
            reached = cells.reachable(sequence, length)
            cells.trim(sequence, length)
            assert cells.length(sequence) == reached <= length
            texts[sequence] = known[:reached]
        elif action == "copy":
            target, length = chance.randrange(n), cells.reachable(sequence, length)
            if target != sequence:
                cells.copy(sequence, target, length)
                texts[target] = known[:length]
        elif action == "save" and known:
            cells.save(sequence)
            assert cells.reachable(sequence, len(known)) == len(known)
        elif action == "draft" and logged and known:
            with cells.held(sequence):
                for _ in range(chance.randint(1, 3)):
                    batch = Batch.of([chance.randrange(9)], len(texts[sequence]), sequence)
                    cells.take(batch)
                    rows.compute(cells, batch, texts)
                assert cells.reachable(sequence, len(known)) == len(known)
                cells.trim(sequence, len(known))
                texts[sequence] = known
    assert not any(cells.moves) or logged
