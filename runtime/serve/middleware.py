"""What surrounds every request: its name and its line in the log, whom the server answers to, and its errors.

Plain ASGI, in the order in which a request meets them: `Named`, `Guarded`, then the endpoints.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.errors import printable
from runtime.serve import wire
from runtime.serve.errors import LOG, ApiError
from runtime.serve.replies import error_reply
from runtime.serve.settings import Settings

_NAME = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
_QUIET = ("/health", "/v1/health", "/metrics", "/slots")  # asked every few seconds: not logged while all is well
_SAFE = ("GET", "HEAD", "OPTIONS")
_LOCAL = (".localhost", ".local", ".internal")


class Named:
    """Gives each request a name (its X-Request-Id, or a new one), which the answer carries, a tidy path, and a line in
    the log when it has ended. What the line says beside is put into `scope["state"]["log"]`.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _NAME.fullmatch(given) else wire.new_id("req_")
        state = scope.setdefault("state", {})
        state["id"], state["log"] = name, {}
        scope["path"] = tidy(scope["path"])
        status, began = 499, time.perf_counter()  # 499: the client left before the answer

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["X-Request-Id"] = name
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            _log(scope, name, status, time.perf_counter() - began)


def tidy(path: str) -> str:
    """A path with single slashes and none at its end: clients join addresses carelessly."""
    return re.sub("//+", "/", path).rstrip("/") or "/"


def _log(scope: Scope, name: str, status: int, seconds: float) -> None:
    quiet = scope["path"] in _QUIET and status < 500
    told = "".join(f" {key}={value}" for key, value in scope["state"]["log"].items())
    path = printable(scope["path"])[:100].replace("\n", "\ufffd").replace("\t", "\ufffd")
    level = logging.DEBUG if quiet else logging.INFO
    LOG.log(level, "%s %s %s %d %.3fs%s", name, scope["method"], path, status, seconds, told)


class Guarded:
    """Answers only those who call the server by a name of its own, from its own page or one that is allowed, and with
    a key, where there is one. public: paths that need no key. methods: those of a path.

    A web page of anybody's can make a browser send requests to this machine, and can point a name of its own at it.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, public: Iterable[str], methods: Callable[[Scope], Iterable[str]]
    ) -> None:
        self._app, self._settings, self._public, self._methods = app, settings, frozenset(public), methods
        self._keys = [_digest(key) for key in settings.keys]
        self._hosts = {name.lower() for name in (*settings.hosts, socket.gethostname())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = self._allowed_origin(headers)
        try:
            self._check(scope, headers, bool(allowed))
        except ApiError as error:
            await error_reply(error)(scope, receive, _with_cors(send, allowed))
            return
        if scope["method"] == "OPTIONS":
            await _preflight(headers, allowed, self._methods(scope))(scope, receive, send)
            return
        await self._app(scope, receive, _with_cors(send, allowed))

    def _allowed_origin(self, headers: Headers) -> str:
        """The origin of the page that asks, where the operator has allowed it; "" otherwise."""
        origin, allowed = headers.get("origin", ""), self._settings.cors_origins
        return origin if origin and ("*" in allowed or origin in allowed) else ""

    def _check(self, scope: Scope, headers: Headers, from_allowed: bool) -> None:
        host = headers.get("host", "")
        if not self.is_own(host):
            raise ApiError(
                403,
                f"this server is not called {printable(host)[:100]!r} (start it with --allowed-host NAME)",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if scope["method"] not in _SAFE and origin is not None and not from_allowed and not _same(origin, host):
            raise ApiError(
                403,
                f"pages of {printable(origin)[:100]!r} may not use this server (start it with --cors-origin ORIGIN)",
                code="origin_not_allowed",
            )
        if self._keys and scope["path"] not in self._public and scope["method"] != "OPTIONS":
            self._check_key(headers)

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server: by an address, as localhost, by a name of this machine or of the
        local network, or by one that the operator gave. Names that anybody may own are refused.
        """
        if not host or "*" in self._hosts:  # HTTP/1.0, which no browser speaks, has none
            return True
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts or "." not in name or name.endswith(_LOCAL)
        return True

    def _check_key(self, headers: Headers) -> None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        if not sum(hmac.compare_digest(digest, key) for key in self._keys):  # all of them, whichever fits
            message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _same(origin: str, host: str) -> bool:
    """Whether a page's origin is this server itself; a proxy in front of it may have changed the scheme."""
    try:
        parts = urlsplit(origin)
        default = {"http": ":80", "https": ":443"}.get(parts.scheme)
    except ValueError:
        return False
    if default is None:
        return False
    return parts.netloc.lower().removesuffix(default) == host.lower().removesuffix(default)


def _with_cors(send: Send, origin: str) -> Send:
    """Let pages of an allowed origin read the answer."""
    if not origin:
        return send

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
            headers.add_vary_header("Origin")
        await send(message)

    return sending


def _preflight(headers: Headers, origin: str, methods: Iterable[str]) -> Response:
    """The answer to OPTIONS, which browsers send without keys; methods: of the path."""
    found = {"Allow": ", ".join([*sorted(methods), "OPTIONS"])}
    if origin:
        asked = headers.get("access-control-request-headers", "")
        found |= {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }
        if re.fullmatch(r"[\w\-, ]{1,1000}", asked, re.ASCII):
            found["Access-Control-Allow-Headers"] = asked
    return Response(status_code=204, headers=found)
