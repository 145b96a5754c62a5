"""What test suites of others found in our server (tests/outside/README.md), with the real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import TEMPLATE, Running, running

from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.service import Service
from runtime.serve.settings import Settings

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it hot in Oslo?"}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Running]:
    options = RunOptions(ffn="exact", threads=1, n_ctx=512, device="none")
    with running(Service(2, 8), lambda: open_model(tiny_gguf, options), Settings(chat_template=TEMPLATE)) as found:
        yield found


def test_apply_template_shows_tools_as_a_chat_does(server: Running) -> None:
    def prompt(**more: Any) -> str:
        reply = server.post("/apply-template", {"messages": MESSAGES, **more})
        assert reply.status_code == 200, reply.text
        return str(reply.json()["prompt"])

    assert "weather" in prompt(tools=TOOLS)
    assert prompt(tools=TOOLS, tool_choice="none") == prompt(tools=[]) == prompt(tools=None) == prompt()
    shown = server.post("/tokenize", {"content": prompt(tools=TOOLS)}).json()["tokens"]
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 1}
    assert len(shown) == server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    assert (
        server.post("/apply-template", {"messages": MESSAGES, "tools": "weather"}).json()["error"]["param"] == "tools"
    )


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_input_tokens_of_a_chat_are_those_that_are_computed(server: Running, prefix: str) -> None:
    for more in ({}, {"tools": TOOLS}):
        body = {"messages": MESSAGES, "max_tokens": 1, **more}
        counted = server.post(f"{prefix}/chat/completions/input_tokens", body).json()["input_tokens"]
        assert counted == server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]
    assert server.post(f"{prefix}/chat/completions/input_tokens", {}).json()["error"]["param"] == "messages"


def test_metrics_count_what_is_reused_and_the_longest(server: Running) -> None:
    body = {"prompt": "My fellow citizens, of the House of Representatives", "max_tokens": 3, "ignore_eos": True}
    cached = longest = 0
    before = metrics(server)
    for _ in range(2):
        usage = server.post("/v1/completions", body).json()["usage"]
        cached += usage["prompt_tokens_details"]["cached_tokens"]
        longest = max(longest, usage["total_tokens"])
    after = metrics(server)
    name = "llamacpp:prompt_tokens_cached_total"
    assert after[name] - before[name] == cached > 0
    assert after["llamacpp:n_tokens_max"] >= longest
    drafted = [after[f"llamacpp:spec_decode_num_{kind}_tokens_total"] for kind in ("draft", "accepted")]
    assert drafted == [0, 0]


def metrics(server: Running) -> dict[str, float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_best_of_none_is_no_wish(server: Running) -> None:
    """OpenAI's schema allows 0."""
    body = {"prompt": "The", "max_tokens": 1}
    assert server.post("/v1/completions", {**body, "best_of": 0}).status_code == 200
    assert server.post("/v1/completions", {**body, "best_of": 3}).status_code == 400


def test_a_response_names_its_user_or_nobody(server: Running) -> None:
    """OpenAI's schema has no null there."""
    body = {"input": "Hi", "max_output_tokens": 1}
    assert "user" not in server.post("/v1/responses", body).json()
    assert "user" not in server.post("/v1/responses", {**body, "user": None}).json()
    assert server.post("/v1/responses", {**body, "user": "me"}).json()["user"] == "me"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_chunk_of_the_usage_tells_times_too(server: Running, path: str) -> None:
    body = {"messages": MESSAGES, "prompt": "The", "max_tokens": 2, "stream_options": {"include_usage": True}}
    *_, last, usage, done = server.events(path, body)
    assert (usage["choices"], done) == ([], "[DONE]")
    assert usage["timings"] == last["timings"]
    assert usage["timings"]["predicted_n"] == usage["usage"]["completion_tokens"]


@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_no_schema_is_left_out_since_it_is_empty(server: Running, path: str) -> None:
    """Fields that are false, 0 or empty were taken for absent, and the answer was any text."""
    body = {"prompt": "The", "max_tokens": 40, "seed": 1}
    for schema in (False, 0, [], ""):
        reply = server.post(path, {**body, "json_schema": schema})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "json_schema"), schema
    free, bound = (server.post(path, {**body, "temperature": 0, **more}).json() for more in ({}, {"json_schema": {}}))
    text = [str(one.get("content") or one["choices"][0]["text"]).strip() for one in (free, bound)]
    assert text[0][:1].isalpha()
    assert text[1][:1] in '{["-0123456789tfn'
    assert server.post(path, {**body, "json_schema": None, "grammar": ""}).status_code == 200


def test_an_item_without_anything_is_none(server: Running) -> None:
    """It was left out without a word."""
    reply = server.post("/v1/responses", {"input": [{"role": "user", "content": "Hi"}, {}], "max_output_tokens": 1})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "input[1].role")


def test_options_tell_the_methods_of_the_path(server: Running) -> None:
    methods = {"/v1/models": "GET, HEAD, OPTIONS", "/v1/models/a/b": "GET, HEAD, OPTIONS", "/nothing": "OPTIONS"}
    with server.client() as client:
        for path, allowed in {**methods, "//v1/completions/": "POST, OPTIONS"}.items():
            reply = client.options(server.url + path)
            assert (reply.status_code, reply.headers["allow"]) == (204, allowed), path


def test_what_is_needed_is_never_null_in_our_description(server: Running) -> None:
    """The least that our own /openapi.json demands is answered; what it demands and is null or missing is not."""
    document = server.get("/openapi.json").json()
    least: dict[str, Any] = {"messages": MESSAGES, "prompt": "Hi", "input": "Hi", "max_tokens": 1}
    for path, methods in document["paths"].items():
        schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = {name: least[name] for name in schema["required"]}
        assert not any(schema["properties"][name].get("nullable") for name in body), path
        reply = server.post(path, {"max_output_tokens": 1, "max_tokens": 1, **body})
        assert reply.status_code == 200, (path, reply.text)
        for name in body:
            refused = server.post(path, {**body, name: None})
            assert refused.status_code == 400, (path, name)
            error = methods["post"]["responses"]["400"]["content"]["application/json"]["schema"]["$ref"]
            jsonschema.validate(refused.json(), document["components"]["schemas"][error.rpartition("/")[2]])
