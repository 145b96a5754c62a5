"""Answers of a form that the request gives, over HTTP: they have it, or the request fails, alone (cases 28 to 30)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from serving import Running, running

from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.service import Service

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAT = {"messages": [{"role": "user", "content": "Who is it?"}], "max_tokens": 150}
HOSTILE = 'root ::= "a" root "b" | "a" root "c" | "a" root "d" | "\\x01"'


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Running]:
    options = RunOptions(ffn="exact", threads=2, n_ctx=256, n_cells=1024)
    with running(Service(4, 16), lambda: open_model(tiny_gguf, options)) as found:
        yield found


def content(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("seed", range(6))
def test_json_of_a_schema(server: Running, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    body = {**CHAT, "seed": seed, "temperature": 1.5, "top_k": 0}
    reply = server.post("/v1/chat/completions", {**body, "response_format": form})
    jsonschema.validate(json.loads(content(reply)), SCHEMA)
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    events = server.events("/v1/chat/completions", {**body, "response_format": form})
    joined = "".join(e["choices"][0]["delta"].get("content") or "" for e in events[:-1] if e["choices"])
    assert joined == content(reply)
    same = server.post("/v1/chat/completions", {**body, "json_schema": SCHEMA})
    assert content(same) == content(reply)


def test_json_objects_and_grammars(server: Running) -> None:
    for seed in range(4):
        bias = {'"': 3, "}": 6}
        body = {**CHAT, "seed": seed, "response_format": {"type": "json_object"}, "logit_bias": bias}
        reply = server.post("/v1/chat/completions", body)
        if reply.json()["choices"][0]["finish_reason"] == "stop":
            assert isinstance(json.loads(content(reply)), dict)
        else:
            assert content(reply).startswith("{")
    body = {"prompt": "My phone is", "grammar": 'root ::= " " [0-9]{3} "-" [0-9]{4}', "ignore_eos": True}
    text = server.post("/v1/completions", body).json()["choices"][0]["text"]
    assert re.fullmatch(r" \d{3}-\d{4}", text)
    assert server.post("/v1/chat/completions", {**CHAT, "response_format": {"type": "text"}}).status_code == 200


def json_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grammar": "root ::= ("}, "grammar"),
        ({"grammar": 'root ::= root "a"'}, "grammar"),
        ({"grammar": "root ::= " + "(" * 10000}, "grammar"),
        ({"json_schema": 5}, "json_schema"),
        ({"json_schema": {"type": "string", "pattern": "(?=x)"}}, "json_schema"),
        (json_schema({"type": "string", "pattern": "\\p{L}"}), "response_format"),
        (json_schema({"not": {"type": "null"}}), "response_format"),
        (json_schema({"$ref": "#"}), "response_format"),
        (json_schema(None), "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}}, "grammar"),
    ],
)
def test_cases_28_and_29_what_cannot_be_promised_is_a_400(server: Running, fields: dict[str, Any], param: str) -> None:
    """Cases 28 and 29: never a crash, never an answer without its form."""
    for stream in (False, True):
        reply = server.post("/v1/chat/completions", {**CHAT, "stream": stream, **fields})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert server.get("/health").status_code == 200


def test_case_30_a_grammar_that_fails_midway_ends_its_own_request(server: Running) -> None:
    """Case 30: an answer that cannot go on is an error of its request; others do not notice."""
    plain = {"prompt": "The people", "temperature": 0, "max_tokens": 60}
    alone = server.post("/v1/completions", plain).json()["choices"][0]["text"]
    forbidden = {
        "prompt": "x",
        "grammar": 'root ::= "aaaaaaaaaaaaaaaaaaaaaaaaaaaa" root "b" | "q" [b-c]',
        "max_tokens": 60,
    }
    hostile = {"prompt": "x", "grammar": HOSTILE, "max_tokens": 150, "temperature": 0}
    with ThreadPoolExecutor(6) as pool:
        bad = [pool.submit(server.post, "/v1/completions", body) for body in (hostile, forbidden)]
        good = [pool.submit(server.post, "/v1/completions", plain) for _ in range(3)]
        assert [reply.result().json()["choices"][0]["text"] for reply in good] == [alone] * 3
        replies = [reply.result() for reply in bad]
    assert replies[0].status_code == 400
    assert "ambiguous" in replies[0].json()["error"]["message"]
    assert server.get("/health").json()["status"] == "ok"
    events = server.events("/v1/completions", hostile)
    assert any("error" in event for event in events if isinstance(event, dict))
