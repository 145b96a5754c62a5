"""/completion: a text continued in the form of llama.cpp's own server, which older programs speak."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from runtime.serve import wire
from runtime.serve.body import read_object
from runtime.serve.chat import Stream, last_figures, neurons
from runtime.serve.errors import failure
from runtime.serve.fields import NATIVE, Fields, read_fields
from runtime.serve.front import Collected, Front, cancel, merged
from runtime.serve.jobs import End, Event, Job, Piece, Progress, TokenInfo
from runtime.serve.prompts import is_one, prompts_of
from runtime.serve.replies import json_reply
from runtime.serve.service import Ticket
from runtime.serve.settling import job_of
from runtime.serve.sse import EventStream, event

_STOPS = {"eos": "eos", "stop": "word", "length": "limit", "context": "limit", "cancelled": "none"}


async def completion(front: Front, request: Request) -> Response | ASGIApp:
    """Continue a text, or several: then the answer is a list."""
    given = read_fields(await read_object(request, front.settings), NATIVE)
    front.check_model(given.get("model"))
    state, n = request.scope["state"], given.get("n", 1)
    jobs = await front.prepare(lambda: _jobs(front, given, state["id"]))
    tickets = front.submit_all(jobs, n)
    form = _Form(front, given, [job for job in jobs for _ in range(n)], state["log"])
    if given.get("stream"):
        return EventStream(_events(form, tickets), front.settings.ping)
    answers = await front.collect(tickets, request.receive)
    wire.told(state["log"], [answer.end for answer in answers])
    whole = [form.whole(i, answer) for i, answer in enumerate(answers)]
    return json_reply(whole[0] if is_one(given["prompt"]) and n == 1 else whole)


def _jobs(front: Front, given: Fields, name: str) -> list[Job]:
    prompts = prompts_of(given["prompt"], front.model)
    first = job_of(front, given, prompts[0].ids, name, given.get("n_probs") or None)
    return [replace(first, prompt=prompt.ids) for prompt in prompts]


class _Form:
    """Answers in this form. jobs: what was asked for each."""

    def __init__(self, front: Front, given: Fields, jobs: Sequence[Job], log: dict[str, Any]) -> None:
        self.front, self.given, self.jobs, self.log = front, given, jobs, log

    def whole(self, i: int, answer: Collected) -> dict[str, Any]:
        """Answer `i` at once."""
        tokens = answer.tokens if self.given.get("return_tokens") else ()
        return self._picked(
            {**self.last(i, answer.end, answer.end.text, tokens), **self.probabilities(answer.tokens)},
        )

    def last(self, i: int, end: End, text: str, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """What is told when an answer has ended."""
        job, stats = self.jobs[i], end.stats
        return {
            **self.part(i, text, tokens, stats.tokens),
            "stop": True,
            "model": self.front.settings.name,
            "generation_settings": self._settled(job, end.seed),
            "prompt": wire.spelled(job.prompt, self.front.model),
            "has_new_line": "\n" in end.text,
            "truncated": end.reason == "context",
            "stop_type": _STOPS[end.reason],
            "stopping_word": end.stop or "",
            "tokens_cached": stats.cached_tokens,
            **last_figures(self.front, end),
        }

    def part(self, i: int, text: str, tokens: Sequence[TokenInfo], n_predicted: int) -> dict[str, Any]:
        """A piece of an answer."""
        return {
            "index": i,
            "content": text,
            "tokens": [token.id for token in tokens],
            "stop": False,
            "id_slot": -1,  # slots are the scheduler's
            "tokens_predicted": n_predicted,
            "tokens_evaluated": len(self.jobs[i].prompt),
        }

    def probabilities(self, tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        """Of tokens, where they were asked for and there are some."""
        if not self.given.get("n_probs") or not tokens:
            return {}
        return {"completion_probabilities": wire.llama_logprobs(tokens, self.front.model)}

    def _settled(self, job: Job, seed: int) -> dict[str, Any]:
        n = -1 if job.max_tokens is None else job.max_tokens
        forbidden, biases = float("-inf"), job.sampling.logit_bias
        return {
            **asdict(job.sampling),
            "seed": seed,
            "logit_bias": [{"token": i, "bias": False if bias == forbidden else bias} for i, bias in biases],
            "n_predict": n,
            "max_tokens": n,
            "n_ctx": self.front.model.n_ctx,
            "stop": job.stop,
            "ignore_eos": job.ignore_eos,
            "n_probs": job.top_logprobs or 0,
            "stream": bool(self.given.get("stream")),
            "grammar": self.given.get("grammar", ""),
        }

    def _picked(self, values: dict[str, Any]) -> dict[str, Any]:
        """What `response_fields` names, each under that name: `a/b` is `b` within `a`."""
        names = self.given.get("response_fields")
        if not names:
            return values
        found = {}
        for name in names:
            value: Any = values
            for key in name.split("/"):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                found[name] = value
        return found


async def _events(form: _Form, tickets: Sequence[Ticket]) -> AsyncIterator[bytes]:
    stream, counts = Stream(), [0] * len(tickets)
    try:
        async for i, one in merged(tickets):
            if isinstance(one, Piece):
                counts[i] += len(one.tokens)
            for values in _told(form, stream, i, one, counts[i]):
                yield event(values)
        wire.told(form.log, [stream.ends[i] for i in sorted(stream.ends)])
    except Exception as error:
        yield event(failure(error, form.log).body())
    finally:
        cancel(tickets)


def _told(form: _Form, stream: Stream, i: int, one: Event, n_predicted: int) -> list[dict[str, Any]]:
    """The events that tell of one event of answer `i`; n_predicted: its tokens so far."""
    given = form.given
    if isinstance(one, Progress) and given.get("return_progress"):
        progress = wire.prompt_progress(one, time.perf_counter() - stream.began)
        return [{**form.part(i, "", (), 0), "prompt_progress": progress}]
    if isinstance(one, Piece):
        active = bool(given.get("return_activity"))
        if not one.text and not active:
            stream.held.setdefault(i, []).extend(one.tokens)
            return []
        tokens = stream.with_held(i, one)
        more = {"lazyneuron": wire.activity(one, neurons(form.front))} if active else {}
        return [{**form.part(i, one.text, tokens, n_predicted), **form.probabilities(tokens), **more}]
    if isinstance(one, End):
        stream.ends[i] = one
        rest = stream.held.pop(i, [])
        return [{**form.last(i, one, "", rest), **form.probabilities(rest)}]
    return []
