"""llama.cpp's own /completion: its fields, its events, and that what it says is what /v1/completions says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Running, Scripted, running

import runtime
from runtime.errors import UserError
from runtime.generation import Stats
from runtime.model import Model, open_model
from runtime.options import RunOptions
from runtime.serve.jobs import End, Job, Piece, Progress, TokenInfo
from runtime.serve.service import Service
from runtime.serve.settings import Settings

EURO = "€".encode()


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, device="none", n_ctx=64) as loaded:
        yield loaded


def script(job: Job) -> list[Any]:
    """A text of three tokens and half a stop text; the seed says how it ends."""
    likely = ((7, -0.5), (8, -math.inf))
    told = [
        Progress(3, 3, 1),
        Piece("Hel\n", (TokenInfo(5, b"Hel\n", -0.25, likely),)),
        Piece("", (TokenInfo(6, EURO[:2], -1.0, likely),)),
        Piece("€", (TokenInfo(7, EURO[2:], -2.0, likely),)),
        Piece("", (TokenInfo(8, b"EN", -3.0, likely),)),
    ]
    stats = Stats(prompt_tokens=3, cached_tokens=1, tokens=4)
    reasons = {1: "length", 2: "context", 3: "stop", None: "eos"}
    if job.sampling.seed == 4:
        return [*told[:2], UserError("the grammar has no way on", "")]
    reason = reasons[job.sampling.seed]
    rest = [] if reason == "stop" else [Piece("EN", ())]
    text = "Hel\n€" + ("" if reason == "stop" else "EN")
    return [*told, *rest, End(reason, stats, 7, text, "END" if reason == "stop" else None)]


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    with running(Scripted(model, script, 4, 60), lambda: model, Settings("tiny")) as found:
        yield found


@pytest.mark.parametrize(("seed", "kind"), [(1, "limit"), (2, "limit"), (3, "word"), (None, "eos")])
def test_whole_and_streamed_are_the_same(server: Running, seed: int | None, kind: str) -> None:
    body = {"prompt": "My fellow", "n_predict": 9, "seed": seed, "n_probs": 2, "return_tokens": True}
    whole = server.post("/completion", body).json()
    events = server.events("/completion", body)
    assert [one["stop"] for one in events] == [False] * (len(events) - 1) + [True]
    assert whole["content"] == ("Hel\n€" if kind == "word" else "Hel\n€EN") == "".join(e["content"] for e in events)
    assert whole["tokens"] == [5, 6, 7, 8] == [token for e in events for token in e["tokens"]]
    told = [one for e in events for one in e.get("completion_probabilities", ())]
    assert whole["completion_probabilities"] == told
    assert [one["id"] for one in told] == [5, 6, 7, 8]
    assert (told[0]["token"], told[0]["logprob"], told[1]["token"]) == ("Hel\n", -0.25, "")
    assert b"".join(bytes(one["bytes"]) for one in told) == b"Hel\n" + EURO + b"EN"
    assert [one["id"] for one in told[0]["top_logprobs"]] == [7, 8]
    assert told[0]["top_logprobs"][1]["logprob"] == -9999.0  # JSON has no word for minus infinity
    last = events[-1]
    for key in ("stop_type", "stopping_word", "truncated", "has_new_line", "tokens_predicted", "tokens_evaluated"):
        assert last[key] == whole[key], key
    assert (whole["stop_type"], whole["stopping_word"]) == (kind, "END" if kind == "word" else "")
    assert (whole["truncated"], whole["has_new_line"]) == (seed == 2, True)
    assert (whole["tokens_predicted"], whole["tokens_cached"]) == (4, 1)
    assert whole["tokens_evaluated"] == len(server.service.model.tokenize("My fellow"))
    assert (whole["timings"]["predicted_n"], whole["timings"]["prompt_n"], whole["timings"]["cache_n"]) == (4, 2, 1)
    assert {"layers", "computed_share", "bytes_per_token"} <= set(whole["lazyneuron"])
    assert [one["tokens_predicted"] for one in events[:3]] == [1, 3, 4]


def test_what_is_told_only_where_it_is_asked_for(server: Running) -> None:
    whole = server.post("/completion", {"prompt": "My"}).json()
    assert whole["tokens"] == []
    assert "completion_probabilities" not in whole
    events = server.events("/completion", {"prompt": "My", "return_progress": True, "return_activity": True})
    assert events[0]["prompt_progress"] | {"time_ms": 0} == {"total": 3, "cache": 1, "processed": 3, "time_ms": 0}
    assert "lazyneuron" in events[1]
    picked = ["content", "generation_settings/n_predict", "none", "content/deep", "truncated"]
    found = server.post("/completion", {"prompt": "My", "n_predict": 9, "response_fields": picked}).json()
    assert found == {"content": "Hel\n€EN", "generation_settings/n_predict": 9, "truncated": False}


def test_settings_reach_the_engine_and_are_told(server: Running) -> None:
    bias = [[5, 1.5], [6, False]]
    fields = {"temperature": 0.5, "n_predict": 9, "stop": ["END", "x"], "logit_bias": bias, "n_probs": 3, "top_k": 7}
    found = server.post("/completion", {"prompt": "My", **fields, "cache_prompt": False, "ignore_eos": True}).json()
    assert isinstance(server.service, Scripted)
    job = server.service.jobs[-1]
    assert (job.max_tokens, job.stop, job.top_logprobs, job.cache_prompt) == (9, ("END", "x"), 3, False)
    told = found["generation_settings"]
    assert told["logit_bias"] == [{"token": 5, "bias": 1.5}, {"token": 6, "bias": False}]
    expected = {"temperature": 0.5, "top_k": 7, "n_predict": 9, "stop": ["END", "x"], "seed": 7, "n_ctx": 64}
    assert told == {**told, **expected, "n_probs": 3, "ignore_eos": True, "stream": False}
    unbound = server.post("/completion", {"prompt": "My"}).json()
    assert server.service.jobs[-1].max_tokens is None
    assert unbound["generation_settings"]["n_predict"] == -1
    assert (unbound["model"], unbound["prompt"]) == ("tiny", "<s> My")
    for wrong in ({"n_probs": 101}, {"post_sampling_probs": True}, {"n_predict": "few"}, {"prompt": 5}):
        reply = server.post("/completion", {"prompt": "My", **wrong})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(wrong)))
    assert server.post("/completion", {}).json()["error"]["param"] == "prompt"


def test_an_error_on_the_way_is_an_event(server: Running) -> None:
    events = server.events("/completion", {"prompt": "My", "seed": 4})
    assert events[0]["content"] == "Hel\n"
    assert events[-1]["error"]["message"] == "the grammar has no way on"
    assert server.post("/completion", {"prompt": "My", "seed": 4}).status_code == 400


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_prompts_of_all_kinds(server: Running, model: Model, path: str) -> None:
    """A list with a number in it is one prompt, any other list is several; a start token comes with a text alone that
    begins a prompt.
    """
    assert isinstance(server.service, Scripted)
    text = tuple(model.tokenize("My fellow"))
    inner = tuple(model.tokenize("My fellow", add_special=False))
    assert text[1:] == inner
    for prompt, expected in (
        ("My fellow", [text]),
        ([5, 6], [(5, 6)]),
        (["My fellow", 5, "My fellow"], [(*text, 5, *inner)]),
        ([5, "My fellow"], [(5, *inner)]),
        (["My fellow"], [text]),
        (["My fellow", [5, 6], ["My fellow", 7]], [text, (5, 6), (*text, 7)]),
        ({"prompt_string": "My fellow"}, [text]),
        ([[5], {"prompt_string": "My fellow"}], [(5,), text]),
    ):
        server.service.jobs.clear()
        found = server.post(path, {"prompt": prompt}).json()
        assert [job.prompt for job in server.service.jobs] == expected
        if path == "/completion":
            several = isinstance(prompt, list) and not any(isinstance(one, int) for one in prompt)
            assert isinstance(found, list) == several
            assert [one["index"] for one in (found if several else [found])] == list(range(len(expected)))


def test_several_answers(server: Running) -> None:
    found = server.post("/completion", {"prompt": "My", "n_cmpl": 2}).json()
    assert [one["index"] for one in found] == [0, 1]
    events = server.events("/completion", {"prompt": ["My", "The"]})
    for i in (0, 1):
        own = [one for one in events if one["index"] == i]
        assert "".join(one["content"] for one in own) == "Hel\n€EN"
        assert [one["stop"] for one in own].count(True) == 1
    assert server.events("/completion", {"prompt": "My"})[-1] != "[DONE]"


def test_the_engine_says_the_same_here(model: Model) -> None:
    service = Service(2, 8)
    options = RunOptions(threads=1, device="none", n_ctx=64)
    with running(service, lambda: open_model(model.path, options)) as server:
        body: dict[str, Any] = {"prompt": "My fellow citizens,", "temperature": 0, "ignore_eos": True}
        text = server.post("/v1/completions", {**body, "max_tokens": 8, "logprobs": 3}).json()["choices"][0]
        found = server.post("/completion", {**body, "n_predict": 8, "n_probs": 3, "return_tokens": True}).json()
        assert found["content"] == text["text"]
        assert (found["stop_type"], found["tokens_predicted"], len(found["tokens"])) == ("limit", 8, 8)
        told = [one["logprob"] for one in found["completion_probabilities"]]
        assert told == text["logprobs"]["token_logprobs"]
        assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in found["completion_probabilities"])
        full = server.post("/completion", {**body, "n_predict": -1}).json()
        assert (full["truncated"], full["stop_type"]) == (True, "limit")
        assert full["tokens_evaluated"] + full["tokens_predicted"] == 64
        long = server.post("/completion", {"prompt": "word " * 99, "stream": True})
        assert (long.status_code, long.json()["error"]["n_ctx"]) == (400, 64)
