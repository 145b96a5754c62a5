"""Tools over HTTP: calls that are forced, calls that are found, streamed or not, with OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
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


# --- OpenAI's Responses -----------------------------------------------------------------------------------------------

FLAT: list[Any] = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
FIRST_ROUND = f"{CALLS}\nWait."


def responses_of(client: openai.OpenAI, **given: Any) -> tuple[Any, list[Any]]:
    """The answer in one piece, and its events."""
    options: Any = {"model": "x", "input": "Is it hot?", "tools": FLAT, **given}
    return client.responses.create(**options), list(client.responses.create(**options, stream=True))


def outputs(response: Any) -> list[tuple[str, str, str]]:
    """Items of an output: text or call, what it says, its status."""
    return [
        ("call", one.arguments, one.status)
        if one.type == "function_call"
        else ("text", one.content[0].text, one.status)
        for one in response.output
    ]


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_calls_in_responses_are_items_between_texts(model: Model, cut: int) -> None:
    """What Codex needs: calls as items of their own, in order, the same streamed."""
    pieces = [piece(FIRST_ROUND[i : i + cut], 5) for i in range(0, len(FIRST_ROUND), cut)]
    service = Scripted(model, lambda job: [*pieces, end(FIRST_ROUND, "length" if job.max_tokens == 9 else "eos")])
    with running(service, lambda: model) as server, client_of(server) as client:
        whole, events = responses_of(client)
        oslo, rome = '{"city": "Oslo"}', '{"city": "Rome"}'
        expected = [("text", "I look."), ("call", oslo), ("call", rome), ("text", "\nWait.")]
        assert outputs(whole) == [(*one, "completed") for one in expected]
        assert (whole.status, [tool.name for tool in whole.tools], whole.tool_choice) == (
            "completed",
            ["weather"],
            "auto",
        )
        assert len({one.id for one in whole.output} | {one.call_id for one in whole.output[1:3]}) == 6
        assert outputs(events[-1].response) == outputs(whole)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == events[-1].response.output
        added = [event for event in events if event.type == "response.output_item.added"]
        assert [(event.output_index, event.item.id) for event in added] == list(enumerate(one.id for one in done))
        for kind, field in (("output_text", "text"), ("function_call_arguments", "arguments")):
            said: dict[int, str] = {}
            for event in events:
                if event.type == f"response.{kind}.delta":
                    said[event.output_index] = said.get(event.output_index, "") + event.delta
            told = {e.output_index: getattr(e, field) for e in events if e.type == f"response.{kind}.done"}
            assert (
                said == told == {i: text for i, (_, text) in enumerate(expected) if (i in (1, 2)) == (field != "text")}
            )
        cut_off, events = responses_of(client, max_output_tokens=9)
        assert [status for _, _, status in outputs(cut_off)] == ["completed"] * 3 + ["incomplete"]
        assert outputs(events[-1].response) == outputs(cut_off)
        assert events[-1].type == "response.incomplete"
        with client.responses.stream(model="x", input="Is it hot?", tools=FLAT) as stream:  # which puts them together
            assert [*map(type, outputs(stream.get_final_response()))] == [tuple] * 4
        plain, events = responses_of(client, tools=[{"type": "web_search"}])
        assert outputs(plain) == outputs(events[-1].response) == [("text", FIRST_ROUND, "completed")]


def test_an_empty_answer_is_one_empty_text_in_each_form(model: Model) -> None:
    with running(Scripted(model, lambda _: [end("")]), lambda: model) as server, client_of(server) as client:
        whole, events = responses_of(client)
        assert outputs(whole) == outputs(events[-1].response) == [("text", "", "completed")]
        with claude_of(server) as claude:
            message, kinds = messages_of(claude)
            assert [block.text for block in message.content] == [""]
            assert kinds[1:3] == ["content_block_start", "content_block_stop"]


def test_results_of_tools_come_back_in_responses(model: Model) -> None:
    """A turn of the model is one message, whatever items it came in."""
    items: list[Any] = [
        {"role": "user", "content": "Hot?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "cold"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "hot"}]},
    ]
    service = Scripted(model, lambda _: [piece("Yes"), end("Yes")])
    with running(service, lambda: model) as server:
        assert server.post("/v1/responses", {"input": items, "tools": FLAT}).status_code == 200
        told = model.detokenize(service.jobs[0].prompt)
    assert told.endswith(
        "<user> Hot?\n<assistant> I look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
        "<user> <tool_response>\ncold\n</tool_response>\n<user> <tool_response>\nhot\n</tool_response>\n<assistant>"
    )


# --- Anthropic's Messages ---------------------------------------------------------------------------------------------

CLAUDE: list[Any] = [{"name": "weather", "input_schema": PARAMETERS}]


def claude_of(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, _strict_response_validation=True)


def messages_of(claude: anthropic.Anthropic, **given: Any) -> tuple[Any, list[str]]:
    """The answer in one piece, which is the same streamed, and the kinds of its events."""
    options: Any = {"model": "x", "messages": MESSAGES, "max_tokens": 200, "tools": CLAUDE, **given}
    whole = claude.messages.create(**options)
    kinds = [event.type for event in claude.messages.create(**options, stream=True)]
    with claude.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert (streamed.stop_reason, streamed.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert blocks(streamed) == blocks(whole)
    return whole, kinds


def blocks(message: Any) -> list[Any]:
    return [one.text if one.type == "text" else (one.name, one.input) for one in message.content]


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_calls_in_messages_are_blocks_between_texts(model: Model, cut: int) -> None:
    """What Claude Code needs: calls as blocks, in order, the same streamed, and the reason `tool_use`."""
    pieces = [piece(FIRST_ROUND[i : i + cut], 5) for i in range(0, len(FIRST_ROUND), cut)]
    service = Scripted(model, lambda job: [*pieces, end(FIRST_ROUND, "length" if job.max_tokens == 9 else "eos")])
    with running(service, lambda: model) as server, claude_of(server) as claude:
        whole, kinds = messages_of(claude)
        called = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"})]
        assert blocks(whole) == ["I look.", *called, "\nWait."]
        assert whole.stop_reason == "tool_use"
        assert all(block.id.startswith("toolu_") for block in whole.content[1:3])
        assert [kinds.count(f"content_block_{kind}") for kind in ("start", "stop")] == [4, 4]
        assert kinds[-2:] == ["message_delta", "message_stop"]
        assert messages_of(claude, max_tokens=9)[0].stop_reason == "max_tokens"
        alone = {"type": "auto", "disable_parallel_tool_use": True}
        assert [type(one) for one in blocks(messages_of(claude, tool_choice=alone)[0])] == [str, tuple, str]
        assert blocks(messages_of(claude, tool_choice={"type": "none"})[0]) == [FIRST_ROUND]


def test_results_of_tools_come_back_in_messages(model: Model) -> None:
    turns: list[Any] = [
        {"role": "user", "content": "Hot?"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "cold"}]},
            {"type": "text", "text": "And?"}]},
    ]  # fmt: skip
    service = Scripted(model, lambda _: [piece("Yes"), end("Yes")])
    with running(service, lambda: model) as server:
        body = {"messages": turns, "max_tokens": 5, "tools": CLAUDE}
        assert server.post("/v1/messages", body).status_code == 200
        told = service.jobs[0].prompt
        assert server.post("/v1/messages/count_tokens", body).json() == {"input_tokens": len(told)}
    assert model.detokenize(told).endswith(
        '<assistant> I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        "<user> <tool_response>\ncold\n</tool_response>\n<user> And?\n<assistant>"
    )


# --- forced, with the real engine -------------------------------------------------------------------------------------


def test_forced_calls_in_the_other_forms(server: Running) -> None:
    sampled = {"temperature": 1.5, "seed": 3}
    with client_of(server) as client:
        for choice in ("required", {"type": "function", "name": "weather"}):
            whole, events = responses_of(
                client, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=200, extra_body=sampled
            )
            assert whole.tool_choice == choice or whole.tool_choice.name == "weather"
            assert outputs(events[-1].response) == outputs(whole)
            (kind, arguments, status), *others = outputs(whole)
            assert (kind, status, others) == ("call", "completed", [])
            jsonschema.validate(json.loads(arguments), PARAMETERS)
    with claude_of(server) as claude:
        for kind in ({"type": "any"}, {"type": "tool", "name": "weather"}):
            message, _ = messages_of(
                claude, tool_choice={**kind, "disable_parallel_tool_use": True}, extra_body=sampled
            )
            assert message.stop_reason == "tool_use"
            jsonschema.validate(blocks(message)[0][1], PARAMETERS)
