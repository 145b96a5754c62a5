"""/v1/responses: OpenAI's newer form of a chat, as Codex speaks it. Nothing is stored: each request brings its whole
conversation.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.base.arguments import shown
from runtime.serve import wire
from runtime.serve.blocks import Added, Blocks, Change, Closed, blocks_of
from runtime.serve.body import read_object
from runtime.serve.chat import last_figures
from runtime.serve.conversation import Message, normalised
from runtime.serve.errors import failure, wrong
from runtime.serve.fields import RESPONSES, Fields, read_fields
from runtime.serve.front import Front, cancel, merged
from runtime.serve.jobs import End, Job, Piece
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import chat_job, prompt_ids
from runtime.serve.sse import EventStream, event
from runtime.serve.tools import Call, Part, Tools, tools_of

_SKIPPED = ("reasoning", "item_reference", "compaction")  # items that hold nothing for a model of ours


async def responses(front: Front, request: Request) -> Response | ASGIApp:
    """Answer a conversation."""
    state = request.scope["state"]
    body = await read_object(request, front.settings)
    given = read_fields(body, RESPONSES)
    front.check_model(given.get("model"))
    tools = tools_of(given)
    job = await front.prepare(lambda: _job(front, given, state["id"], tools))
    tickets = front.submit(job)
    form = _Form(front, given, body, state["log"], tools)
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    end = (await front.collect(tickets, request.receive))[0].end
    wire.told(state["log"], [end])
    return json_reply(form.whole(end, blocks_of(end.text, tools)))


async def input_tokens(front: Front, request: Request) -> Response:
    """How many tokens a conversation has."""
    given = read_fields(await read_object(request, front.settings), RESPONSES)
    ids = await front.prepare(lambda: prompt_ids(front, _settled(given), messages_of(given), tools_of(given)))
    return json_reply({"object": "response.input_tokens", "input_tokens": len(ids)})


def _job(front: Front, given: Fields, name: str, tools: Tools | None) -> Job:
    return chat_job(front, _settled(given), messages_of(given), name, tools=tools)


def _settled(given: Fields) -> Fields:
    """The fields by the names that chats have. An answer is an item of its own here, so none is continued."""
    settled = {**given, "continue_final_message": False}
    if "max_output_tokens" in given:
        settled["max_tokens"] = given["max_output_tokens"]
    if output := given.get("text", {}).get("format"):
        settled["response_format"] = output
    return settled


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
        one = _message(item, f"input[{i}]")
        if one and one.get("tool_calls") and _goes_on(found):  # a turn of the model is one message
            found[-1] = {**found[-1], "tool_calls": [*(found[-1].get("tool_calls") or ()), *one["tool_calls"]]}
        elif one is not None:
            found.append(one)
    return normalised(found, "input")


def _goes_on(found: Sequence[Any]) -> bool:
    return bool(found) and found[-1].get("role") == "assistant"


def _message(item: Any, where: str) -> dict[str, Any] | None:
    """An item as a message; None where it holds nothing for a model of ours."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        return dict(item)
    if kind == "function_call":
        call = {"name": item.get("name", ""), "arguments": item.get("arguments", "{}")}
        calls = [{"id": item.get("call_id", ""), "type": "function", "function": call}]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id", "")}
    if kind in _SKIPPED:
        return None
    raise wrong(where, f"an item of type {shown(kind)}, expected a message, a function_call or its output")


class _Form:
    """Answers in this form. tools: that may be called."""

    def __init__(
        self, front: Front, given: Fields, body: dict[str, Any], log: dict[str, Any], tools: Tools | None
    ) -> None:
        self.front, self.given, self.log, self.tools = front, given, log, tools
        metadata = body.get("metadata")
        self._ids: list[str] = []
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
            "tool_choice": _choice(given, tools),
            "tools": [{"type": "function", "strict": None, **one} for one in tools.functions] if tools else [],
            "top_p": given.get("top_p", front.settings.sampling.top_p),
            "truncation": "disabled",
            **({"user": body["user"]} if isinstance(body.get("user"), str) else {}),  # never null, by OpenAI's schema
        }

    def begun(self) -> dict[str, Any]:
        """The answer before it has any text."""
        return {**self._base, "status": "in_progress", "error": None, "incomplete_details": None, "output": []}

    def failed(self, message: str) -> dict[str, Any]:
        """The answer that could not be finished."""
        error = {"code": "server_error", "message": message}
        return {**self._base, "status": "failed", "error": error, "incomplete_details": None, "output": []}

    def whole(self, end: End, blocks: Blocks) -> dict[str, Any]:
        """The answer when it has ended; blocks: what it says."""
        cut = _is_cut(end)
        last = len(blocks.found) - 1
        items = [self.item(i, one, cut and i == last) for i, one in enumerate(blocks.found)]
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items,
            "usage": _usage(end),
            **last_figures(self.front, end),
        }

    def id_of(self, i: int) -> str:
        """The name of item `i` of the output."""
        self._ids += [wire.new_id("") for _ in range(i + 1 - len(self._ids))]
        return self._ids[i]

    def item(self, i: int, block: Part, cut: bool = False) -> dict[str, Any]:
        """An item of the output; cut: it was to go on."""
        status = "incomplete" if cut and isinstance(block, str) else "completed"
        if isinstance(block, Call):
            return _call_item(self.id_of(i), block, status)
        return _text_item(self.id_of(i), status, [part(block)])


def _call_item(name: str, call: Call, status: str) -> dict[str, Any]:
    called = {"call_id": call.id, "name": call.name, "arguments": call.arguments}
    return {"type": "function_call", "id": f"fc_{name}", "status": status, **called}


def _text_item(name: str, status: str, content: list[Any]) -> dict[str, Any]:
    return {"type": "message", "id": f"msg_{name}", "status": status, "role": "assistant", "content": content}


def _is_cut(end: End) -> bool:
    return end.reason in ("length", "context")


def _choice(given: Fields, tools: Tools | None) -> Any:
    """How a request's tool_choice is told again."""
    choice = given.get("tool_choice")
    if isinstance(choice, str):
        return choice
    if tools and len(tools.forced) == 1 and isinstance(choice, dict):
        return {"type": "function", "name": tools.forced[0]}
    return "required" if tools and tools.forced else "auto" if tools or not choice else "none"


def part(text: str) -> dict[str, Any]:
    """The one part of a text."""
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
    told, blocks = _Numbered(), Blocks(form.tools)
    try:
        yield told("response.created", response=form.begun())
        yield told("response.in_progress", response=form.begun())
        async for _, one in merged(tickets):
            if isinstance(one, Piece):
                for data in _changed(form, told, blocks.push(one.text)):
                    yield data
            elif isinstance(one, End):
                changes = blocks.end()
                for data in _changed(form, told, changes, _is_cut(one)):
                    yield data
                whole = form.whole(one, blocks)
                wire.told(form.log, [one])
                yield told(f"response.{whole['status']}", response=whole)
    except Exception as error:
        found = failure(error, form.log)
        yield told("error", code=found.code, message=found.message, param=found.param)
        yield told("response.failed", response=form.failed(found.message))
    finally:
        cancel(tickets)


def _changed(form: _Form, told: _Numbered, changes: Sequence[Change], cut: bool = False) -> list[bytes]:
    """The events that tell of items; cut: the last of them was to go on."""
    events = []
    for k, one in enumerate(changes):
        i = one.index
        name, place = form.id_of(i), {"output_index": i}
        if isinstance(one, Closed):
            events += _closed(form, told, one, cut and k == len(changes) - 1)
        elif isinstance(one, Added):
            where = {**place, "item_id": f"msg_{name}", "content_index": 0}
            events.append(told("response.output_text.delta", **where, delta=one.text, logprobs=[]))
        elif one.call:
            item = _call_item(name, replace(one.call, arguments=""), "in_progress")
            events.append(told("response.output_item.added", **place, item=item))
        else:
            item = _text_item(name, "in_progress", [])
            where = {**place, "item_id": item["id"], "content_index": 0}
            events.append(told("response.output_item.added", **place, item=item))
            events.append(told("response.content_part.added", **where, part=part("")))
    return events


def _closed(form: _Form, told: _Numbered, closed: Closed, cut: bool) -> list[bytes]:
    """The events that tell of an item's end. The arguments of a call come in one piece, when it is known to be one."""
    block, place = closed.block, {"output_index": closed.index}
    item = form.item(closed.index, block, cut)
    where = {**place, "item_id": item["id"]}
    if isinstance(block, Call):
        said = [
            told("response.function_call_arguments.delta", **where, delta=block.arguments),
            told("response.function_call_arguments.done", **where, name=block.name, arguments=block.arguments),
        ]
    else:
        where |= {"content_index": 0}
        said = [
            told("response.output_text.done", **where, text=block, logprobs=[]),
            told("response.content_part.done", **where, part=part(block)),
        ]
    return [*said, told("response.output_item.done", **place, item=item)]
