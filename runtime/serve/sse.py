"""Server-sent events: an answer in pieces, with comments while there is nothing to say."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
PING = b": still here\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the events
}


def dumped(values: Any) -> bytes:
    """JSON in UTF-8; halves of surrogate pairs, which clients can spell, become `?`."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def event(values: Mapping[str, Any], name: str = "") -> bytes:
    """One event; name: its kind, where a protocol has several."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + dumped(values) + b"\n\n"


class EventStream:
    """An answer of events, as an ASGI application.

    The headers go out at once, a comment after every `ping` seconds of silence. A client that leaves ends `events`,
    whatever it waits for. One that does not read stops nobody: only this coroutine waits for it.
    """

    def __init__(self, events: AsyncIterator[bytes], ping: float, headers: Mapping[str, str] | None = None) -> None:
        self._events, self._ping, self._headers = events, ping, {**HEADERS, **(headers or {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not writing.done():
                writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    async def _write(self, send: Send) -> None:
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for data in with_pings(self._events, self._ping):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        finally:
            await _closed(self._events)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def disconnected(receive: Receive) -> None:
    """Return when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def with_pings(events: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """`events`, and a comment after every so many seconds without one; 0 for none."""
    waiting: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(_next(events))
            while seconds and not (await asyncio.wait({waiting}, timeout=seconds))[0]:
                yield PING
            data = await waiting
            if data is None:
                return
            yield data
    finally:
        if waiting and not waiting.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


async def _closed(events: AsyncIterator[bytes]) -> None:
    """End a generator that may not have come to its end."""
    if close := getattr(events, "aclose", None):
        await close()
