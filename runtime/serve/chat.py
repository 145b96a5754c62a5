"""/v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.serve import wire
from runtime.serve.body import read_object
from runtime.serve.conversation import normalised
from runtime.serve.errors import failure, wrong
from runtime.serve.fields import CHAT, Fields, read_fields
from runtime.serve.front import Collected, Front, cancel, merged
from runtime.serve.jobs import End, Event, Job, Piece, Progress, TokenInfo
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import chat_job, prompt_ids, wants_usage
from runtime.serve.sse import DONE, EventStream, event
from runtime.serve.tools import Call, CallReader, Tools, split, tools_of


async def chat(front: Front, request: Request) -> Response | ASGIApp:
    """Answer a conversation."""
    given = read_fields(await read_object(request, front.settings), CHAT)
    front.check_model(given.get("model"))
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise wrong("top_logprobs", "needs `logprobs`: true")
    tools = tools_of(given)
    job = await front.prepare(lambda: _job(front, given, request.scope["state"]["id"], tools))
    tickets = front.submit(job, given.get("n", 1))
    form = Form(front, given, request.scope["state"]["log"], tools)
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    return json_reply(form.whole(await front.collect(tickets, request.receive)))


async def input_tokens(front: Front, request: Request) -> Response:
    """How many tokens the prompt of a conversation has; nothing is computed."""
    given = read_fields(await read_object(request, front.settings), CHAT)
    front.check_model(given.get("model"))
    ids = await front.prepare(lambda: prompt_ids(front, given, normalised(given["messages"]), tools_of(given)))
    return json_reply({"object": "response.input_tokens", "input_tokens": len(ids)})


def _job(front: Front, given: Fields, name: str, tools: Tools | None) -> Job:
    """What the engine is to do. Raises ApiError or UserError."""
    top = given.get("top_logprobs", 0) if given.get("logprobs") else None
    return chat_job(front, given, normalised(given["messages"]), name, top, tools)


class Form:
    """Answers in the form of chats. tools: that may be called in them."""

    def __init__(self, front: Front, given: Fields, log: dict[str, Any], tools: Tools | None = None) -> None:
        self.front, self.given, self.log, self._tools = front, given, log, tools
        self._base = {
            "id": wire.new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": front.settings.name,
            "system_fingerprint": wire.fingerprint(front.model),
        }

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": i,
                **self._message(answer.end),
                "logprobs": self.logprobs(answer.tokens),
            }
            for i, answer in enumerate(answers)
        ]
        ends = [answer.end for answer in answers]
        wire.told(self.log, ends)
        return {
            **self._base,
            "object": "chat.completion",
            "choices": choices,
            "usage": wire.usage([end.stats for end in ends]),
            **last_figures(self.front, ends[0]),
        }

    def _message(self, end: End) -> dict[str, Any]:
        """The message of an answer, and why it ended."""
        reader = self.reader()
        said, _ = split([*reader.push(end.text), *reader.end()])
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if reader.calls:
            message |= {"content": said or None, "tool_calls": [call.wire() for call in reader.calls]}
        return {"message": message, "finish_reason": finished(end, reader.calls)}

    def reader(self) -> CallReader:
        """What finds calls in an answer; all is text where there are no tools."""
        return CallReader(self._tools)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """A piece of the answer, as an event."""
        return event({**self._base, "object": "chat.completion.chunk", "choices": choices, **more})

    def choice(self, i: int, delta: dict[str, Any], tokens: Sequence[TokenInfo] = (), end: str | None = None) -> Any:
        """What one chunk says of answer `i`."""
        return {"index": i, "delta": delta, "logprobs": self.logprobs(tokens), "finish_reason": end}

    def logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, Any] | None:
        """Log-probabilities, where they were asked for and there are some."""
        wanted = self.given.get("logprobs") and tokens
        return wire.chat_logprobs(tokens, self.front.model) if wanted else None


def finished(end: End, calls: Sequence[Call]) -> str:
    """Why an answer ended, with the calls that were found in it."""
    reason = wire.finish_reason(end.reason)
    return "tool_calls" if calls and reason == "stop" else reason


def last_figures(front: Front, end: End) -> dict[str, Any]:
    """What the last chunk, and an answer in one piece, tell beside the text."""
    stats = end.stats
    return {
        "timings": wire.timings(stats),
        "lazyneuron": wire.figures(front.model, stats, end.seed, front.dense_bytes),
    }


@dataclass
class Stream:
    """Answers on their way: what was told of them."""

    started: set[int] = field(default_factory=set)
    held: dict[int, list[TokenInfo]] = field(default_factory=dict)  # tokens whose text has not come yet
    ends: dict[int, End] = field(default_factory=dict)
    readers: dict[int, CallReader] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def reader(self, form: Form, i: int) -> CallReader:
        """What finds calls in answer `i`."""
        return self.readers.setdefault(i, form.reader())

    def with_held(self, i: int, piece: Piece) -> list[TokenInfo]:
        """The tokens of a text, those before it that had none among them."""
        return [*self.held.pop(i, ()), *piece.tokens]


async def _events(form: Form, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
    stream = Stream()
    try:
        async for i, one in merged(tickets):
            for data in _told(form, stream, i, one):
                yield data
        if wants_usage(form.given):
            every = [stream.ends[i].stats for i in sorted(stream.ends)]
            yield form.chunk([], usage=wire.usage(every), timings=wire.timings(every[0]))
        wire.told(form.log, [stream.ends[i] for i in sorted(stream.ends)])
        yield DONE
    except Exception as error:
        yield event(failure(error, form.log).body())
    finally:
        cancel(tickets)


def _told(form: Form, stream: Stream, i: int, one: Event) -> list[bytes]:
    """The chunks that tell of one event of answer `i`."""
    chunks = []
    if i not in stream.started and not isinstance(one, Progress):
        stream.started.add(i)
        chunks.append(form.chunk([form.choice(i, {"role": "assistant", "content": ""})]))
    if isinstance(one, Progress) and form.given.get("return_progress"):
        progress = wire.prompt_progress(one, time.perf_counter() - stream.began)
        chunks.append(form.chunk([form.choice(i, {})], prompt_progress=progress))
    elif isinstance(one, Piece):
        chunks += _piece(form, stream, i, one)
    elif isinstance(one, End):
        stream.ends[i] = one
        reader = stream.reader(form, i)
        n, (text, calls) = len(reader.calls), split(reader.end())
        rest = stream.held.pop(i, []) if form.given.get("logprobs") else []
        if text or rest:
            chunks.append(form.chunk([form.choice(i, {"content": text}, rest)]))
        chunks += _calls(form, i, calls, n)
        figures = last_figures(form.front, one)
        chunks.append(form.chunk([form.choice(i, {}, end=finished(one, reader.calls))], **figures))
    return chunks


def _piece(form: Form, stream: Stream, i: int, piece: Piece) -> list[bytes]:
    """The chunks that tell of a piece: its text, and calls that end in it."""
    reader, chunks = stream.reader(form, i), list[bytes]()
    n, (text, calls) = len(reader.calls), split(reader.push(piece.text))
    active = bool(form.given.get("return_activity"))
    if text or active:
        more = {"lazyneuron": wire.activity(piece, neurons(form.front))} if active else {}
        chunks.append(form.chunk([form.choice(i, {"content": text}, stream.with_held(i, piece))], **more))
    else:
        stream.held.setdefault(i, []).extend(piece.tokens)
    return chunks + _calls(form, i, calls, n)


def _calls(form: Form, i: int, calls: Sequence[Call], first: int) -> list[bytes]:
    """A chunk for each call; first: how many there were before."""
    return [form.chunk([form.choice(i, {"tool_calls": [call.wire(k)]})]) for k, call in enumerate(calls, first)]


def neurons(front: Front) -> list[int]:
    """Of each layer."""
    return [block.n_reached for block in front.model.structure.blocks]
