"""The thread that computes what a scheduler says, and hands events to whoever asked."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runtime.base_engine import BaseEngine
from runtime.compute.batch import Batch
from runtime.errors import UserError
from runtime.serve.answers import Answer, Floats
from runtime.serve.jobs import FailedError, UnavailableError
from runtime.serve.scheduler import Part, Scheduler, Step

_LOG = logging.getLogger("lazyneuron.serve")


@dataclass
class Counts:
    """What the loop did since it began. generated_tokens: that decoding computed; answer_tokens: of answers, their
    first ones too, which come with the prompt. batches: steps by their number of tokens, of decoding. times in seconds.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    answer_tokens: int = 0
    generated_seconds: float = 0.0
    steps: int = 0
    busy_total: int = 0
    batches: dict[int, int] = field(default_factory=dict)


class EngineLoop:
    """Owns the scheduler and the answers that it schedules. One thread computes; `submit`, `cancel` and `stop` may be
    called from any other.

    on_death: called where the thread ends by an error that is not one answer's. flush: called after every step, behind
    all that was told in it.
    """

    def __init__(
        self,
        engine: BaseEngine,
        scheduler: Scheduler,
        on_death: Callable[[BaseException], None],
        flush: Callable[[], None],
    ) -> None:
        self.scheduler, self.counts = scheduler, Counts()
        self._engine, self._on_death, self._flush = engine, on_death, flush
        self._answers: dict[int, Answer] = {}  # by id of their tasks, waiting or running
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Let answers wait for their turn."""
        self._post(lambda: self._add(answers))

    def cancel(self, answer: Answer) -> None:
        """Stop computing an answer, wherever it is: after the present step at the latest."""
        self._post(lambda: self._end(answer, "cancelled"))

    def fail_all(self, error: UserError) -> None:
        """End all answers with an error."""
        self._post(lambda: self._fail_all(error))

    def stop(self) -> None:
        """End the thread, after the present step; answers that have not ended fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def running(self) -> list[Answer]:
        """Answers that have a sequence, as of now."""
        return [self._answers[id(task)] for task in list(self.scheduler.running) if id(task) in self._answers]

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_calls()
                step = self._next_step()
                if step:
                    self._compute(step)
                else:
                    self._sleep()
                self._flush()
        except BaseException as error:
            self._lose(UnavailableError("the engine has failed: the server ends"))
            self._on_death(error)
        else:
            self._lose(UnavailableError("the server ends"))

    def _take_calls(self) -> None:
        while True:
            with self._wake:
                if not self._inbox:
                    return
                call = self._inbox.popleft()
            call()

    def _sleep(self) -> None:
        self._flush()
        with self._wake:
            while not self._inbox and not self._stopping:
                self._wake.wait()

    def _lose(self, error: UserError) -> None:
        self._take_calls()
        self._fail_all(error)
        self._flush()

    def _next_step(self) -> Step | None:
        step = self.scheduler.next_step()
        while self.scheduler.admitted:
            task = self.scheduler.admitted.popleft()
            self.counts.cached_tokens += task.cached
            self._answers[id(task)].began()
        return step

    def _compute(self, step: Step) -> None:
        batches = [
            Batch.of(part.task.ids[part.first : part.end], part.first, part.task.number or 0, part.wanted)
            for part in step.parts
        ]
        counters = {p.task.number or 0: self._answers[id(p.task)].counters for p in step.parts} if step.decodes else {}
        started, losses = time.perf_counter(), self._engine.losses
        try:
            logits = self._engine.compute(Batch.together(batches), counters)
        except UserError as error:  # of these answers: others go on
            self.scheduler.lost(step)
            for part in step.parts:
                self._fail(self._answers[id(part.task)], error)
            if self._engine.losses > losses:  # what the others had is lost, too
                for answer in self.running:
                    self._fail(answer, error)
            return
        seconds = time.perf_counter() - started
        self.scheduler.done(step, seconds)
        self._count(step, seconds)
        first = 0
        for part in step.parts:
            rows = logits[first : first + len(part.wanted)]
            first += len(part.wanted)
            self._advance(part, rows, step.n_tokens)

    def _advance(self, part: Part, rows: Floats, n_together: int) -> None:
        answer = self._answers[id(part.task)]
        n_before = answer.n_tokens
        try:
            answer.took(part, rows, n_together)
        except UserError as error:
            self._fail(answer, error)
        except Exception as error:  # a fault of ours, but of this answer alone
            _LOG.exception("an answer failed")
            self._fail(answer, FailedError(error))
        self.counts.answer_tokens += answer.n_tokens - n_before
        if answer.ended:
            self._forget(answer)

    def _count(self, step: Step, seconds: float) -> None:
        counts, n = self.counts, step.n_tokens
        counts.steps += 1
        counts.busy_total += len(step.parts)
        if step.decodes:
            counts.generated_tokens += n
            counts.generated_seconds += seconds
            counts.batches[n] = counts.batches.get(n, 0) + 1
        else:
            counts.prompt_tokens += n
            counts.prompt_seconds += seconds

    def _add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._answers[id(answer.task)] = answer
            self.scheduler.add(answer.task)

    def _end(self, answer: Answer, reason: str) -> None:
        if id(answer.task) in self._answers:
            answer.end(reason)
            self._forget(answer)

    def _fail(self, answer: Answer, error: UserError) -> None:
        answer.fail(error)
        self._forget(answer)

    def _fail_all(self, error: UserError) -> None:
        for answer in list(self._answers.values()):
            self._fail(answer, error)

    def _forget(self, answer: Answer) -> None:
        with contextlib.suppress(KeyError):
            del self._answers[id(answer.task)]
            self.scheduler.remove(answer.task)
