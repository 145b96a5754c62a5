"""/v1/completions: texts continued, prompts echoed with their log-probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.generation import Stats
from runtime.serve import wire
from runtime.serve.body import read_object
from runtime.serve.chat import Stream, last_figures, neurons
from runtime.serve.errors import failure
from runtime.serve.fields import TEXT, Fields, read_fields
from runtime.serve.front import Collected, Front, cancel, merged
from runtime.serve.jobs import End, Event, Job, Piece, Progress, PromptTokens, TokenInfo
from runtime.serve.prompts import Prompt, prompts_of
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import job_of, wants_usage
from runtime.serve.sse import DONE, EventStream, event

DEFAULT_MAX_TOKENS = 16  # OpenAI's, for completions


async def completions(front: Front, request: Request) -> Response | ASGIApp:
    """Continue a text, or several."""
    given = read_fields(await read_object(request, front.settings), TEXT)
    front.check_model(given.get("model"))
    name = request.scope["state"]["id"]
    prompts, jobs = await front.prepare(lambda: _jobs(front, given, name))
    n = given.get("n", 1)
    tickets = front.submit_all(jobs, n)
    form = TextForm(front, given, [prompt for prompt in prompts for _ in range(n)], request.scope["state"]["log"])
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    return json_reply(form.whole(await front.collect(tickets, request.receive)))


def _jobs(front: Front, given: Fields, name: str) -> tuple[list[Prompt], list[Job]]:
    prompts = prompts_of(given["prompt"], front.model)
    first = job_of(front, given, prompts[0].ids, name, given.get("logprobs"), DEFAULT_MAX_TOKENS)
    return prompts, [replace(first, prompt=prompt.ids) for prompt in prompts]


class TextForm:
    """Answers in the form of completions. prompts: of each answer."""

    def __init__(self, front: Front, given: Fields, prompts: Sequence[Prompt], log: dict[str, Any]) -> None:
        self.front, self.given, self.prompts, self.log = front, given, prompts, log
        self.n = given.get("n", 1)
        self._base = {
            "id": wire.new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": front.settings.name,
            "system_fingerprint": wire.fingerprint(front.model),
        }
        self._told = [0] * len(prompts)  # characters of each answer

    def whole(self, answers: Sequence[Collected]) -> dict[str, Any]:
        """All answers at once."""
        choices = []
        for i, answer in enumerate(answers):
            echoed = self.prompts[i].text if self.given.get("echo") else ""
            tokens = [*self.shown_prompt(i, answer.prompt), *answer.tokens]
            choices.append(self.choice(i, echoed + answer.end.text, tokens, answer.end))
        stats = [answer.end.stats for answer in answers]
        wire.told(self.log, [answer.end for answer in answers])
        return {
            **self._base,
            "choices": choices,
            "usage": self.usage(stats),
            **last_figures(self.front, answers[0].end),
        }

    def choice(self, i: int, text: str, tokens: Sequence[TokenInfo] = (), end: End | None = None) -> dict[str, Any]:
        """What is told of answer `i`: text, and the tokens that it is of."""
        offset, self._told[i] = self._told[i], self._told[i] + len(text)
        reason = wire.finish_reason(end.reason) if end else None
        return {"index": i, "text": text, "logprobs": self._logprobs(tokens, offset), "finish_reason": reason}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """A piece of the answer, as an event."""
        return event({**self._base, "choices": choices, **more})

    def usage(self, stats: Sequence[Stats]) -> dict[str, Any]:
        """Tokens of all prompts and answers."""
        firsts = stats[:: self.n]
        prompt, cached = sum(s.prompt_tokens for s in firsts), sum(s.cached_tokens for s in firsts)
        return wire.usage_of(prompt, cached, sum(s.tokens for s in stats))

    def shown_prompt(self, i: int, tokens: Sequence[TokenInfo]) -> list[TokenInfo]:
        """A prompt's tokens, such that their texts together are the prompt: without the space that the vocabulary puts
        before it, and start tokens that were not asked for.
        """
        found = list(tokens)
        text = self.prompts[i].text
        if found and found[0].id == self.front.model.tokenizer.bos and not text.startswith(_text(found[:1])):
            found[0] = replace(found[0], data=b"")
        if _text(found) == f" {text}":
            at = next(k for k, token in enumerate(found) if token.data)
            found[at] = replace(found[at], data=found[at].data[1:])
        return found

    def _logprobs(self, tokens: Sequence[TokenInfo], offset: int) -> dict[str, Any] | None:
        top = self.given.get("logprobs")
        if top is None or not tokens:
            return None
        return wire.text_logprobs(tokens, self.front.model, offset, top)


def _text(tokens: Sequence[TokenInfo]) -> str:
    return b"".join(token.data for token in tokens).decode("utf-8", "replace")


async def _events(form: TextForm, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
    stream = Stream()
    try:
        async for i, one in merged(tickets):
            for data in _told(form, stream, i, one):
                yield data
        if wants_usage(form.given):
            every = [stream.ends[i].stats for i in sorted(stream.ends)]
            yield form.chunk([], usage=form.usage(every), timings=wire.timings(every[0]))
        wire.told(form.log, [stream.ends[i] for i in sorted(stream.ends)])
        yield DONE
    except Exception as error:
        yield event(failure(error, form.log).body())
    finally:
        cancel(tickets)


def _told(form: TextForm, stream: Stream, i: int, one: Event) -> list[bytes]:
    """The chunks that tell of one event of answer `i`."""
    given, chunks = form.given, []
    echoes = given.get("echo") and i not in stream.started
    if isinstance(one, PromptTokens) and echoes:
        stream.started.add(i)
        chunks.append(form.chunk([form.choice(i, form.prompts[i].text, form.shown_prompt(i, one.tokens))]))
    elif echoes and not isinstance(one, Progress):
        stream.started.add(i)
        chunks.append(form.chunk([form.choice(i, form.prompts[i].text)]))
    if isinstance(one, Progress) and given.get("return_progress"):
        progress = wire.prompt_progress(one, time.perf_counter() - stream.began)
        chunks.append(form.chunk([form.choice(i, "")], prompt_progress=progress))
    elif isinstance(one, Piece):
        active = bool(given.get("return_activity"))
        if not one.text and not active:
            stream.held.setdefault(i, []).extend(one.tokens)
            return chunks
        more = {"lazyneuron": wire.activity(one, neurons(form.front))} if active else {}
        chunks.append(form.chunk([form.choice(i, one.text, stream.with_held(i, one))], **more))
    elif isinstance(one, End):
        stream.ends[i] = one
        figures = last_figures(form.front, one)
        chunks.append(form.chunk([form.choice(i, "", stream.held.pop(i, ()), one)], **figures))
    return chunks
