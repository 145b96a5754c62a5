"""The server in a thread of the tests, on a port of its own: with the real engine, or with answers that a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from runtime.errors import UserError
from runtime.generation import Stats
from runtime.model import Model
from runtime.serve.app import application
from runtime.serve.jobs import End, Event, FullError, Job, Piece, TokenInfo
from runtime.serve.service import Service, Ticket
from runtime.serve.settings import Settings

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('role ' + m.role) }}{% endif %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Script = Callable[[Job], list["Event | UserError | float"]]


@dataclass
class Running:
    """A server that runs. url: without a slash at its end."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop
    server: uvicorn.Server
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(self.url + path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(self.url + path, **({"json": body} if body is not None else {}), **options)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a streamed answer; the last one is "[DONE]"."""
        with self.client() as client, client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return list(parsed(response.iter_lines()))

    def call(self, coroutine: Any) -> Any:
        """Run it in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)


def parsed(lines: Iterator[str]) -> Iterator[Any]:
    for line in lines:
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


@contextlib.contextmanager
def running(service: Service, load: Callable[[], Model], settings: Settings | None = None) -> Iterator[Running]:
    """Serve in a thread until the block ends."""
    ready: list[Running] = []
    wake = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")

        async def main() -> None:
            config = uvicorn.Config(
                application(service, settings or Settings(chat_template=TEMPLATE)),
                log_config=None,
                access_log=False,
                ws="none",
                timeout_graceful_shutdown=5,
            )
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            await service.start(load)
            ready.append(Running(f"http://127.0.0.1:{port}", service, asyncio.get_running_loop(), server))
            wake.set()
            await serving
            await service.close()

        thread.start()
        try:
            assert wake.wait(60)
            yield ready[0]
        finally:
            if ready:
                ready[0].server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


class Scripted(Service):
    """A service without an engine: each job's events are those that `script` makes of it; a number waits so many seconds."""

    def __init__(self, model: Model, script: Script, parallel: int = 4, queue: int = 8) -> None:
        super().__init__(parallel, queue)
        self._given, self._script = model, script
        self.jobs: list[Job] = []
        self.cancelled: list[Job] = []
        self._playing: dict[Ticket, asyncio.Task[None]] = {}

    async def start(self, load: Callable[[], Model]) -> None:
        del load
        self._model, self.state = self._given, "ready"

    def submit(self, *jobs: Job) -> tuple[Ticket, ...]:
        self._check_state()
        if len(self._tickets) + len(jobs) > self.parallel + self.queue:
            raise FullError(len(self._tickets) - self.parallel, self.retry_after)
        tickets = tuple(Ticket(job, self) for job in jobs)
        self.jobs += jobs
        for ticket in tickets:
            ticket.answer = True  # type: ignore[assignment]  # there is something to withdraw
            self._tickets.add(ticket)
            self._playing[ticket] = asyncio.ensure_future(self._play(ticket))
        return tickets

    async def _play(self, ticket: Ticket) -> None:
        for event in self._script(ticket.job):
            if isinstance(event, int | float):
                await asyncio.sleep(event)
            else:
                ticket.put(event)

    def withdraw(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket.job)
        self._playing[ticket].cancel()
        ticket.put(End("cancelled", Stats(), 0, ""))

    def slots(self) -> list[Any]:
        return []

    async def close(self) -> None:
        self.state = "closed"


def piece(text: str, *ids: int) -> Piece:
    return Piece(text, tuple(TokenInfo(i, text.encode()) for i in ids or (1,)))


def end(text: str, reason: str = "eos", tokens: int = 1) -> End:
    return End(reason, Stats(prompt_tokens=3, tokens=tokens), 7, text)
