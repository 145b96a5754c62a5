"""The server's web application: its endpoints, and what surrounds them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.serve import chat, completions, llama_completion, messages, models, native, openapi, responses
from runtime.serve.body import ClientGoneError
from runtime.serve.errors import ApiError, failure
from runtime.serve.front import Front
from runtime.serve.middleware import Guarded, Named
from runtime.serve.page import FILES, page_routes
from runtime.serve.replies import error_reply
from runtime.serve.service import Service
from runtime.serve.settings import Settings

Endpoint = Callable[[Front, Request], Awaitable["Response | ASGIApp"]]
PUBLIC: tuple[str, ...] = ("/health", "/v1/health")  # paths that need no key


@dataclass(frozen=True)
class Place:
    """Where an endpoint is found. anthropic: its errors have Anthropic's form."""

    method: str
    paths: tuple[str, ...]
    endpoint: Endpoint
    anthropic: bool = False


PLACES: tuple[Place, ...] = (
    Place("POST", ("/v1/chat/completions", "/chat/completions"), chat.chat),
    Place("POST", ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens"), chat.input_tokens),
    Place("POST", ("/v1/completions", "/completions"), completions.completions),
    Place("POST", ("/completion",), llama_completion.completion),
    Place("GET", ("/v1/models", "/models"), models.models),
    Place("GET", ("/v1/models/{name:path}", "/models/{name:path}"), models.model),
    Place("GET", ("/health", "/v1/health"), native.health),
    Place("GET", ("/props",), native.props),
    Place("GET", ("/slots",), native.slots),
    Place("POST", ("/tokenize",), native.tokenize),
    Place("POST", ("/detokenize",), native.detokenize),
    Place("POST", ("/apply-template",), native.apply_template),
    Place("GET", ("/metrics",), native.metrics),
    Place("POST", ("/v1/responses", "/responses"), responses.responses),
    Place("POST", ("/v1/responses/input_tokens", "/responses/input_tokens"), responses.input_tokens),
    Place("POST", ("/v1/messages",), messages.messages, anthropic=True),
    Place("POST", ("/v1/messages/count_tokens",), messages.count_tokens, anthropic=True),
    Place("GET", ("/openapi.json",), openapi.openapi),
)


class _Answering:
    """An endpoint as an ASGI application: what it raises becomes an answer."""

    def __init__(self, place: Place, front: Front) -> None:
        self._place, self._front = place, front

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        response: Response | ASGIApp
        try:
            response = await self._place.endpoint(self._front, Request(scope, receive))
        except ClientGoneError:
            return
        except Exception as error:
            response = error_reply(failure(error, scope["state"]["log"]), self._place.anthropic)
        await response(scope, receive, send)


def application(service: Service, settings: Settings) -> ASGIApp:
    """The application in front of a service. What it started ends with its lifespan; the service does not."""
    front = Front(service, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        front.close()

    routes = [Route(path, _Answering(place, front), methods=[place.method]) for place in PLACES for path in place.paths]
    public: tuple[str, ...] = PUBLIC
    if settings.page:
        routes, public = [*routes, *page_routes()], (*public, *FILES)
    handlers = {HTTPException: _http_error}
    inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    inner.router.redirect_slashes = False
    return Named(Guarded(inner, settings, public, functools.partial(_methods, routes)))


def _methods(routes: Sequence[Route], scope: Scope) -> set[str]:
    """The methods of a path; none where there is nothing."""
    found = [route.methods or () for route in routes if route.matches(scope)[0] is not Match.NONE]
    return set().union(*found)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    messages = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not for this path"}
    message = messages.get(error.status_code, error.detail)
    return error_reply(ApiError(error.status_code, message, headers=error.headers or {}))
