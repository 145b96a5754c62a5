"""/v1/messages: Anthropic's form of a chat, as Claude Code speaks it, and its counting of tokens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.base.arguments import shown
from runtime.serve import wire
from runtime.serve.blocks import Added, Blocks, Change, Opened, blocks_of
from runtime.serve.body import read_object
from runtime.serve.chat import finished, last_figures
from runtime.serve.conversation import Message, normalised, text_of
from runtime.serve.errors import failure, wrong
from runtime.serve.fields import ANTHROPIC, Fields, read_fields
from runtime.serve.front import Front, cancel, merged
from runtime.serve.jobs import End, Job, Piece
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import chat_job, prompt_ids
from runtime.serve.sse import EventStream, event
from runtime.serve.tools import Call, Part, Tools, tools_of

_REASONS = {"eos": "end_turn", "stop": "stop_sequence", "length": "max_tokens"}
_SKIPPED = ("thinking", "redacted_thinking")


async def messages(front: Front, request: Request) -> Response | ASGIApp:
    """Answer a conversation."""
    state = request.scope["state"]
    given = read_fields(await read_object(request, front.settings), ANTHROPIC)
    front.check_model(given.get("model"))
    if "max_tokens" not in given:
        raise wrong("max_tokens", "is missing")
    tools = tools_of(given)
    job = await front.prepare(lambda: _job(front, given, state["id"], tools))
    tickets = front.submit(job)
    form = _Form(front, state["log"], len(job.prompt), tools)
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    end = (await front.collect(tickets, request.receive))[0].end
    wire.told(state["log"], [end])
    return json_reply(form.whole(end))


async def count_tokens(front: Front, request: Request) -> Response:
    """How many tokens a conversation has."""
    given = read_fields(await read_object(request, front.settings), ANTHROPIC)
    ids = await front.prepare(lambda: prompt_ids(front, given, messages_of(given), tools_of(given)))
    return json_reply({"input_tokens": len(ids)})


def _job(front: Front, given: Fields, name: str, tools: Tools | None) -> Job:
    settled = {**given, "stop": given.get("stop_sequences", ())}
    return chat_job(front, settled, messages_of(given), name, tools=tools)


def messages_of(given: Fields) -> list[Message]:
    """A conversation as messages of the other form. Raises ApiError for blocks that no model of ours understands."""
    found: list[Any] = []
    if system := text_of(given.get("system"), "system"):
        found.append({"role": "system", "content": system})
    for i, message in enumerate(given["messages"]):
        content = message.get("content")
        if isinstance(content, list):
            found += _split(message, content, f"messages[{i}]")
        else:
            found.append(message)
    return normalised(found)


def _split(message: dict[str, Any], content: list[Any], where: str) -> list[Any]:
    """The blocks of a message: results of tools come first, as messages of their own."""
    texts, calls, results = [], [], []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(block)
        elif kind == "tool_use":
            call = {"name": block.get("name", ""), "arguments": block.get("input", {})}
            calls.append({"id": block.get("id", ""), "type": "function", "function": call})
        elif kind == "tool_result":
            told = text_of(block.get("content"), f"{where}.content[{i}].content")
            results.append({"role": "tool", "content": told, "tool_call_id": block.get("tool_use_id", "")})
        elif kind not in _SKIPPED:
            raise wrong(f"{where}.content[{i}]", f"a block of type {shown(kind)}, expected text")
    rest = {"role": message.get("role"), "content": texts, "tool_calls": calls}
    return [*results, rest] if texts or calls or not results else results


class _Form:
    """Answers in this form. n_prompt: tokens of the prompt; tools: that may be called."""

    def __init__(self, front: Front, log: dict[str, Any], n_prompt: int, tools: Tools | None) -> None:
        self.front, self.log, self.tools, self._n_prompt = front, log, tools, n_prompt
        name = front.settings.name
        self._base = {"id": wire.new_id("msg_"), "type": "message", "role": "assistant", "model": name}

    def begun(self) -> dict[str, Any]:
        """The answer before it has any text."""
        usage = {**_usage(self._n_prompt, 0, 0)}
        return {**self._base, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def whole(self, end: End) -> dict[str, Any]:
        """The answer when it has ended."""
        stats, blocks = end.stats, blocks_of(end.text, self.tools)
        return {
            **self._base,
            "content": [block_of(one) for one in blocks.found],
            **stopped(end, blocks.calls),
            "usage": _usage(stats.prompt_tokens, stats.cached_tokens, stats.tokens),
            **last_figures(self.front, end),
        }


def block_of(part: Part) -> dict[str, Any]:
    """A text, or a call, as a block of the content."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    arguments = json.loads(part.arguments)
    return {"type": "tool_use", "id": _call_id(part), "name": part.name, "input": arguments}


def _call_id(call: Call) -> str:
    return "toolu_" + call.id.removeprefix("call_")


def stopped(end: End, calls: Sequence[Call]) -> dict[str, Any]:
    """Why an answer ended, in Anthropic's words."""
    if finished(end, calls) == "tool_calls":
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reason = _REASONS.get(end.reason, "model_context_window_exceeded")
    return {"stop_reason": reason, "stop_sequence": end.stop}


def _usage(prompt: int, cached: int, output: int) -> dict[str, int]:
    """Tokens; here those that were reused are counted apart."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output,
    }


async def _events(form: _Form, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
    blocks = Blocks(form.tools)
    try:
        yield _told("message_start", message=form.begun())
        async for _, one in merged(tickets):
            if isinstance(one, Piece):
                for data in _changed(blocks.push(one.text)):
                    yield data
            elif isinstance(one, End):
                for data in _changed(blocks.end()):
                    yield data
                stats = one.stats
                usage = _usage(stats.prompt_tokens, stats.cached_tokens, stats.tokens)
                figures = last_figures(form.front, one)
                yield _told("message_delta", delta=stopped(one, blocks.calls), usage=usage, **figures)
                wire.told(form.log, [one])
                yield _told("message_stop")
    except Exception as error:
        yield event(failure(error, form.log).anthropic_body(), "error")
    finally:
        cancel(tickets)


def _told(kind: str, **values: Any) -> bytes:
    return event({"type": kind, **values}, kind)


def _changed(changes: Sequence[Change]) -> list[bytes]:
    """The events that tell of blocks. The arguments of a call come in one piece, when it is known to be one."""
    events = []
    for one in changes:
        at = one.index
        if isinstance(one, Opened):
            block = block_of(one.call or "") | ({"input": {}} if one.call else {})
            events.append(_told("content_block_start", index=at, content_block=block))
            if one.call:
                delta = {"type": "input_json_delta", "partial_json": one.call.arguments}
                events.append(_told("content_block_delta", index=at, delta=delta))
        elif isinstance(one, Added):
            delta = {"type": "text_delta", "text": one.text}
            events.append(_told("content_block_delta", index=at, delta=delta))
        else:
            events.append(_told("content_block_stop", index=at))
    return events
