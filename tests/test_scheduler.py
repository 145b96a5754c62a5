"""Who is computed when, without a model: a simulated engine takes cells and checks that every step continues what is
there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from runtime.compute.batch import Batch
from runtime.compute.kv_cache import CellTable
from runtime.serve.scheduler import FEW, GRID, Pace, Scheduler, Step, Task, common

SPEED = 100.0  # tokens of prompts per second


class Simulated:
    """A scheduler, and an engine that remembers which token every cell holds. clock: seconds."""

    def __init__(self, cells: int, parallel: int = 4, deterministic: bool = False, n_batch: int = 512) -> None:
        self.table = CellTable(cells)
        self.scheduler = Scheduler(self.table, parallel, Pace(n_batch), deterministic)
        self.held: dict[int, int] = {}  # by cell, its token
        self.clock, self.steps, self.computed = 0.0, [], 0
        self.ended: dict[int, float] = {}
        self.wanted: dict[int, int] = {}  # by id of a task, tokens to generate

    def add(self, ids: list[int], tokens: int, **more: object) -> Task:
        task = Task(list(ids), max(len(ids), len(ids) + tokens - 1), **more)
        self.wanted[id(task)] = tokens
        self.scheduler.add(task)
        return task

    def step(self) -> Step | None:
        step = self.scheduler.next_step()
        self.scheduler.admitted.clear()
        if step is None:
            return None
        self.check(step)
        cells = self.table.take(self.batch(step))
        tokens = [t for part in step.parts for t in part.task.ids[part.first : part.end]]
        self.held.update(zip(cells.tolist(), tokens, strict=True))
        self.computed += step.n_tokens
        self.clock += 0.1 if step.decodes else step.n_tokens / SPEED
        self.scheduler.done(step, step.n_tokens / SPEED)
        self.steps.append(step)
        for part in step.parts:
            self.see(part.task)
            if part.end == len(part.task.ids):
                self.choose(part.task)
        return step

    def batch(self, step: Step) -> Batch:
        return Batch.together(
            [Batch.of(p.task.ids[p.first : p.end], p.first, p.task.number or 0, p.wanted) for p in step.parts]
        )

    def choose(self, task: Task) -> None:
        """The next token: of its position, so that two tasks with the same prompt go on alike."""
        generated = len(task.ids) - task.n_prompt
        if generated < self.wanted[id(task)]:
            task.ids.append(1000 + len(task.ids))
        if generated + 1 >= self.wanted[id(task)]:
            self.scheduler.remove(task)
            self.ended[id(task)] = self.clock

    def see(self, task: Task) -> None:
        """What a task's sequence holds is what it should, in rising cells."""
        cells = np.flatnonzero(self.table.members & np.uint64(1 << (task.number or 0)))
        assert self.table.positions[cells].tolist() == list(range(task.known))
        assert [self.held[c] for c in cells.tolist()] == task.ids[: task.known]

    def check(self, step: Step) -> None:
        tasks = [part.task for part in step.parts]
        assert len(tasks) == len(set(map(id, tasks))) <= self.scheduler.parallel
        for part in step.parts:
            assert part.first == part.task.known < part.end <= len(part.task.ids)
            assert part.task.generates == step.decodes
            if part.end == len(part.task.ids):  # its next token is chosen
                assert part.wanted[-1] == part.end - part.first - 1
        if step.decodes:
            assert len(tasks) <= FEW and all(part.end - part.first == 1 for part in step.parts)

    def run(self) -> Iterator[Step]:
        while step := self.step():
            yield step

    def run_all(self) -> list[Step]:
        return list(self.run())


def ids(*shape: int) -> list[int]:
    """Tokens of their own: a seed, a number."""
    seed, n = shape
    return (np.random.default_rng(seed).integers(0, 900, n)).tolist()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_any_arrivals_and_cancels_are_all_computed_right(seed: int, deterministic: bool) -> None:
    random = np.random.default_rng(seed)
    cells = int(random.choice([300, 600, 2000]))
    s = Simulated(cells, int(random.choice([1, 2, 5, 20])), deterministic)
    tasks: list[Task] = []
    for _ in range(60):
        match random.integers(4):
            case 0 | 1:
                shared = ids(int(random.integers(3)), int(random.integers(0, 130)))
                own = ids(int(random.integers(1000)), int(random.integers(1, 100)))
                leader = None
                for _ in range(int(random.choice([1, 1, 1, 3]))):
                    task = s.add(
                        shared + own, int(random.integers(1, 40)), leader=leader, shares=bool(random.integers(5))
                    )
                    leader = leader or task
                    tasks.append(task)
            case 2 if tasks:
                task = tasks[int(random.integers(len(tasks)))]
                if id(task) not in s.ended:
                    s.ended[id(task)] = s.clock
                    s.scheduler.remove(task)
                    s.wanted[id(task)] = 0
        for _ in range(int(random.integers(12))):
            s.step()
    s.run_all()
    assert {id(task) for task in tasks} == set(s.ended)
    assert not s.scheduler.running and not s.scheduler.waiting
    assert s.table.n_used <= s.scheduler.kept_tokens
    for task in tasks:
        assert len(task.ids) - task.n_prompt >= s.wanted[id(task)]


def test_what_does_not_fit_waits_and_keeps_its_place() -> None:
    s = Simulated(300)
    first, second, third = s.add(ids(1, 150), 100), s.add(ids(2, 100), 100), s.add(ids(3, 10), 5)
    s.step()
    assert s.scheduler.running == [first] and list(s.scheduler.waiting) == [second, third]
    s.run_all()
    assert s.ended[id(first)] < s.ended[id(third)] <= s.ended[id(second)]


def test_prompts_and_tokens_take_turns() -> None:
    s = Simulated(2000)
    s.add(ids(1, 20), 100)
    s.step()
    s.add(ids(2, 400), 5)
    kinds = [s.step().decodes for _ in range(16)]  # type: ignore[union-attr]
    assert kinds[:12] in ([True, False] * 6, [False, True] * 6)


def test_pieces_take_the_time_that_they_may() -> None:
    s = Simulated(4000)
    s.add(ids(1, 20), 200)
    s.step()
    s.add(ids(2, 1000), 5)
    pieces = [step.n_tokens for step in s.run() if not step.decodes]
    assert all(n / SPEED <= 0.5 for n in pieces[3:]) and sum(pieces) == 1000
    assert min(pieces) > FEW


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    s = Simulated(9000)
    long = s.add(ids(1, 4000), 5)
    s.step()
    short = s.add(ids(2, 30), 5)
    s.run_all()
    assert s.ended[id(short)] < 5 < s.ended[id(long)]


def test_many_short_prompts_do_not_stop_a_long_one() -> None:
    s = Simulated(9000, parallel=3)
    long = s.add(ids(1, 1000), 2)
    for n in range(200):
        s.add(ids(n + 2, 60), 2)
        for _ in range(3):
            s.step()
    assert id(long) in s.ended


def test_the_same_prompt_is_computed_once() -> None:
    s = Simulated(2000, parallel=8)
    prompt = ids(1, 120)
    leader = s.add(prompt, 10)
    followers = [s.add(prompt, 10, leader=leader) for _ in range(3)]
    s.run_all()
    assert [task.cached for task in followers] == [119] * 3
    assert s.computed == 120 + 3 + 4 * 9


def test_what_follows_a_known_text_is_computed_alone_and_never_nothing() -> None:
    s = Simulated(2000)
    first = s.add(ids(1, 120), 10)
    s.run_all()
    same, longer = s.add(first.ids[:120], 4), s.add([*first.ids, *ids(2, 30)], 4)
    s.run_all()
    assert same.cached == 119 and longer.cached == 129  # all but the last token that was generated


def test_kept_beginnings_make_room_oldest_first() -> None:
    s = Simulated(300)
    for seed in (1, 2):
        s.add(ids(seed, 100), 2)
        s.run_all()
    s.add(ids(1, 100), 2)  # used again: now the other is the oldest
    s.run_all()
    s.add(ids(3, 150), 2)
    s.run_all()
    again, gone = s.add(ids(1, 100), 2), s.add(ids(2, 100), 2)
    s.run_all()
    assert again.cached == 99 and gone.cached == 0


def test_a_request_that_needs_all_cells_gets_them_from_what_it_continues() -> None:
    """A pool of one context: the old answer makes room for the next turn of the same chat."""
    s = Simulated(300, parallel=1)
    first = s.add(ids(1, 100), 150)
    s.run_all()
    second = s.add([*first.ids[:200], *ids(2, 20)], 81)
    s.run_all()
    assert second.cached == 200


def test_where_all_logits_are_wanted_nothing_is_reused() -> None:
    s = Simulated(2000)
    s.add(ids(1, 100), 2)
    s.run_all()
    task = s.add(ids(1, 100), 1, all_logits=True)
    wanted = [list(part.wanted) for step in s.run() for part in step.parts if part.task is task]
    assert task.cached == 0 and sum(map(len, wanted)) == 100


def test_deterministic_pieces_depend_on_the_prompt_alone() -> None:
    """Alone, in company, and with a beginning that is known: tokens are computed in batches of the same sizes."""

    def pieces(s: Simulated, task: Task) -> list[tuple[int, int]]:
        found = [(p.first, p.end) for step in s.steps for p in step.parts if p.task is task and not step.decodes]
        assert all(len(step.parts) == 1 for step in s.steps if not step.decodes)
        return found

    for n in (10, GRID, 127, 128, 300, 517):
        s = Simulated(4000, deterministic=True)
        alone = s.add(ids(1, n), 3)
        s.run_all()
        t = Simulated(4000, deterministic=True)
        for seed in (2, 3):
            t.add(ids(seed, 200), 60)
        t.step()
        company = t.add(ids(1, n), 3)
        t.run_all()
        again = t.add(ids(1, n), 3)
        t.run_all()
        assert pieces(s, alone) == pieces(t, company)
        assert pieces(t, again) == [piece for piece in pieces(s, alone) if piece[0] >= again.cached]
        assert again.cached == max(0, n // GRID - 1) * GRID


def test_more_than_fit_into_one_batch_decode_in_turn() -> None:
    s = Simulated(4000, parallel=20)
    for seed in range(20):
        s.add(ids(seed, 20), 50)
    while any(not task.generates for task in s.scheduler.running) or not s.scheduler.running:
        s.step()
    steps = [s.step() for _ in range(10)]
    counts = [sum(part.task is task for step in steps for part in step.parts) for task in s.scheduler.running]  # type: ignore[union-attr]
    assert set(counts) == {5}


@pytest.mark.parametrize("seed", range(20))
def test_common(seed: int) -> None:
    random = np.random.default_rng(seed)
    a = random.integers(0, 2, 50).tolist()
    n = int(random.integers(0, 51))
    b = [*a[:n], *([1 - a[n]] if n < 50 else []), *random.integers(0, 2, 5).tolist()]
    assert common(a, b) == common(b, a) == n
