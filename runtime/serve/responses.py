"""/v1/responses: OpenAI's newer form of a chat, as Codex speaks it. Nothing is stored: each request brings its whole
conversation.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.base.arguments import shown
from runtime.serve import wire
from runtime.serve.body import read_object
from runtime.serve.chat import last_figures
from runtime.serve.conversation import Message, normalised
from runtime.serve.errors import failure, wrong
from runtime.serve.fields import RESPONSES, Fields, read_fields
from runtime.serve.front import Front, cancel, merged
from runtime.serve.jobs import End, Job, Piece
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import chat_job, prompt_ids, told_tools
from runtime.serve.sse import EventStream, event

_SKIPPED = ("reasoning", "item_reference", "compaction")  # items that hold nothing for a model of ours


async def responses(front: Front, request: Request) -> Response | ASGIApp:
    """Answer a conversation."""
    state = request.scope["state"]
    body = await read_object(request, front.settings)
    given = read_fields(body, RESPONSES)
    front.check_model(given.get("model"))
    job = await front.prepare(lambda: _job(front, given, state["id"]))
    tickets = front.submit(job)
    form = _Form(front, given, body, state["log"])
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    end = (await front.collect(tickets, request.receive))[0].end
    wire.told(state["log"], [end])
    return json_reply(form.whole(end))


async def input_tokens(front: Front, request: Request) -> Response:
    """How many tokens a conversation has."""
    given = read_fields(await read_object(request, front.settings), RESPONSES)
    ids = await front.prepare(lambda: prompt_ids(front, given, messages_of(given), told_tools(given)))
    return json_reply({"object": "response.input_tokens", "input_tokens": len(ids)})


def _job(front: Front, given: Fields, name: str) -> Job:
    settled = dict(given)
    if "max_output_tokens" in given:
        settled["max_tokens"] = given["max_output_tokens"]
    if output := given.get("text", {}).get("format"):
        settled["response_format"] = output
    return chat_job(front, settled, messages_of(given), name, tools=told_tools(given))


def messages_of(given: Fields) -> list[Message]:
    """A conversation as messages. Raises ApiError for items that are none."""
    found: list[Any] = []
    if given.get("instructions"):
        found.append({"role": "system", "content": given["instructions"]})
    items = given["input"]
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise wrong("input", f"{shown(items)}, expected a text or a list of items")
    for i, item in enumerate(items):
        found += _messages(item, f"input[{i}]")
    return normalised(found, "input")


def _messages(item: Any, where: str) -> list[Any]:
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        return [item]
    if kind == "function_call":
        call = {"name": item.get("name", ""), "arguments": item.get("arguments", "{}")}
        calls = [{"id": item.get("call_id", ""), "type": "function", "function": call}]
        return [{"role": "assistant", "content": None, "tool_calls": calls}]
    if kind == "function_call_output":
        return [{"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id", "")}]
    if kind in _SKIPPED:
        return []
    raise wrong(where, f"an item of type {shown(kind)}, expected a message, a function_call or its output")


class _Form:
    """Answers in this form."""

    def __init__(self, front: Front, given: Fields, body: dict[str, Any], log: dict[str, Any]) -> None:
        self.front, self.given, self.log = front, given, log
        self.item = wire.new_id("msg_")
        metadata = body.get("metadata")
        self._base = {
            "id": wire.new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": front.settings.name,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "metadata": metadata if isinstance(metadata, dict) else {},
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": given.get("temperature", front.settings.sampling.temperature),
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": given.get("top_p", front.settings.sampling.top_p),
            "truncation": "disabled",
            "user": None,
        }

    def begun(self) -> dict[str, Any]:
        """The answer before it has any text."""
        return {**self._base, "status": "in_progress", "error": None, "incomplete_details": None, "output": []}

    def failed(self, message: str) -> dict[str, Any]:
        """The answer that could not be finished."""
        error = {"code": "server_error", "message": message}
        return {**self._base, "status": "failed", "error": error, "incomplete_details": None, "output": []}

    def whole(self, end: End) -> dict[str, Any]:
        """The answer when it has ended."""
        cut = end.reason in ("length", "context")
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self.message(end.text, "incomplete" if cut else "completed")],
            "usage": _usage(end),
            **last_figures(self.front, end),
        }

    def message(self, text: str, status: str) -> dict[str, Any]:
        """The one item of the output."""
        content = [part(text)] if status != "in_progress" else []
        return {"type": "message", "id": self.item, "status": status, "role": "assistant", "content": content}


def part(text: str) -> dict[str, Any]:
    """The one part of that item."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(end: End) -> dict[str, Any]:
    stats = end.stats
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": stats.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": stats.prompt_tokens + stats.tokens,
    }


class _Numbered:
    """Events with their kind and their number."""

    def __init__(self) -> None:
        self._n = 0

    def __call__(self, kind: str, **values: Any) -> bytes:
        """One event."""
        self._n += 1
        return event({"type": kind, "sequence_number": self._n - 1, **values}, kind)


async def _events(form: _Form, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
    told, at = _Numbered(), {"output_index": 0}
    place = {"item_id": form.item, "output_index": 0, "content_index": 0}
    try:
        yield told("response.created", response=form.begun())
        yield told("response.in_progress", response=form.begun())
        yield told("response.output_item.added", **at, item=form.message("", "in_progress"))
        yield told("response.content_part.added", **place, part=part(""))
        async for _, one in merged(tickets):
            if isinstance(one, Piece) and one.text:
                yield told("response.output_text.delta", **place, delta=one.text, logprobs=[])
            elif isinstance(one, End):
                whole = form.whole(one)
                yield told("response.output_text.done", **place, text=one.text, logprobs=[])
                yield told("response.content_part.done", **place, part=part(one.text))
                yield told("response.output_item.done", **at, item=whole["output"][0])
                wire.told(form.log, [one])
                yield told(f"response.{whole['status']}", response=whole)
    except Exception as error:
        found = failure(error, form.log)
        yield told("error", code=found.code, message=found.message, param=found.param)
        yield told("response.failed", response=form.failed(found.message))
    finally:
        cancel(tickets)
