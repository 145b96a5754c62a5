"""The server as a process: where it listens, and how it begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from runtime.errors import UserError
from runtime.model import Model
from runtime.serve.app import application
from runtime.serve.collector import sparing
from runtime.serve.errors import LOG
from runtime.serve.service import Service
from runtime.serve.settings import Settings

_LAST_SECONDS = 5  # for what was sent last to reach those who read slowly
_DEAD_SECONDS = 2.0  # for /health to tell of a dead engine
_LOAD_SECONDS = 1.0  # for a load to come to its end after a signal


@dataclass(frozen=True)
class Listening:
    """Where to listen: hosts and one port of all (0: any that is free), or a Unix socket; drain: seconds that answers
    may still take when the server is to end.
    """

    hosts: tuple[str, ...] = ("127.0.0.1",)
    port: int = 8080
    uds: Path | None = None
    drain: float = 30.0


@dataclass(frozen=True)
class Address:
    """Where a server listens. port: 0 on a Unix socket."""

    host: str
    port: int
    uds: Path | None = None

    def __str__(self) -> str:
        if self.uds:
            return f"unix:{self.uds}"
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


@dataclass(frozen=True)
class Ending:
    """How a server has ended. status: of the process. loading: a thread still loads the model, which nothing can stop:
    the process has to leave without waiting for it, nor for what it uses (`os._exit`).
    """

    status: int
    loading: bool = False


def serve(
    load: Callable[[], Model],
    settings: Settings,
    listening: Listening,
    parallel: int,
    queue: int,
    ready: Callable[[list[Address], Service], None],
) -> Ending:
    """Serve until a signal says to end. The exit status is 0, 1 where the engine has failed, and 128 and the signal's
    number where a second one came.

    It listens while the model is loaded, and calls `ready` when it answers. The first signal lets what was begun end,
    within `listening.drain` seconds; the second ends at once. Raises UserError, `load`'s too.
    """
    with _listeners(listening) as (listeners, addresses), _logging():
        service = Service(parallel, queue)
        return asyncio.run(_serve(listeners, addresses, load, settings, listening.drain, service, ready))


async def _serve(
    listeners: list[socket.socket],
    addresses: list[Address],
    load: Callable[[], Model],
    settings: Settings,
    drain: float,
    service: Service,
    ready: Callable[[list[Address], Service], None],
) -> Ending:
    config = uvicorn.Config(
        application(service, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_keep_alive=75,  # longer than what clients and proxies keep a connection for
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = _Server(config, service, drain)
    serving = asyncio.ensure_future(server.serve(sockets=listeners))
    watching = asyncio.ensure_future(_watched(server, service))
    starting = asyncio.ensure_future(service.start(sparing(load)))
    try:
        await asyncio.wait({starting, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():  # a signal came
            await asyncio.wait({starting}, timeout=_LOAD_SECONDS)
        if not starting.done():
            LOG.info("the model was still being loaded")
            return Ending(server.status, loading=True)
        await starting
        if not server.should_exit:
            ready(addresses, service)
        await serving
    finally:
        server.should_exit = True
        await asyncio.wait({serving})
        watching.cancel()
        starting.cancel()
        await service.close()
    return Ending(1 if service.state == "dead" or service.death else server.status)


async def _watched(server: _Server, service: Service) -> None:
    """End the server when its engine has failed."""
    await service.died.wait()
    LOG.error("the engine has failed: %r", service.death)
    await asyncio.sleep(_DEAD_SECONDS)
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's, but for what a signal does: it goes on answering, with 503 to new requests, until those that were
    begun have ended.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self.status = 0
        self._service, self._drain = service, drain
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Future[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came."""
        self._loop.call_soon_threadsafe(self._end, sig)

    def _end(self, sig: int) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drained())
            return
        self.status = 128 + sig
        self.should_exit = self.force_exit = True

    async def _drained(self) -> None:
        LOG.info("ending: what was begun has %g seconds", self._drain)
        with contextlib.suppress(Exception):
            await self._service.drain(self._drain)
        self.should_exit = True


@contextlib.contextmanager
def _listeners(listening: Listening) -> Iterator[tuple[list[socket.socket], list[Address]]]:
    """Sockets that listen, and their addresses; a Unix socket's file goes with it."""
    if listening.uds is None:
        with contextlib.ExitStack() as opened:
            bound, port = list[socket.socket](), listening.port
            for host in dict.fromkeys(listening.hosts):
                bound.append(opened.enter_context(_tcp(host, port, len(listening.hosts) > 1)))
                port = bound[0].getsockname()[1]  # of the others, too, where any will do
            yield bound, [Address(*one.getsockname()[:2]) for one in bound]
        return
    unix = _unix(listening.uds)
    try:
        with unix:
            yield [unix], [Address("", 0, listening.uds)]
    finally:
        with contextlib.suppress(OSError):
            listening.uds.unlink()


def _tcp(host: str, port: int, among_others: bool) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror or error}, expected an address of this machine") from None
    family, kind, proto, _, address = found[0]
    bound = socket.socket(family, kind, proto)
    try:
        if sys.platform != "win32":  # where it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and among_others:  # :: would take 0.0.0.0, too
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UserError(f"{host}:{port}: {error.strerror}", "choose another with --port, or --port 0") from None
    return bound


def _unix(path: Path) -> socket.socket:
    if not hasattr(socket, "AF_UNIX"):
        raise UserError("--uds: this system has no Unix sockets", "use --host and --port")
    bound = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        bound.bind(os.fspath(path))
        path.chmod(0o660)  # its owner and group: a proxy runs as another user
    except OSError as error:
        bound.close()
        raise UserError(f"--uds {path}: {error.strerror or error}", "choose another path") from None
    return bound


def _remove_stale(path: Path) -> None:
    """Remove what a server has left that was killed. Raises UserError where one listens."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return  # binding fails, and says so
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise UserError(f"--uds {path}: another server listens there", "choose another path")


@contextlib.contextmanager
def _logging() -> Iterator[None]:
    """Lines of the log on stderr, uvicorn's warnings among them."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = {LOG: logging.INFO, logging.getLogger("uvicorn"): logging.WARNING}
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
