"""Who is computed when: requests that wait, sequences that run, beginnings that are kept. Pure: it knows neither HTTP
nor ggml, only the table of cells.

Steps are of two kinds, which take turns: a decoding step computes one token of every sequence that generates; a prompt
step computes a piece of one or more prompts.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime.compute.kv_cache import CellTable

FEW = 16  # tokens that are decoded at once: in such batches a token's logits have the same bits as alone
# Larger batches are computed in other ways, by their size (docs/serve.md): where nothing may depend on company, prompts
# are computed in pieces of so many tokens, whatever the time.
GRID = 64
_SIZES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, FEW + 1)  # of a prompt's pieces


@dataclass(eq=False)
class Task:
    """A sequence that is to be computed.

    ids: the prompt, then what was generated. limit: positions that it can come to need, at most.
    leader: a task with the same prompt, which is computed first. all_logits: those of the whole prompt are wanted;
    shares: whether what is known of its prompt may be reused.
    number: its sequence in the cache, while it runs. known: how many of `ids` are there; of these `cached` were reused.
    """

    ids: list[int]
    limit: int
    leader: Task | None = None
    all_logits: bool = False
    shares: bool = True
    n_prompt: int = 0
    number: int | None = None
    known: int = 0
    cached: int = 0

    def __post_init__(self) -> None:
        self.n_prompt = len(self.ids)

    @property
    def generates(self) -> bool:
        """Whether its prompt is there: one token at a time is computed from now on."""
        return self.known >= self.n_prompt

    @property
    def left(self) -> int:
        """Tokens of the prompt that are still to be computed."""
        return self.n_prompt - self.known


@dataclass(frozen=True)
class Part:
    """Tokens `first` to `end` - 1 of a task. wanted: whose logits are wanted, of `first` and on."""

    task: Task
    first: int
    end: int
    wanted: Sequence[int]


@dataclass(frozen=True)
class Step:
    """What is computed at once."""

    parts: tuple[Part, ...]
    decodes: bool

    @property
    def n_tokens(self) -> int:
        """Tokens in all."""
        return sum(part.end - part.first for part in self.parts)


@dataclass
class Pace:
    """How many tokens of prompts are computed in one step, so that it takes about `seconds`, or `alone` where nobody
    waits for the next token.
    """

    n_batch: int
    seconds: float = 0.35
    alone: float = 1.0
    tokens_per_s: float | None = None

    def tokens(self, alone: bool) -> int:
        """Tokens of the next step."""
        n = (self.tokens_per_s or 2 * GRID) * (self.alone if alone else self.seconds)
        # Few different sizes: a graph is made for each.
        return next((size for size in _SIZES if size <= min(n, self.n_batch)), _SIZES[-1])

    def took(self, n_tokens: int, seconds: float) -> None:
        """Learn from a step. Few tokens are slower each: they say nothing of many."""
        if n_tokens > FEW and seconds > 0:
            speed = n_tokens / seconds
            self.tokens_per_s = speed if self.tokens_per_s is None else 0.7 * self.tokens_per_s + 0.3 * speed


@dataclass
class _Kept:
    """The beginning of a text, whose keys and values are still there. ids: whose they are."""

    number: int
    ids: list[int]
    n_prompt: int


@dataclass
class Scheduler:
    """Admits tasks, chooses steps, keeps what ended for those that begin alike.

    cells: the engine's table; sequence 0 is left to others. parallel: tasks that run at once, at most.
    deterministic: no task's bits depend on another's, nor on what is kept.
    To be used by one thread. A task is admitted when the cells that it can come to need are there, and not before those
    that came before it.
    """

    cells: CellTable
    parallel: int
    pace: Pace
    deterministic: bool = False
    waiting: deque[Task] = field(default_factory=deque)
    running: list[Task] = field(default_factory=list)
    admitted: deque[Task] = field(default_factory=deque)  # since someone last looked

    def __post_init__(self) -> None:
        self._free = list(range(self.cells.n_sequences - 1, 0, -1))
        self._kept: deque[_Kept] = deque()  # the one that was not used for longest first
        self._decoded_last = self._oldest_last = False
        self._turn = 0

    def add(self, task: Task) -> None:
        """Let a task wait for its turn."""
        self.waiting.append(task)

    def remove(self, task: Task) -> None:
        """A task has ended, or is not wanted any more, wherever it is. What it has in the cache is kept for others."""
        if task.number is None:
            if task in self.waiting:
                self.waiting.remove(task)
            return
        self.running.remove(task)
        # Logits of all positions are computed in another way than those of a text that goes on.
        known = min(task.known, self.cells.length(task.number))  # less after an error, with Mamba blocks
        kept = _Kept(task.number, task.ids[:known], 0 if task.all_logits else task.n_prompt)
        task.number = None
        if self.cells.can_trim:
            for other in [k for k in self._kept if k.ids == kept.ids[: len(k.ids)]]:  # the new one has all of it
                self._forget(other)
        self._kept.append(kept)
        if not kept.ids:
            self._forget(kept)

    def next_step(self) -> Step | None:
        """What to compute now; None where there is nothing to do. After it, tell `done`."""
        self._admit()
        decoding = [task for task in self.running if task.generates]
        prompts = [task for task in self.running if not task.generates]
        if decoding and (not prompts or not self._decoded_last):
            self._decoded_last = True
            return self._decode(decoding)
        self._decoded_last = False
        return self._prompt(prompts, alone=not decoding) if prompts else None

    def done(self, step: Step, seconds: float) -> None:
        """A step was computed, in so many seconds."""
        for part in step.parts:
            part.task.known = part.end
        if not step.decodes:
            self.pace.took(step.n_tokens, seconds)

    def lost(self, step: Step) -> None:
        """A step was not computed: nothing of it is in the cache."""
        for part in step.parts:
            if part.task.number is not None:
                self.cells.trim(part.task.number, part.task.known)

    @property
    def kept_tokens(self) -> int:
        """Tokens of beginnings that are kept; may be asked from any thread."""
        return sum(len(kept.ids) for kept in list(self._kept))

    def _decode(self, tasks: list[Task]) -> Step:
        """One token of each, of so many as have the same bits as alone; the others' turn comes next."""
        n = len(tasks)
        n_steps = -(-n // FEW)
        size = -(-n // n_steps)
        first = self._turn % n_steps * size
        self._turn += 1
        chosen = tasks[first : first + size]
        return Step(tuple(Part(t, t.known, t.known + 1, (0,)) for t in chosen), decodes=True)

    def _prompt(self, tasks: list[Task], alone: bool) -> Step:
        """Pieces of prompts: in turn from the oldest, and from the shortest, so that neither waits for long."""
        self._oldest_last = not self._oldest_last
        order = tasks if self._oldest_last else sorted(tasks, key=lambda task: task.left)
        budget = self.pace.tokens(alone)
        parts: list[Part] = []
        for task in order:
            n = self._piece(task, budget)
            if parts and (n > budget or self.deterministic):
                break
            end = task.known + n
            wanted = range(n) if task.all_logits else ((n - 1,) if end == task.n_prompt else ())
            parts.append(Part(task, task.known, end, wanted))
            budget -= n
            if budget <= FEW:
                break
        return Step(tuple(parts), decodes=False)

    def _piece(self, task: Task, budget: int) -> int:
        """Tokens of a prompt to compute, without leaving a rest that is too small."""
        budget, least = (GRID, GRID) if self.deterministic else (budget, FEW + 1)
        return task.left if task.left < budget + least else budget

    # Admission

    def _admit(self) -> None:
        for task in list(self.waiting):
            if len(self.running) == self.parallel:
                return
            if task.leader and task.leader in self.running and not task.leader.generates:
                continue  # its prompt is the same
            if not self._begin(task):
                return
            self.waiting.remove(task)
            self.running.append(task)
            self.admitted.append(task)

    def _begin(self, task: Task) -> bool:
        """Give a task a sequence and what is known of its beginning, if there is room for all that it can need."""
        if not self._free:
            if not self._kept:
                return False
            self._forget(self._kept[0])
        number = self._free.pop()
        source, n = self._longest(task)
        for shared in (n, 0) if n else (0,):
            if shared:
                self.cells.copy(source, number, shared)
            needs = [(t.number, t.limit - t.known) for t in self.running if t.number is not None]
            if self._make_room([*needs, (number, task.limit - shared)]):
                task.number, task.known, task.cached = number, shared, shared
                return True
            self.cells.trim(number)
        self._free.append(number)
        return False

    def _make_room(self, needs: list[tuple[int, int]]) -> bool:
        """Forget as few beginnings as must be, oldest first; none where even that is not enough."""
        for n in range(len(self._kept) + 1):
            forgotten = list(itertools.islice(self._kept, n))
            if self.cells.fits(needs, [kept.number for kept in forgotten]):
                for kept in forgotten:
                    self._forget(kept)
                return True
        return False

    def _forget(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self.cells.trim(kept.number)
        self._free.append(kept.number)

    def _longest(self, task: Task) -> tuple[int, int]:
        """The sequence that begins as a task does for longest, and how many tokens of it may be taken over: one at
        least is computed, for its logits.
        """
        if not task.shares or task.all_logits:
            return 0, 0
        best, source = 0, 0
        for number, ids, n_prompt in self._known():
            n = min(common(ids, task.ids), task.n_prompt - 1)
            if self.deterministic:
                n = min(n // GRID * GRID, _pieces(n_prompt), _pieces(task.n_prompt))
            n = self.cells.reachable(number, n)
            if n > best:
                best, source = n, number
        for kept in [k for k in self._kept if k.number == source]:
            self._kept.remove(kept)
            self._kept.append(kept)  # used last
        return source, best

    def _known(self) -> Iterator[tuple[int, list[int], int]]:
        """What is in the cache: numbers, ids, and how many of these were computed as a prompt."""
        for task in self.running:
            if task.number is not None:
                yield task.number, task.ids[: task.known], min(task.known, task.n_prompt)
        for kept in self._kept:
            yield kept.number, kept.ids, min(len(kept.ids), kept.n_prompt)


def _pieces(n_prompt: int) -> int:
    """Of a prompt, the tokens in pieces of the usual size, where pieces do not depend on company: all but the last."""
    return max(0, n_prompt // GRID * GRID - GRID)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # halves are compared as lists: in C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
