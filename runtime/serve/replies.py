"""Answers in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from runtime.serve.errors import ApiError
from runtime.serve.sse import dumped


def json_reply(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that no cache keeps."""
    given = {"Cache-Control": "no-store", **(headers or {})}
    return Response(dumped(values), status, given, "application/json")


def error_reply(error: ApiError, anthropic: bool = False) -> Response:
    """An error in OpenAI's form, or in Anthropic's."""
    body = error.anthropic_body() if anthropic else error.body()
    return json_reply(body, error.status, error.all_headers())
