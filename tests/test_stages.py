"""A model in stages, all in this process: the same logits as in one piece, whatever happens to its sequences."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import experts
import mamba
import numpy as np
import pytest
from oracle import random_ids

import runtime
from convert import convert
from runtime.base_engine import BaseEngine
from runtime.compute.batch import Batch
from runtime.errors import UserError
from runtime.model import Model
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions
from runtime.sequence import CachedSequence
from runtime.serve.jobs import End, Job
from runtime.serve.service import Service
from runtime.stages.cut import cut
from runtime.stages.groups import Groups
from runtime.stages.local import LocalStages
from runtime.stages.stage import Stage
from runtime.stages.staged_engine import StagedEngine, StageLostError
from runtime.stages.work import Passed
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

OPTIONS: dict[str, Any] = {"kv_type": "f32", "device": "none", "threads": 2, "n_ctx": 256, "sequences": 8}


@contextmanager
def staged(path: Path, n_stages: int, **options: Any) -> Iterator[StagedEngine]:
    given = RunOptions(**OPTIONS | options)
    file = GgufFile(path)
    n = file.structure.block_count
    ends = [round(k * n / n_stages) for k in range(n_stages + 1)]
    cuts = [range(a, b) for a, b in itertools.pairwise(ends)]
    stages = LocalStages(path, given, cuts)
    with StagedEngine(file, given.for_file(file), stages) as engine:
        yield engine


@contextmanager
def whole(path: Path, **options: Any) -> Iterator[BaseEngine]:
    with runtime.load(path, **{k: v for k, v in (OPTIONS | options).items() if k != "sequences"}) as model:
        yield model.engine


def same(found: Any, wanted: Any) -> None:
    assert np.array_equal(found, wanted)


def story(engine: BaseEngine) -> list[Any]:
    """Logits of several sequences: prompts, tokens together, some taken back, one that begins as another."""
    vocab = engine.structure.vocab_size
    texts = [random_ids(n, vocab, seed=n) for n in (40, 3, 17, 1, 29, 5, 64, 2)]
    found = [engine.compute(Batch.of(ids, 0, k)) for k, ids in enumerate(texts)]
    lengths = [len(ids) for ids in texts]

    def together(numbers: list[int], seed: int) -> None:
        ids = random_ids(len(numbers), vocab, seed=seed)
        batches = [Batch.of([token], lengths[k], k) for token, k in zip(ids, numbers, strict=True)]
        found.append(engine.compute(Batch.together(batches)))
        for k in numbers:
            lengths[k] += 1

    engine.exclusively(lambda: engine.cells.save(0))
    for turn in range(12):
        together(random.Random(turn).sample(range(8), 1 + turn % 8), seed=turn)
    engine.exclusively(lambda: engine.cells.trim(0, 40))
    lengths[0] = 40
    engine.exclusively(lambda: engine.cells.copy(6, 1))
    lengths[1] = lengths[6]
    together([0, 1, 6], seed=99)
    engine.exclusively(engine.cells.clear)
    found.append(engine.compute(Batch.of(texts[4], 0, 3, range(len(texts[4])))))
    return found


def mixture(folder: Path) -> Path:
    """Three blocks of experts."""
    experts.Model(smallthinker=True, windowed=(0, 1, 0)).make(folder / "hf")
    convert(folder / "hf", folder / "m.gguf", type="f32", calibration="none")
    return folder / "m.gguf"


def mambas(folder: Path) -> Path:
    """Six blocks: Mamba-2, FFNs, attention."""
    shape = mamba.structure("M-M*-M", groups=3)
    mamba.write(folder / "m.gguf", shape, mamba.weights(shape))
    return folder / "m.gguf"


@pytest.fixture(scope="module", params=["bundled", "experts", "Mamba"])
def model_file(request: pytest.FixtureRequest, fitted_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bundled":
        return fitted_gguf
    return {"experts": mixture, "Mamba": mambas}[request.param](tmp_path_factory.mktemp("made"))


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["the usual one", "exact", "dense"])
def test_the_same_bits(model_file: Path, ffn: str) -> None:
    """The usual mode is `predicted` where the file has predictors."""
    given = {"ffn": None if ffn == "the usual one" else ffn, "deterministic": ffn == "dense", "n_cells": 2048}
    with staged(model_file, 1, **given) as one:
        wanted = story(one)
        counts = one.counters.layer_shares()
    for n_stages in (2, 3):
        with staged(model_file, n_stages, **given) as engine:
            for found, logits in zip(story(engine), wanted, strict=True):
                same(found, logits)
            assert engine.counters.layer_shares() == counts


@pytest.mark.numeric
@pytest.mark.parametrize("n_stages", [2, 3])
def test_one_engine_says_the_same(model_file: Path, n_stages: int) -> None:
    with whole(model_file) as engine:
        ids = random_ids(50, engine.structure.vocab_size, seed=1)
        wanted = engine.compute(Batch.of(ids, 0, 0, range(len(ids))))
        following = [engine.compute(Batch.of(ids[:1], 50 + k)) for k in range(3)]
        share = engine.counters.layer_shares()
    with staged(model_file, n_stages) as engine:
        same(engine.compute(Batch.of(ids, 0, 0, range(len(ids)))), wanted)
        for k, logits in enumerate(following):
            same(engine.compute(Batch.of(ids[:1], 50 + k)), logits)
        assert engine.counters.layer_shares() == share


def test_after_errors_all_stages_agree(fitted_gguf: Path) -> None:
    """A context that is full, tokens that do not exist, a sequence that does not go on so."""
    ids = random_ids(60, 4000, seed=2)
    with staged(fitted_gguf, 1, n_cells=256) as engine:
        wanted = engine.compute(Batch.of(ids))
    with staged(fitted_gguf, 2, n_cells=256) as engine:
        engine.compute(Batch.of(ids[:30]))
        with pytest.raises(UserError, match="the context has 256 cells"):
            engine.compute(Batch.of(random_ids(240, 4000, seed=3), 0, 1))
        with pytest.raises(ValueError, match="expected 0 to"):
            engine.compute(Batch.of([10**6], 30))
        with pytest.raises(ValueError, match="position 5"):
            engine.compute(Batch.of(ids, 5))
        sequence = CachedSequence(engine)
        sequence.clear()
        same(sequence.logits(ids), wanted)


class Failing(LocalStages):
    """Is lost at the works that it is told, and begins anew with empty stages."""

    def __init__(self, path: Path, options: RunOptions, cuts: list[range]) -> None:
        super().__init__(path, options, cuts)
        self.given = (path, options, cuts)
        self.fatal: list[int] = []
        self.n_works = self.restarts = 0

    def receive(self, ticket: object) -> Passed:
        self.n_works += 1
        if self.n_works in self.fatal:
            raise StageLostError("stage 2: its process has ended; it is begun anew")
        return super().receive(ticket)

    def restart(self) -> None:
        self.restarts += 1
        path, options, cuts = self.given
        self._stages[1].close()
        self._stages[1] = self._handles.enter_context(Stage(path, options, cuts[1]))


def failing_engine(path: Path, fatal: list[int]) -> tuple[StagedEngine, Failing]:
    given, file = RunOptions(**OPTIONS), GgufFile(path)
    stages = Failing(path, given, [range(2), range(2, file.structure.block_count)])
    stages.fatal = fatal
    return StagedEngine(file, given.for_file(file), stages), stages


def test_what_is_lost_is_computed_again(fitted_gguf: Path) -> None:
    ids = random_ids(30, 4000, seed=2)
    with whole(fitted_gguf) as engine:
        wanted = CachedSequence(engine).logits(ids)
    engine, stages = failing_engine(fitted_gguf, [2, 5])
    with engine:
        sequence = CachedSequence(engine)
        for losses in (1, 2):
            sequence.logits(ids[:10])
            with pytest.raises(StageLostError):
                for k in range(11, 30):
                    sequence.logits(ids[:k])
            assert engine.losses == stages.restarts == losses
            assert [engine.cells.length(0), engine.cells.n_used] == [0, 0]
            same(sequence.logits(ids), wanted)


def test_a_server_goes_on_when_a_stage_is_lost(fitted_gguf: Path) -> None:
    """Answers that are being computed end with an error; those that wait, and later ones, are right."""
    engine, stages = failing_engine(fitted_gguf, [12, 30])
    file = GgufFile(fitted_gguf)
    with Model(file, engine, Tokenizer(file.path, file.metadata)) as model:
        prompts = [tuple(model.tokenize(text)) for text in ("We the", "The people of", "When in", "A well", "No", "In")]
        with runtime.load(fitted_gguf, **{k: v for k, v in OPTIONS.items() if k != "sequences"}) as alone:
            wanted = ["".join(alone.generate(ids, max_tokens=12, sampling=Sampling(temperature=0))) for ids in prompts]

        async def one(service: Service, k: int) -> str | StageLostError:
            job = Job(prompts[k], 12, Sampling(temperature=0), ())
            try:
                events = [event async for event in service.submit(job)[0]]
            except StageLostError as error:
                return error
            assert isinstance(events[-1], End)
            return events[-1].text

        async def all_of_them() -> list[str | StageLostError]:
            service = Service(2, 64)
            await service.start(lambda: model)
            found = await asyncio.gather(*(one(service, k) for k in range(len(prompts))))
            found += [await one(service, k) for k in range(len(prompts))]
            await service.close()
            return found

        found = asyncio.run(all_of_them())
        lost = [k for k, text in enumerate(found) if isinstance(text, StageLostError)]
        assert 2 <= len(lost) <= 4
        assert stages.restarts == 2
        assert all(text == wanted[k % len(wanted)] for k, text in enumerate(found) if k not in lost)


def test_cuts_are_the_best() -> None:
    for seed in range(60):
        made = random.Random(seed)
        n, k = made.randint(1, 9), made.randint(1, 5)
        costs, first, last = [made.uniform(0, 1) for _ in range(n)], made.uniform(0, 1), made.uniform(0, 2)
        if k > n:
            with pytest.raises(UserError, match=f"expected 1 to {n}"):
                cut(costs, k, first, last)
            continue

        def slowest(
            ends: tuple[int, ...], costs: list[float] = costs, first: float = first, last: float = last
        ) -> float:
            parts = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
            parts[0], parts[-1] = parts[0] + first, parts[-1] + last
            return max(parts)

        found = cut(costs, k, first, last)
        assert [i for blocks in found for i in blocks] == list(range(n))
        ends = ((0, *between, n) for between in itertools.combinations(range(1, n), k - 1))
        assert slowest((0, *(blocks.stop for blocks in found))) == pytest.approx(min(map(slowest, ends)))


def test_groups_follow_what_was_measured() -> None:
    shared, single = Groups(2), Groups(2)
    assert shared.number(1) == 1
    assert shared.number(4) == 2  # nothing is known yet
    for n in (1, 2, 3, 4) * 5:
        shared.took(n, [0.9, 1.0 + 0.01 * n])  # a token more costs next to nothing
        single.took(n, [0.5 * n, 1.0 * n])  # twice as many take twice as long
    assert shared.number(4) == 1
    assert single.number(4) == 4
