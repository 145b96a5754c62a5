"""Streams, and those who leave them: order of chunks, pings, errors on the way, disconnects, slow readers. Numbers are those of the cases in docs/serve.md."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TEMPLATE, Running, Scripted, end, parsed, piece, running

import runtime
from runtime.errors import UserError
from runtime.generation import Stats
from runtime.model import Model
from runtime.serve.jobs import End, FailedError, Job, Piece, Progress, TokenInfo
from runtime.serve.settings import Settings

FOREVER = 3600.0
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": {"prompt": "Hi"}}
FORMS = {
    **PATHS,
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}


def script(job: Job) -> list[Any]:
    """What the prompt's text asks for, by its seed: who sends 1 hears nothing, 2 an error on the way, and so on."""
    hello = [Progress(3, 3, 1), piece("Hel", 5), Piece("", (TokenInfo(6, b"\xc3"),)), piece("lo", 7)]
    scripts: dict[int | None, list[Any]] = {
        None: [*hello, End("eos", Stats(prompt_tokens=3, cached_tokens=1, tokens=3), 7, "Hello")],
        1: [FOREVER],
        2: [piece("Hel"), UserError("the grammar has no way on", "")],
        3: [FailedError(ValueError("a detail of ours"))],
        4: [0.7, *hello, end("Hello")],
        5: [piece("x" * 50_000) for _ in range(400)] + [FOREVER],
        6: [piece("Hel"), FOREVER],
        7: [piece("Hel"), ValueError("not ours")],
    }
    return scripts.get(job.sampling.seed, scripts[None])


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, device="none") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with running(Scripted(model, script, 4, 60), lambda: model, Settings(chat_template=TEMPLATE, ping=0.2)) as found:
        yield found


def service(server: Running) -> Scripted:
    assert isinstance(server.service, Scripted)
    return server.service


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


# --- the order of chunks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [False, True])
def test_cases_15_16_17_18_21_51_chunks_of_a_chat(server: Running, usage: bool) -> None:
    """Cases 15 to 18, 21 and 51: the role first, text without a reason, the reason alone, usage alone if asked for."""
    options = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, done = server.events("/v1/chat/completions", {**CHAT, **options})
    assert done == "[DONE]"
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "model", "chat.completion.chunk")
    }
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 3)
        assert last["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert not any("usage" in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:]] == [{"content": "Hel"}, {"content": "lo"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    whole = server.post("/v1/chat/completions", CHAT).json()
    assert whole["object"] == "chat.completion"
    choice = whole["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


def test_chunks_of_completions(server: Running) -> None:
    body = {"prompt": ["Hi", "Ho"], "n": 2, "stream_options": {"include_usage": True}}
    *chunks, usage, done = server.events("/v1/completions", body)
    assert done == "[DONE]"
    assert usage["usage"] | {"prompt_tokens_details": None, "completion_tokens_details": None} == {
        "prompt_tokens": 6,
        "completion_tokens": 12,
        "total_tokens": 18,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    texts = {i: "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i) for i in range(4)}
    assert texts == dict.fromkeys(range(4), "Hello")
    ends = [c["choices"][0] for c in chunks if c["choices"][0]["finish_reason"]]
    assert [choice["text"] for choice in ends] == [""] * 4
    assert sorted(choice["index"] for choice in ends) == [0, 1, 2, 3]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


def test_tokens_without_a_text_of_their_own_come_with_the_next(server: Running) -> None:
    """Log-probabilities of the first half of a character are told with the second."""
    *chunks, _ = server.events("/v1/chat/completions", {**CHAT, "logprobs": True})
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [[entry["bytes"] for entry in one["content"]] for one in told if one]
    assert tokens == [[list(b"Hel")], [[0xC3], list(b"lo")]]
    whole = server.post("/v1/chat/completions", {**CHAT, "logprobs": True}).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in whole] == [list(b"Hel"), [0xC3], list(b"lo")]
    assert whole[1]["token"] == "bytes:\\xc3"


def test_progress_and_activity_where_they_are_asked_for(server: Running) -> None:
    for path, body in PATHS.items():
        chunks = server.events(path, {**body, "return_progress": True, "return_activity": True})[:-1]
        told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        assert [{**one, "time_ms": 0} for one in told] == [{"total": 3, "cache": 1, "processed": 3, "time_ms": 0}]
        assert {"layers", "computed_share", "bytes_per_token"} <= set(chunks[2]["lazyneuron"])
        assert chunks[-1]["lazyneuron"]["seed"] == 7
        assert chunks[-1]["timings"] | {"cache_n": 1, "prompt_n": 2, "predicted_n": 3} == chunks[-1]["timings"]
        plain = server.events(path, body)[:-1]
        assert not any("prompt_progress" in chunk for chunk in plain)
        assert not any("lazyneuron" in chunk for chunk in plain[:-1])


# --- silence (27) -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORMS)
def test_case_27_headers_at_once_and_comments_in_silence(server: Running, path: str) -> None:
    """Case 27: headers come before there is any text, and comments while there is none."""
    began = time.monotonic()
    with (
        server.client() as client,
        client.stream("POST", path, json={**FORMS[path], "seed": 4, "stream": True}) as reply,
    ):
        assert time.monotonic() - began < 0.5
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = list(reply.iter_lines())
    assert 2 <= sum(line.startswith(":") for line in lines) <= 4
    assert "Hel" in "".join(lines)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORMS)
def test_case_30_an_error_on_the_way_is_an_event(server: Running, path: str) -> None:
    """Case 30: a grammar that dies ends its own answer, in words; without streaming the answer is a 400."""
    with (
        server.client() as client,
        client.stream("POST", path, json={**FORMS[path], "seed": 2, "stream": True}) as reply,
    ):
        text = reply.read().decode()
    events = list(parsed(iter(text.splitlines())))
    assert "the grammar has no way on" in json.dumps(events[-1])
    assert "[DONE]" not in text
    reply = server.post(path, {**FORMS[path], "seed": 2})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "the grammar has no way on"
    assert server.post(path, FORMS[path]).status_code == 200


def test_a_fault_of_ours_is_a_500_that_tells_nothing(server: Running) -> None:
    reply = server.post("/v1/completions", {"prompt": "Hi", "seed": 3})
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "a detail of ours" not in reply.text


def test_case_37_one_failure_is_no_other_ones(server: Running) -> None:
    """Case 37: of requests at the same time, one fails alone."""
    replies: dict[int, int] = {}

    def ask(seed: int) -> None:
        replies[seed] = server.post("/v1/completions", {"prompt": "Hi", "seed": seed}).status_code

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (3, 4, 9, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {3: 500, 4: 200, 9: 200, 10: 200}


def test_case_9_errors_in_words_of_either_form(server: Running) -> None:
    """Case 9: streaming or not, an error before the first piece has a status of its own."""
    for path, body in FORMS.items():
        for stream in (False, True):
            reply = server.post(path, {**body, "temperature": "hot", "stream": stream})
            assert reply.status_code == 400
            error = reply.json()["error"]
            assert "temperature" in error["message"]
            assert error["type"] == "invalid_request_error"
    assert server.post("/v1/messages", {}).json()["type"] == "error"


# --- those who leave (1, 2, 35) ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def asking(server: Running, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection that has sent a request, and reads nothing by itself."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", FORMS)
def test_cases_1_and_2_who_leaves_is_not_computed_for(server: Running, path: str, stream: bool) -> None:
    """Cases 1, 2: whether it streams or not, whether it has begun or not."""
    for seed in (1, 6):
        before, asked = len(service(server).cancelled), len(service(server).jobs)
        with asking(server, path, {**FORMS[path], "seed": seed, "stream": stream}):
            until(lambda asked=asked: len(service(server).jobs) > asked)
        until(lambda before=before: len(service(server).cancelled) > before, 2)
    until(lambda: not service(server)._tickets)


def test_case_35_a_hundred_streams_that_break_off(server: Running) -> None:
    """Case 35: connections that break off at any moment leave nothing behind."""
    for i in range(100):
        with asking(
            server, "/v1/chat/completions", {**CHAT, "seed": (6, 9, 5)[i % 3], "stream": i % 4 > 0}
        ) as connection:
            if i % 5 and i % 4:
                connection.recv(1 + i * 37 % 400)
            if i % 2:  # reset, not closed
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: not service(server)._tickets)
    assert server.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"] == "Hello"


def test_who_does_not_read_stops_nobody(server: Running) -> None:
    """20 MB that nobody takes: others are answered, and so is /health; leaving ends it."""
    with asking(server, "/v1/completions", {"prompt": "Hi", "seed": 5, "stream": True}):
        time.sleep(0.2)
        for _ in range(5):
            began = time.monotonic()
            assert server.get("/health").status_code == 200
            assert server.post("/v1/completions", {"prompt": "Hi"}).json()["choices"][0]["text"] == "Hello"
            assert time.monotonic() - began < 1
        assert service(server)._tickets
    until(lambda: not service(server)._tickets)


def test_who_sends_no_end_of_a_body_is_let_go(model: Model) -> None:
    settings = Settings(body_seconds=0.3)
    with (
        running(Scripted(model, script), lambda: model, settings) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30) as connection,
    ):
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


# --- too many (36, 47) ------------------------------------------------------------------------------------------------


def test_cases_36_and_47_too_many(model: Model) -> None:
    """Cases 36, 47: beyond the bound a 429 that says when to come again; /health and /v1/models answer all the while;
    who leaves makes room at once.
    """
    with running(Scripted(model, script, 2, 3), lambda: model) as server, contextlib.ExitStack() as stack:
        waiting = [
            stack.enter_context(asking(server, "/v1/completions", {"prompt": "Hi", "seed": 1})) for _ in range(5)
        ]
        until(lambda: len(service(server)._tickets) == 5)
        for stream in (False, True):
            reply = server.post("/v1/completions", {"prompt": "Hi", "stream": stream})
            assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.headers["x-should-retry"] == "true"
        for path in ("/health", "/v1/models", "/props") * 5:
            if path != "/props":
                began = time.monotonic()
                assert server.get(path).status_code == 200
                assert time.monotonic() - began < 0.5
        assert server.post("/v1/completions", {"prompt": "Hi", "n": 6}).status_code == 400  # can never be taken
        waiting[0].close()
        until(lambda: len(service(server)._tickets) == 4)
        assert server.post("/v1/completions", {"prompt": "Hi"}).status_code == 200


# --- states -----------------------------------------------------------------------------------------------------------


def test_health_says_how_it_is(model: Model) -> None:
    with running(Scripted(model, script), lambda: model) as server:
        for state, word in (("loading", "loaded"), ("draining", "ends"), ("dead", "failed")):
            server.service.state = state  # type: ignore[assignment]
            reply = server.get("/health")
            assert reply.status_code == 503
            assert word in reply.json()["error"]["message"]
            assert reply.json()["error"]["status"] == state
            reply = server.post("/v1/completions", {"prompt": "Hi"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "unavailable_error")
            assert server.get("/v1/models").status_code == 200
        server.service.state = "ready"
        assert server.get("/health").status_code == 200
