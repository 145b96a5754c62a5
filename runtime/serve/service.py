"""The asyncio side of the engine: takes jobs, gives tickets, and says how it is."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from runtime.compute.kv_cache import MAX_SEQUENCES
from runtime.compute.paging import PagedStats
from runtime.compute.traffic import BytesRead
from runtime.errors import UserError
from runtime.model import Model
from runtime.model_file.frequencies import frequencies
from runtime.serve.answers import Answer, Served
from runtime.serve.engine_loop import Counts, EngineLoop
from runtime.serve.jobs import End, Event, FullError, Job, Progress, PromptTooLongError, UnavailableError
from runtime.serve.scheduler import Pace, Scheduler

State = Literal["loading", "ready", "draining", "dead", "closed"]
MOST_PARALLEL = MAX_SEQUENCES // 2
_USUAL_SECONDS = 5.0  # of an answer, before one has ended


class Ticket:
    """An answer that was asked for: its events, as they come. An asynchronous iterator, for one reader.

    Raises UserError where the answer fails. job: what was asked for; asked: when (`time.perf_counter`). began, first,
    latest: when it was admitted, and when its first and latest tokens came; None before.
    """

    def __init__(self, job: Job, service: Service) -> None:
        self.job, self._service = job, service
        self.asked = time.perf_counter()
        self.began: float | None = None
        self.done = asyncio.Event()
        self._events: deque[Event | UserError] = deque()
        self._more = asyncio.Event()
        self._ended = False  # the last event was read
        self.answer: Answer | None = None

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._more.clear()
            await self._more.wait()
        event = self._events.popleft()
        if isinstance(event, UserError):
            self._ended = True
            raise event
        self._ended = isinstance(event, End)
        return event

    def cancel(self) -> None:
        """Nobody wants it any more: it stops after the step that is being computed, at the latest. Does no harm where
        it has ended.
        """
        if self.answer and not self.done.is_set():
            self._service.withdraw(self)

    def put(self, event: Event | UserError) -> None:
        """An event; on the loop's thread."""
        if self.done.is_set():
            return
        if isinstance(event, Progress) and self.began is None:
            self.began = time.perf_counter()
        self._events.append(event)
        if isinstance(event, End | UserError):
            self.done.set()
            self.answer = None  # it tells this ticket: Python would have to look for the circle
            self._service.ended(self, event)
        self._more.set()


@dataclass(frozen=True)
class Slot:
    """An answer that has its place in the engine. n_cached: tokens of its prompt that were reused."""

    number: int
    name: str
    n_prompt: int
    n_cached: int
    n_known: int
    n_tokens: int
    generates: bool
    max_tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Figures:
    """How a service is doing. ended: answers by the reason of their end, "error" among them; seconds: mean time of an
    answer. paged: what was read from the file while computing, None without a budget of main memory.
    """

    counts: Counts
    running: int
    waiting: int
    cells: int
    cells_used: int
    kept_tokens: int
    ended: dict[str, int]
    computed_share: float
    layer_shares: list[float]
    paged: PagedStats | None = None


class Service:
    """A model that answers many at once.

    parallel: answers that are computed at once, at most; queue: that may wait beside them. Where the model is run so
    (`RunOptions.deterministic`), an answer's bits do not depend on company, nor on what is kept (docs/serve.md).
    To be used in one event loop: make it, `await start(load)`, `submit`, `await drain(seconds)`, `await close()`.
    """

    def __init__(self, parallel: int = 4, queue: int = 64) -> None:
        self.parallel, self.queue = parallel, queue
        self.state: State = "loading"
        self.started = time.time()
        self.death: BaseException | None = None
        self.died = asyncio.Event()
        self.on_end: Callable[[Ticket, End | UserError], None] = lambda _ticket, _event: None
        self._model: Model | None = None
        self._tickets: set[Ticket] = set()
        self._ended: dict[str, int] = {}
        self._seconds = _USUAL_SECONDS
        self._told: deque[tuple[Ticket, Event | UserError]] = deque()

    async def start(self, load: Callable[[], Model]) -> None:
        """Load the model, in a thread, and begin to answer. Raises what `load` raises. Where this is cancelled the
        thread goes on, since nothing can stop it; what it has loaded then is freed.
        """
        self._loop = asyncio.get_running_loop()
        model = await _in_thread(load)
        engine = model.engine
        file = model.file
        usual = {i: frequencies(file, i)[::8] for i in model.structure.ffns}
        read = BytesRead(model.structure, file.tensors, engine.options.deciding.ffn, usual)
        self._served = Served(engine, model.tokenizer, read)
        pace = Pace(min(engine.options.n_batch, model.n_ctx))
        scheduler = Scheduler(engine.cells, self.parallel, pace, engine.options.deterministic)
        self._engine_loop = EngineLoop(engine, scheduler, self._die, self._flush)
        self._engine_loop.start()
        self._model, self.state = model, "ready"

    @property
    def model(self) -> Model:
        """The model. Raises UnavailableError before it is loaded."""
        if self._model is None:
            raise UnavailableError("the model is being loaded", "try again later")
        return self._model

    @property
    def n_ctx(self) -> int:
        """Tokens of one request, prompt and answer together, at most."""
        return self.model.n_ctx

    def submit(self, *jobs: Job) -> tuple[Ticket, ...]:
        """Ask for answers; of several, which have the same prompt, it is computed once.

        Raises UnavailableError where none are taken, FullError where too many wait, and PromptTooLongError.
        """
        self._check_state()
        for job in jobs:
            if len(job.prompt) >= self.n_ctx:
                raise PromptTooLongError(len(job.prompt), self.n_ctx)
            if not job.prompt:
                raise UserError("the prompt has no tokens", "give some text")
        if len(self._tickets) + len(jobs) > self.parallel + self.queue:
            raise FullError(len(self._tickets) - self.parallel, self.retry_after)
        tickets = tuple(Ticket(job, self) for job in jobs)
        answers: list[Answer] = []
        for ticket in tickets:
            first = answers[0] if answers else None
            ticket.answer = Answer(ticket.job, self._served, self._teller(ticket), first)
            answers.append(ticket.answer)
        self._tickets.update(tickets)
        self._engine_loop.submit(answers)
        return tickets

    @property
    def retry_after(self) -> float:
        """Seconds until one that waits now is likely to be taken."""
        waiting = max(1, len(self._tickets) - self.parallel)
        return max(1.0, self._seconds * waiting / self.parallel)

    def withdraw(self, ticket: Ticket) -> None:
        """Stop computing what a ticket asks for."""
        if ticket.answer and self.state != "dead":
            self._engine_loop.cancel(ticket.answer)

    def ended(self, ticket: Ticket, event: End | UserError) -> None:
        """A ticket has its last event."""
        self._tickets.discard(ticket)
        reason = event.reason if isinstance(event, End) else "error"
        self._ended[reason] = self._ended.get(reason, 0) + 1
        if ticket.began is not None and reason != "cancelled":
            self._seconds += 0.1 * (time.perf_counter() - ticket.began - self._seconds)
        self.on_end(ticket, event)

    def slots(self) -> list[Slot]:
        """The answers that are being computed."""
        now, found = time.perf_counter(), []
        for answer in self._engine_loop.running if self._model else []:
            task = answer.task
            values = (task.number or 0, answer.job.name, task.n_prompt, task.cached, task.known, answer.n_tokens)
            found.append(Slot(*values, task.generates, answer.job.max_tokens, now - answer.asked))
        return found

    def figures(self) -> Figures:
        """How it is doing, as of now."""
        engine, scheduler = self.model.engine, self._engine_loop.scheduler
        shares = engine.counters.layer_shares()
        neurons = [block.n_reached for block in self.model.structure.blocks]
        share = sum(s * n for s, n in zip(shares, neurons, strict=True)) / max(1, sum(neurons))
        counts = self._engine_loop.counts  # which the other thread goes on changing
        return Figures(
            replace(counts, batches=dict(counts.batches)),
            len(scheduler.running),
            len(self._tickets) - len(scheduler.running),
            engine.cells.n_cells,
            engine.cells.n_used,
            scheduler.kept_tokens,
            dict(self._ended),
            share if self._engine_loop.counts.steps else 0.0,
            shares,
            engine.paged(),
        )

    async def drain(self, seconds: float) -> None:
        """Take no more; let what was taken end within so many seconds, and end the rest with an error."""
        if self.state == "ready":
            self.state = "draining"
        waits = [asyncio.ensure_future(ticket.done.wait()) for ticket in self._tickets]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for wait in late:
                wait.cancel()
        if self._tickets and self._model:
            self._engine_loop.fail_all(UnavailableError("the server ends"))
            await self._all_done(self._tickets)

    async def close(self) -> None:
        """Stop computing, and free the model."""
        if self._model and self.state != "closed":
            self.state = "closed"
            await asyncio.to_thread(self._engine_loop.stop)
            await asyncio.sleep(0)  # what was told last is put into tickets first
            await asyncio.to_thread(self._model.close)

    async def _all_done(self, tickets: Iterable[Ticket]) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(ticket.done.wait() for ticket in list(tickets))), 60)

    def _check_state(self) -> None:
        if self.state == "ready":
            return
        why = {"loading": "the model is being loaded", "dead": "the engine has failed"}
        raise UnavailableError(why.get(self.state, "the server ends"), "try again later")

    def _teller(self, ticket: Ticket) -> Callable[[Event | UserError], None]:
        return lambda event: self._told.append((ticket, event))

    def _flush(self) -> None:
        """On the computing thread: wake the event loop once for all that was told in a step."""
        if self._told:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._put)

    def _put(self) -> None:
        while self._told:
            ticket, event = self._told.popleft()
            ticket.put(event)

    def _die(self, error: BaseException) -> None:
        def dead() -> None:
            self.death, self.state = error, "dead"
            self.died.set()

        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(dead)


async def _in_thread(load: Callable[[], Model]) -> Model:
    """What `load` gives, from a thread for which nothing waits when the process ends."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Model] = loop.create_future()

    def tell(model: Model | None, error: BaseException | None) -> None:
        if loaded.cancelled():
            if model:
                model.close()
        elif error:
            loaded.set_exception(error)
        elif model:
            loaded.set_result(model)

    def run() -> None:
        model, failure = None, None
        try:
            model = load()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop was closed: the process ends
            loop.call_soon_threadsafe(tell, model, failure)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await loaded
