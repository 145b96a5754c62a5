"""Several sequences in one batch: each gets the logits that it gets alone, whoever is there with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, random_ids

import runtime
from convert import convert
from runtime.compute.batch import Batch
from runtime.compute.counters import Counters
from runtime.engine import Engine
from runtime.errors import UserError

pytestmark = pytest.mark.numeric

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
LENGTHS = (1, 3, 17, 40, 64, 5, 29, 90)
NUMBERS = (0, 1, 5, 12, 31, 32, 62, 63)
TEXTS = [random_ids(n, 4000, seed=n) for n in LENGTHS]
ON_DEVICE = {"device": "CPU", "hot": 512}


@contextmanager
def engine_of(path: Path, **options: Any) -> Iterator[Engine]:
    with runtime.load(path, **{"kv_type": "f32", "device": "none", "threads": 2, "n_ctx": 512} | options) as model:
        yield model._engine


def whole(ids: list[int], start: int = 0, sequence: int = 0) -> Batch:
    """Tokens of one sequence with every one's logits wanted."""
    return Batch.of(ids, start, sequence, range(len(ids)))


def alone(engine: Engine, ids: list[int]) -> Logits:
    engine.cells.clear()
    return engine.compute(whole(ids))


def largest_difference(wanted: Logits, found: Logits) -> float:
    """Relative to the largest logit."""
    assert wanted.shape == found.shape
    return float(np.abs(wanted - found).max() / np.abs(wanted).max())


def divided(logits: Logits, lengths: tuple[int, ...] = LENGTHS) -> list[Logits]:
    return np.split(logits, np.cumsum(lengths)[:-1])


@pytest.fixture(scope="module")
def f32_fitted(make_once: MakeOnce, checkpoint: Callable[[str], Path]) -> Path:
    """The bundled model in F32, its predictors too: where these round what they read to 8 bits, sums in another order can
    turn a rounding, and with it a candidate."""
    options = {"type": "f32", "predictor_type": "f32", "calibration_tokens": 4096}
    return make_once("f32-predictors.gguf", lambda path: convert(checkpoint("bundled"), path, force=True, **options))


MODES = [
    ("dense", {}),
    ("exact", {}),
    ("predicted", {}),
    ("predicted", {"predictor_bias": 1e30}),
    ("dense", ON_DEVICE),
    ("exact", ON_DEVICE),
    ("predicted", ON_DEVICE),
]


@pytest.mark.parametrize(("ffn", "options"), MODES)
def test_eight_sequences_get_each_ones_own_logits(f32_fitted: Path, ffn: str, options: dict[str, Any]) -> None:
    with engine_of(f32_fitted, ffn=ffn, **options) as engine:
        wanted = [alone(engine, ids) for ids in TEXTS]
        engine.cells.clear()
        together = Batch.together([whole(ids, 0, k) for ids, k in zip(TEXTS, NUMBERS, strict=True)])
        found = divided(engine.compute(together))
    for a, b in zip(wanted, found, strict=True):
        assert largest_difference(a, b) <= 1e-5


@pytest.mark.parametrize(("ffn", "options"), MODES)
def test_the_company_does_not_change_a_bit(f32_fitted: Path, ffn: str, options: dict[str, Any]) -> None:
    """Seven other texts of the same lengths beside it."""
    mine, found = 4, []
    with engine_of(f32_fitted, ffn=ffn, **options) as engine:
        for seed in (100, 200):
            texts = [random_ids(n, 4000, seed=seed + n) for n in LENGTHS]
            texts[mine] = TEXTS[mine]
            engine.cells.clear()
            parts = [whole(ids, 0, k) for ids, k in zip(texts, NUMBERS, strict=True)]
            found.append(divided(engine.compute(Batch.together(parts))))
    (one, *_), (other, *_) = (found[0][mine:], found[1][mine:])
    assert np.array_equal(one, other)
    assert not np.array_equal(found[0][mine + 1], found[1][mine + 1])


@pytest.mark.parametrize(("ffn", "options"), MODES)
def test_prompts_and_decoding_in_turns(f32_fitted: Path, ffn: str, options: dict[str, Any]) -> None:
    """One sequence decodes token by token while another one's prompt comes in pieces, and a third one ends and gives its cells back."""
    first, second, third = TEXTS[4], TEXTS[3], TEXTS[2]
    with engine_of(f32_fitted, ffn=ffn, **options) as engine:
        wanted_first, wanted_second = alone(engine, first), alone(engine, second)
        engine.cells.clear()
        engine.compute(Batch.together([whole(first[:50], 0, 0), whole(third, 0, 7)]))
        rows_first, rows_second = [], []
        for step, at in enumerate(range(0, 40, 4)):
            if step == 2:
                engine.cells.trim(7)  # the next ones come into these cells
            batch = Batch.together(
                [whole(first[50 + step : 51 + step], 50 + step, 0), whole(second[at : at + 4], at, 3)]
            )
            logits = engine.compute(batch)
            rows_first.append(logits[:1])
            rows_second.append(logits[1:])
    assert largest_difference(wanted_first[50:60], np.concatenate(rows_first)) <= 1e-5
    assert largest_difference(wanted_second, np.concatenate(rows_second)) <= 1e-5


def test_sequences_that_begin_alike_share_cells_and_part(f32_fitted: Path) -> None:
    common, one, other = TEXTS[4], TEXTS[2], TEXTS[5]
    with engine_of(f32_fitted, ffn="exact") as engine:
        wanted = [alone(engine, common + rest)[-len(rest) :] for rest in (one, other)]
        engine.cells.clear()
        engine.compute(whole(common, 0, 1))
        used = np.count_nonzero(engine.cells.members)
        engine.cells.copy(1, 2)
        assert np.count_nonzero(engine.cells.members) == used
        n = len(common)
        logits = engine.compute(Batch.together([whole(one, n, 1), whole(other, n, 2)]))
        engine.cells.trim(1)
        assert np.count_nonzero(engine.cells.members) == n + len(other)
        again = engine.compute(whole([5], n + len(other), 2))
        assert np.isfinite(again).all()
    for a, b in zip(wanted, divided(logits, (len(one), len(other))), strict=True):
        assert largest_difference(a, b) <= 1e-5


@pytest.mark.parametrize("wanted", [(), (0,), (16,), (3, 4, 11), tuple(range(17))])
def test_any_of_the_tokens_logits(f32_fitted: Path, wanted: tuple[int, ...]) -> None:
    ids = TEXTS[2]
    with engine_of(f32_fitted, ffn="exact") as engine:
        every = alone(engine, ids)
        engine.cells.clear()
        found = engine.compute(Batch.of(ids, outputs=wanted))
        assert found.shape == (len(wanted), every.shape[1])
        assert engine.cells.length(0) == len(ids)
        if wanted:
            assert largest_difference(every[list(wanted)], found) <= 1e-5


def test_a_full_cache_is_an_error_and_stays_as_it_was(f32_fitted: Path) -> None:
    with engine_of(f32_fitted, ffn="exact", n_ctx=100, n_batch=16) as engine:
        wanted = alone(engine, TEXTS[4])
        engine.cells.clear()
        engine.compute(whole(TEXTS[4][:-1], 0, 1))
        with pytest.raises(UserError, match="tokens more, expected at most"):
            engine.compute(whole(TEXTS[3], 0, 2))
        assert (engine.cells.length(1), engine.cells.length(2)) == (len(TEXTS[4]) - 1, 0)
        found = engine.compute(whole(TEXTS[4][-1:], len(TEXTS[4]) - 1, 1))
    assert largest_difference(wanted[-1:], found) <= 1e-5


@pytest.mark.parametrize(("ffn", "options"), MODES)
def test_each_sequences_neurons_are_counted_for_itself(f32_fitted: Path, ffn: str, options: dict[str, Any]) -> None:
    with engine_of(f32_fitted, ffn=ffn, n_batch=50, **options) as engine:
        engine._dense_from = (math.inf,) * 6  # as whole matrices, nothing is counted
        counters = {k: Counters(engine.structure, ffn) for k in NUMBERS[:-1]}
        wanted = {}
        for ids, k in zip(TEXTS, NUMBERS, strict=True):
            engine.cells.clear()
            engine.counters.reset()
            engine.compute(Batch.of(ids, 0, k))
            wanted[k] = engine.counters.layers
        engine.cells.clear()
        engine.counters.reset()
        parts = [Batch.of(ids, 0, k) for ids, k in zip(TEXTS, NUMBERS, strict=True)]
        engine.compute(Batch.together(parts), counters)
        for k, counted in counters.items():
            assert counted.layers == wanted[k], k
        total = [sum(wanted[k][i].fired for k in NUMBERS) for i in range(6)]
        assert [layer.fired for layer in engine.counters.layers] == total


def test_what_fails_is_not_counted(f32_fitted: Path) -> None:
    with engine_of(f32_fitted, ffn="exact", n_batch=16, n_ctx=100) as engine:
        with pytest.raises(UserError, match="expected at most"):
            engine.compute(whole(random_ids(110, 4000)))
        assert all(layer.seen == 0 for layer in engine.counters.layers)
        assert engine.cells.length(0) == 0


@pytest.mark.parametrize("wrong", [-1, 4096, 2**31 - 1])
def test_tokens_outside_the_vocabulary_are_refused(f32_fitted: Path, wrong: int) -> None:
    with engine_of(f32_fitted, ffn="exact") as engine, pytest.raises(ValueError, match="expected 0 to 4095"):
        engine.compute(Batch.of([5, wrong]))


@pytest.mark.parametrize("n_batch", [7, 64])
def test_a_long_batch_of_several_sequences_is_computed_in_pieces(f32_fitted: Path, n_batch: int) -> None:
    with engine_of(f32_fitted, ffn="exact", n_batch=n_batch) as engine:
        wanted = [alone(engine, ids) for ids in TEXTS]
        engine.cells.clear()
        together = Batch.together([whole(ids, 0, k) for ids, k in zip(TEXTS, NUMBERS, strict=True)])
        for a, b in zip(wanted, divided(engine.compute(together)), strict=True):
            assert largest_difference(a, b) <= 1e-5
