"""Many texts at once on a model with Mamba blocks: what is kept of one serves another where its states allow it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mamba
import numpy as np
import pytest
from oracle import max_difference, random_ids
from test_mamba import engine_of

from runtime.compute.batch import Batch
from runtime.compute.recurrent_cells import RecurrentCells
from runtime.engine import Engine
from runtime.sequence import CachedSequence
from runtime.serve.scheduler import Pace, Scheduler, Task

MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture
def path(make_once: MakeOnce) -> Path:
    s = mamba.structure("M-M*-M", groups=3)
    return make_once("mamba.gguf", lambda path: mamba.write(path, s, mamba.weights(s)))


def run(engine: Engine, scheduler: Scheduler, tasks: list[Task], n: int) -> None:
    """Compute all tasks, each to n tokens behind its prompt; its logits are those of its text alone."""
    for task in tasks:
        scheduler.add(task)
    while step := scheduler.next_step():
        parts = [Batch.of(p.task.ids[p.first : p.end], p.first, p.task.number or 0, p.wanted) for p in step.parts]
        found = engine.compute(Batch.together(parts))
        scheduler.done(step, 0.01)
        rows = iter(found)
        for part in step.parts:
            for _ in part.wanted:
                row, alone = next(rows), CachedSequence(engine)
                assert max_difference(alone.logits(part.task.ids)[0], row) <= 1e-4
                alone.clear()
                part.task.ids.append(int(np.argmax(row)))
            if len(part.task.ids) == part.task.n_prompt + n:
                scheduler.remove(part.task)


def test_what_is_kept_is_reused_where_a_prompt_goes_on_from_all_of_it(path: Path) -> None:
    with engine_of(path, ffn="exact", sequences=3, n_cells=2048) as engine:
        scheduler = Scheduler(engine.cells, 3, Pace(512))
        first = [Task(random_ids(30 + k, mamba.VOCAB, seed=k), 80) for k in range(3)]
        run(engine, scheduler, first, 5)
        assert [task.cached for task in first] == [0, 0, 0]
        more = random_ids(20, mamba.VOCAB, seed=9)
        next_turn = Task([*first[0].ids, *more], 120)
        other = Task([*first[1].ids[:20], *more], 120)  # parts from it before its end
        again = Task(first[2].ids[: first[2].n_prompt], 120)
        run(engine, scheduler, [next_turn, other, again], 5)
        # The last token was chosen, and not computed.
        assert next_turn.cached == first[0].n_prompt + 4
        assert (other.cached, again.cached) == (0, 0)


def test_more_texts_than_states_take_turns(path: Path) -> None:
    with engine_of(path, ffn="exact", sequences=1, n_cells=2048) as engine:
        scheduler = Scheduler(engine.cells, 8, Pace(512))
        tasks = [Task(random_ids(20 + k, mamba.VOCAB, seed=k), 80) for k in range(5)]
        run(engine, scheduler, tasks, 3)
        assert [len(task.ids) - task.n_prompt for task in tasks] == [3] * 5
        assert not scheduler.running


def test_a_shorter_beginning_is_kept_beside_a_longer_one() -> None:
    cells = RecurrentCells(512, 6, 7)
    scheduler = Scheduler(cells, 2, Pace(512))

    def compute(ids: list[int]) -> Task:
        task = Task(ids, len(ids) + 1)
        scheduler.add(task)
        while not task.generates:
            step = scheduler.next_step()
            assert step
            for part in step.parts:
                cells.take(Batch.of(ids[part.first : part.end], part.first, task.number or 0))
            scheduler.done(step, 0.01)
        scheduler.remove(task)
        return task

    ids = random_ids(100, mamba.VOCAB)
    compute(ids[:40])
    assert compute(ids[:60]).cached == 40
    assert compute([*ids[:40], *ids[70:]]).cached == 40
    assert compute([*ids[:50], *ids[70:]]).cached == 40


def test_what_an_error_took_is_not_taken_for_kept() -> None:
    cells = RecurrentCells(512, 6, 7)
    scheduler = Scheduler(cells, 2, Pace(512))
    ids = random_ids(60, mamba.VOCAB)
    task = Task(ids, 100)
    scheduler.add(task)
    step = scheduler.next_step()
    assert step
    assert task.number
    cells.take(Batch.of(ids, 0, task.number))
    scheduler.done(step, 0.01)
    task.ids.append(5)
    step = scheduler.next_step()
    assert step
    cells.take(Batch.of([5], 60, task.number))  # which fails
    scheduler.lost(step)
    scheduler.remove(task)
    assert scheduler.kept_tokens == 0
    assert cells.n_used == 0
