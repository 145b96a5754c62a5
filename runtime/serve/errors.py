"""Errors as clients know them: a status, a type, the field that is wrong, and whether to try again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import UserError, printable
from runtime.serve.jobs import FailedError, FullError, PromptTooLongError, UnavailableError

LOG = logging.getLogger("lazyneuron.serve")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


@dataclass
class ApiError(Exception):
    """What a client is told in place of an answer.

    status: of HTTP. param: the field that is wrong. code: a word for programs. more: keys beside these in the error.
    retry: seconds after which to try again, None where that is of no use.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    retry: float | None = None

    @property
    def type(self) -> str:
        """The kind of error, in the words that OpenAI and llama.cpp use."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        error = {"message": printable(self.message), "type": self.type, "param": self.param, "code": self.code}
        return {"error": {**error, **self.more}}

    def anthropic_body(self) -> dict[str, Any]:
        """The error in Anthropic's form."""
        names = {503: "overloaded_error", 500: "api_error", 413: "request_too_large"}
        kind = names.get(self.status, self.type)
        return {"type": "error", "error": {"type": kind, "message": printable(self.message), **self.more}}

    def all_headers(self) -> dict[str, str]:
        """Headers of the answer: openai's clients try again where they are not told otherwise."""
        headers = {"x-should-retry": "true" if self.retry is not None else "false", **self.headers}
        if self.retry is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry)))
        return headers


def wrong(param: str, message: str) -> ApiError:
    """A 400 for a field: its name stands in `param`."""
    return ApiError(400, f"{param}: {message}", param, "invalid_value")


def api_error(error: Exception) -> ApiError:
    """Any exception as what a client is told. A bug of ours tells nothing of itself: it belongs into the log."""
    if isinstance(error, ApiError):
        return error
    if not isinstance(error, UserError):
        return ApiError(500, "the server has a bug here; its log says more", None, "internal_error")
    status, code, retry, more = 400, "invalid_value", None, {}
    if isinstance(error, PromptTooLongError):
        code, more = "context_length_exceeded", {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
    elif isinstance(error, FullError):
        status, code, retry = 429, "queue_full", error.seconds
    elif isinstance(error, UnavailableError):
        status, code, retry = 503, "unavailable", 1.0
    elif isinstance(error, FailedError):
        status, code = 500, "answer_failed"
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return ApiError(status, message, None, code, more, retry=retry)


def failure(error: Exception, log: dict[str, Any]) -> ApiError:
    """As `api_error`, with a word in the request's line of the log, and a traceback there for a bug of ours."""
    found = api_error(error)
    log["error"] = found.code or found.type
    if not isinstance(error, ApiError | UserError):
        LOG.error("a bug", exc_info=error)
    return found
