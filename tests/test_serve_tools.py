"""Tools over HTTP: calls that are forced, calls that are found, streamed or not, with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from serving import Running, Scripted, end, piece, running

import runtime
from runtime.model import Model, open_model
from runtime.options import RunOptions
from runtime.serve.service import Service

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
MESSAGES: list[Any] = [{"role": "user", "content": "Is it hot in Oslo?"}]
CALLS = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n' \
    '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=2, n_ctx=512, device="none", ffn="exact") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(tiny_gguf: Path) -> Iterator[Running]:
    options = RunOptions(ffn="exact", threads=2, n_ctx=512, n_cells=1024)
    with running(Service(2, 8), lambda: open_model(tiny_gguf, options)) as found:
        yield found


def client_of(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_made_and_is_the_same_streamed(server: Running, choice: Any) -> None:
    with client_of(server) as client:
        given: Any = {"model": "x", "messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 200}
        for seed in range(3):
            options: Any = {**given, "seed": seed, "temperature": 1.5, "parallel_tool_calls": False}
            reply = client.chat.completions.create(**options)
            chosen = reply.choices[0]
            assert chosen.finish_reason == "tool_calls"
            assert chosen.message.content is None
            assert chosen.message.tool_calls
            function: Any = chosen.message.tool_calls[0]
            assert function.function.name == "weather"
            jsonschema.validate(json.loads(function.function.arguments), PARAMETERS)
            chunks = [chunk for chunk in client.chat.completions.create(**options, stream=True) if chunk.choices]
            calls: list[Any] = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            assert [call.function.arguments for call in calls] == [function.function.arguments]
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("cut", [1, 3, 7, 1000])
def test_cases_19_48_and_49_calls_among_text(model: Model, cut: int) -> None:
    """Cases 19, 48 and 49: text beside calls stays, indices and ids are their own, the reason is `tool_calls`."""
    pieces = [piece(CALLS[i : i + cut], 5) for i in range(0, len(CALLS), cut)]
    service = Scripted(model, lambda _: [*pieces, end(CALLS)])
    with running(service, lambda: model) as server, client_of(server) as client:
        given: Any = {"model": "x", "messages": MESSAGES, "tools": TOOLS}
        chosen = client.chat.completions.create(**given).choices[0]
        assert (chosen.message.content, chosen.finish_reason) == ("I look.", "tool_calls")
        found: list[Any] = list(chosen.message.tool_calls or ())
        assert [json.loads(call.function.arguments)["city"] for call in found] == ["Oslo", "Rome"]
        chunks = list(client.chat.completions.create(**given, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == "I look."
        calls: list[Any] = [call for delta in deltas for call in delta.tool_calls or ()]
        assert [call.index for call in calls] == [0, 1]
        assert len({call.id for call in calls}) == 2
        assert [c.function.arguments for c in calls] == [c.function.arguments for c in found]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        plain = client.chat.completions.create(model="x", messages=MESSAGES).choices[0]
        assert (plain.message.content, plain.finish_reason) == (CALLS, "stop")


def test_tools_are_part_of_the_prompt_and_none_are_not(model: Model) -> None:
    service = Scripted(model, lambda _: [piece("Yes"), end("Yes")])
    with running(service, lambda: model) as server:
        for fields in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS}):
            reply = server.post("/v1/chat/completions", {"messages": MESSAGES, **fields})
            assert reply.json()["choices"][0]["message"] == {"role": "assistant", "content": "Yes", "refusal": None}
        prompts = [model.detokenize(job.prompt) for job in service.jobs]
        assert prompts[0] == prompts[1] == prompts[2]
        assert '"name": "weather"' in prompts[3]
        for fields, param in (({"tools": [5]}, "tools[0]"), ({"tool_choice": "required"}, "tool_choice")):
            error = server.post("/v1/chat/completions", {"messages": MESSAGES, **fields}).json()["error"]
            assert error["param"] == param
