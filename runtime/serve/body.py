"""The JSON object that a request carries: bounded in size and time, unpacked, in any Unicode encoding."""

from __future__ import annotations

import asyncio
import codecs
import json
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from starlette.requests import Request

from runtime.serve.errors import ApiError
from runtime.serve.settings import Settings

_LONG = 1 << 18  # bytes that are parsed in a thread: the event loop goes on meanwhile


class ClientGoneError(Exception):
    """The client has left: nobody is told anything."""


async def read_object(request: Request, settings: Settings) -> dict[str, Any]:
    """The request's JSON object. Raises ApiError where there is none, or it is too large, slow or packed in a way that
    we cannot unpack; ClientGoneError where the client has left.
    """
    raw = await _read(request, settings)
    parse = _parser(request, settings)
    found = await asyncio.to_thread(parse, raw) if len(raw) > _LONG else parse(raw)
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {_kind(found)}, expected a JSON object", code="invalid_json")
    return found


async def _read(request: Request, settings: Settings) -> bytes:
    given = request.headers.get("content-length", "")
    if given.isdigit() and int(given) > settings.max_body:
        raise _too_large(settings)
    try:
        return await asyncio.wait_for(_received(request, settings), settings.body_seconds)
    except asyncio.TimeoutError:
        raise ApiError(
            408, f"the body did not arrive within {settings.body_seconds:g} seconds", headers={"Connection": "close"}
        ) from None


async def _received(request: Request, settings: Settings) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > settings.max_body:
            raise _too_large(settings)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(settings: Settings) -> ApiError:
    text = f"the body is larger than {settings.max_body} bytes"
    return ApiError(413, text, code="body_too_large", headers={"Connection": "close"})


def _parser(request: Request, settings: Settings) -> Callable[[bytes], Any]:
    """What makes an object of the body's bytes, by the request's headers."""
    packed = [word.strip().lower() for word in request.headers.get("content-encoding", "").split(",")]
    unpack = [_unpacker(word) for word in reversed(packed) if word not in ("", "identity")]
    if len(unpack) > 2:
        raise ApiError(415, "the body is packed more than twice")
    charset = _charset(request.headers.get("content-type", ""))

    def parse(raw: bytes) -> Any:
        for step in unpack:
            raw = step(raw, settings.max_body)
            if len(raw) > settings.max_body:
                raise _too_large(settings)
        return _parsed(raw, charset)

    return parse


def _charset(content_type: str) -> str | None:
    """The encoding that a content type names; None for UTF-8, 16 or 32, which JSON tells by itself."""
    for part in content_type.split(";")[1:]:
        name, _, value = part.partition("=")
        if name.strip().lower() == "charset":
            return _known_charset(value.strip().strip("\"'"))
    return None


def _known_charset(name: str) -> str | None:
    try:
        info = codecs.lookup(name)
        b"{}".decode(name)  # what makes no text of bytes is no character set
    except (LookupError, ValueError):
        raise ApiError(415, f"charset {name[:40]!r} is not known, expected utf-8") from None
    return None if info.name.startswith("utf-") else info.name


def _parsed(raw: bytes, charset: str | None) -> Any:
    try:
        text: str | bytes = raw.decode(charset) if charset else raw
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # UnicodeDecodeError, and numbers of thousands of digits, too
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def _unpacker(name: str) -> Callable[[bytes, int], bytes]:
    """A function of the packed bytes and the most that may come out; it gives at least one byte more where there is
    more.
    """
    if name in ("gzip", "x-gzip"):
        return lambda raw, most: _inflated(raw, most, 16 + zlib.MAX_WBITS)
    if name == "deflate":
        return lambda raw, most: _inflated(raw, most, zlib.MAX_WBITS)
    raise ApiError(
        415,
        f"content-encoding {name[:40]!r} is not known here, expected gzip, deflate or none",
        code="unknown_encoding",
        headers={"Accept-Encoding": "gzip, deflate"},
    )


def _inflated(raw: bytes, most: int, window: int) -> bytes:
    unpacker = zlib.decompressobj(window)
    try:
        out = unpacker.decompress(raw, most + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body cannot be unpacked: {error}") from None
    if not unpacker.eof and len(out) <= most:
        raise ApiError(400, "the body cannot be unpacked: it ends too early")
    return out
