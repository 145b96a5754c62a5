"""What every endpoint needs: the service, the settings, threads for what would hold up the event loop, and answers as
they come.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from starlette.types import Receive

from runtime.analysis.bytes_read import sparsity_of
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import UserError
from runtime.model import Model
from runtime.serve.body import ClientGoneError
from runtime.serve.errors import ApiError
from runtime.serve.jobs import End, Event, FullError, Job, Piece, PromptTokens, TokenInfo
from runtime.serve.metrics import Metrics
from runtime.serve.service import Service, Ticket
from runtime.serve.settings import Settings
from runtime.serve.sse import disconnected

T = TypeVar("T")
_PREPARING = 2  # threads that render and tokenize


@dataclass
class Collected:
    """An answer that has ended."""

    end: End
    tokens: list[TokenInfo] = field(default_factory=list)
    prompt: tuple[TokenInfo, ...] = ()


class Front:
    """The service as the endpoints see it."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings = service, settings
        self._threads = ThreadPoolExecutor(_PREPARING, "prepare")
        self._preparing = 0
        self.metrics = Metrics(service)
        self._dense: float | None = None
        self._calibrated: list[float] | None = None

    @property
    def model(self) -> Model:
        """The model. Raises UnavailableError before it is loaded."""
        return self.service.model

    @property
    def chat_template(self) -> str | None:
        """The template of chats, if there is one."""
        return self.settings.chat_template or self.model.chat_template

    @property
    def dense_bytes(self) -> float:
        """Bytes that a token reads where every neuron is computed, keys and values left out."""
        if self._dense is None:
            s = self.model.structure
            every = Activity.uniform("dense" if s.layout == "both" else "exact", s.block_count, 1.0)
            self._dense = bytes_per_token(s, self.model.tensors, every).total
        return self._dense

    @property
    def calibrated_shares(self) -> list[float] | None:
        """Share of each layer's neurons that fired on the calibration text, where the file says."""
        if self._calibrated is None:
            self._calibrated = sparsity_of(self.model.file).layer_shares
        return self._calibrated

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, work: Callable[[], T]) -> T:
        """Do `work` in a thread. Raises what it raises, and FullError where too much waits to be done."""
        if self._preparing >= self.service.parallel + self.service.queue:
            raise FullError(self._preparing, 1.0)
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._preparing -= 1

    def check_model(self, name: str | None) -> None:
        """Raise ApiError for the name of another model, where names count."""
        if self.settings.strict_model and name is not None and name not in self.settings.names:
            raise ApiError(
                404,
                f"the model `{name[:80]}` is not here, expected {self.settings.name}",
                "model",
                "model_not_found",
            )

    def submit(self, job: Job, n: int = 1) -> tuple[Ticket, ...]:
        """`n` answers to one prompt, each with a seed of its own. Raises what `Service.submit` raises."""
        most = self.service.parallel + self.service.queue
        if n > most:
            raise ApiError(400, f"n: {n}, expected at most the {most} requests that may wait", "n", "invalid_value")
        seed = job.sampling.seed
        if n == 1 or seed is None:
            return self.service.submit(*[job] * n)
        seeds = [(seed + i) % 0xFFFFFFFF for i in range(n)]
        return self.service.submit(*(replace(job, sampling=replace(job.sampling, seed=s)) for s in seeds))

    def submit_all(self, jobs: Sequence[Job], n: int = 1) -> list[Ticket]:
        """`n` answers to each of several prompts, in order; where one cannot wait, none does."""
        tickets: list[Ticket] = []
        try:
            for job in jobs:
                tickets += self.submit(job, n)
        except BaseException:
            cancel(tickets)
            raise
        return tickets

    async def collect(self, tickets: Sequence[Ticket], receive: Receive) -> list[Collected]:
        """The answers when all have ended. Raises UserError where one fails, ClientGoneError where the client leaves:
        none is computed any further then.
        """
        work = asyncio.gather(*(_collected(ticket) for ticket in tickets))
        gone = asyncio.ensure_future(disconnected(receive))
        either: set[asyncio.Future[Any]] = {work, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGoneError
            return await work
        finally:
            cancel(tickets)
            gone.cancel()
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, UserError):
                await work


async def _collected(ticket: Ticket) -> Collected:
    tokens: list[TokenInfo] = []
    prompt: tuple[TokenInfo, ...] = ()
    async for event in ticket:
        if isinstance(event, Piece):
            tokens += event.tokens
        elif isinstance(event, PromptTokens):
            prompt = event.tokens
        elif isinstance(event, End):
            return Collected(event, tokens, prompt)
    raise AssertionError("an answer without an end")


def cancel(tickets: Iterable[Ticket]) -> None:
    """Nobody wants these any more; those that have ended do not mind."""
    for ticket in tickets:
        ticket.cancel()


async def merged(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several answers, as they come, each with the number of its answer. Raises UserError where one
    fails. What is left when this ends is cancelled.
    """
    arrived: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

    async def forward(i: int, ticket: Ticket) -> None:
        try:
            async for event in ticket:
                arrived.put_nowait((i, event))
        except UserError as error:
            arrived.put_nowait((i, error))

    forwarding = [asyncio.ensure_future(forward(i, ticket)) for i, ticket in enumerate(tickets)]
    left = len(tickets)
    try:
        while left:
            i, event = await arrived.get()
            if isinstance(event, BaseException):
                raise event
            left -= isinstance(event, End)
            yield i, event
    finally:
        cancel(tickets)
        for task in forwarding:
            task.cancel()
