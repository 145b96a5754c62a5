"""The page at `/`: a fixed table of files that come with the package, and headers that let it do nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {
    "/": "index.html",
    **{
        f"/{name}": name
        for name in (
            *("style.css", "icon.svg", "main.js", "answer.js", "api.js", "dom.js", "markdown.js", "messages.js"),
            *("settings.js", "store.js", "strip.js", "vendor/streaming-markdown.js"),
        )
    },
}
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            *(f"{what}-src 'self'" for what in ("script", "style", "connect")),
            "img-src 'self' data:",
            *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
            # The page makes elements by name and text: it has no use for a policy that turns text into HTML.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    data: bytes
    kind: str
    tag: str


@cache
def _file(name: str) -> _File:
    data = files("runtime.serve").joinpath("web", *name.split("/")).read_bytes()
    kind = _TYPES[name[name.rindex(".") :]]
    return _File(data, kind, f'"{hashlib.sha256(data).hexdigest()[:24]}"')


def page_routes() -> list[Route]:
    """Where the page's files are."""
    return [Route(path, _serve, methods=["GET"], name=f"page {path}") for path in FILES]


async def _serve(request: Request) -> Response:
    file = _file(FILES[request.url.path])
    headers = {**HEADERS, "ETag": file.tag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if file.tag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.data, headers=headers, media_type=file.kind)
