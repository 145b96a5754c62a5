"""The server's answers with the real engine: texts, stop texts, seeds, log-probabilities, usage. Numbers are those of the cases in docs/serve.md."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from in_process import result_of
from prometheus_client.parser import text_string_to_metric_families
from serving import TEMPLATE, Running, running

import runtime
from runtime.model import Model, open_model
from runtime.options import RunOptions
from runtime.serve.service import Service
from runtime.serve.settings import Settings

PROMPTS = [
    "My fellow citizens,",
    "The",
    "Once upon a time there was a king, and",
    "In the year of our Lord one thousand seven hundred and ninety six the Senate",
    "I have the honour to submit",
    "War is",
]


@pytest.fixture(scope="module")
def model(converted: Callable[..., Path]) -> Iterator[Model]:
    """The same file for what is computed alone: F32, so that rounding decides nothing."""
    with runtime.load(converted("bundled"), threads=1, device="none", kv_type="f32", n_ctx=256) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(converted: Callable[..., Path]) -> Iterator[Running]:
    options = RunOptions(threads=1, device="none", kv_type="f32", n_ctx=256)
    settings = Settings(chat_template=TEMPLATE)
    with running(Service(4, 60), lambda: open_model(converted("bundled"), options), settings) as found:
        yield found


def greedy(prompt: Any, n: int = 12, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": n, "temperature": 0, **more}


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def alone(model: Model, prompt: Any, n: int = 12, **more: Any) -> str:
    with model.generate(prompt, n, runtime.Sampling(temperature=0), **more) as generation:
        return "".join(generation)


# --- the same as alone ------------------------------------------------------------------------------------------------


def test_cases_4_6_33_34_55_answers_in_company_are_those_alone(server: Running, model: Model) -> None:
    """Cases 4, 6, 33, 34, 55: unequal prompts at the same time, streamed and not, some of them left half-way."""
    expected = {prompt: alone(model, prompt) for prompt in PROMPTS}

    def ask(i: int) -> None:
        prompt = PROMPTS[i % len(PROMPTS)]
        if i % 7 == 6:
            with (
                server.client() as client,
                client.stream("POST", "/v1/completions", json=greedy(prompt, 99, stream=True)) as r,
            ):
                next(r.iter_bytes())
        elif i % 2:
            events = server.events("/v1/completions", greedy(prompt))[:-1]
            assert "".join(event["choices"][0]["text"] for event in events) == expected[prompt]
        else:
            assert text_of(server.post("/v1/completions", greedy(prompt))) == expected[prompt]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(28)))


def test_case_55_greedy_text_is_that_of_the_command_line(server: Running, converted: Callable[..., Path]) -> None:
    """Case 55: also of the command line with the same options."""
    options = ("--threads", 1, "--device", "none", "--kv-type", "f32", "--n-ctx", 256, "--temp", 0, "-n", 12)
    said = result_of("runtime", "complete", converted("bundled"), "-p", PROMPTS[0], *options)
    assert text_of(server.post("/v1/completions", greedy(PROMPTS[0]))) == said["text"]


def test_cases_38_39_the_same_again_and_after_a_break(server: Running) -> None:
    """Cases 38, 39: an exact repetition has something to compute; one that was broken off leaves nothing wrong."""
    body = greedy("An answer that is asked for twice, and broken off in between:")
    first = server.post("/v1/completions", body).json()
    with (
        server.client() as client,
        client.stream("POST", "/v1/completions", json={**body, "max_tokens": 200, "stream": True}) as r,
    ):
        next(r.iter_bytes())
    again = server.post("/v1/completions", body).json()
    assert first["choices"][0]["text"] == again["choices"][0]["text"]
    assert 0 < again["usage"]["prompt_tokens_details"]["cached_tokens"] < again["usage"]["prompt_tokens"]
    fresh = server.post("/v1/completions", {**body, "cache_prompt": False}).json()
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert fresh["choices"] == again["choices"]


def test_case_7_seeds(server: Running) -> None:
    """Case 7: the same seed twice is the same text; the seed that was drawn is told."""
    body = {"prompt": "The", "max_tokens": 16, "temperature": 1.2}
    texts = [text_of(server.post("/v1/completions", {**body, "seed": seed})) for seed in (1, 1, 2, 2**40)]
    assert texts[0] == texts[1] != texts[2]
    drawn = server.post("/v1/completions", body).json()
    again = server.post("/v1/completions", {**body, "seed": drawn["lazyneuron"]["seed"]})
    assert text_of(again) == drawn["choices"][0]["text"]


def test_several_answers_have_seeds_of_their_own(server: Running) -> None:
    body = {"prompt": "The", "max_tokens": 16, "temperature": 1.2, "seed": 5}
    found = server.post("/v1/completions", {**body, "n": 3}).json()
    texts = [choice["text"] for choice in found["choices"]]
    assert len(set(texts)) == 3
    assert texts == [text_of(server.post("/v1/completions", {**body, "seed": 5 + i})) for i in range(3)]
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == 48


# --- stop texts (10, 11, 12) ------------------------------------------------------------------------------------------


def test_cases_10_11_12_stop_texts(server: Running, model: Model) -> None:
    """Cases 10 to 12: streamed text is the text in one piece, whatever may have become a stop text on the way."""
    plain = alone(model, PROMPTS[0], 40)
    draw = random.Random(4)
    for _ in range(12):
        stops = []
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(plain))
            stops.append(plain[at : at + draw.randint(1, 6)] + draw.choice(["", "", "#", "never"]))
        body = greedy(PROMPTS[0], 40, stop=stops)
        events = server.events("/v1/completions", body)[:-1]
        whole = server.post("/v1/completions", body).json()["choices"][0]
        joined = "".join(event["choices"][0]["text"] for event in events)
        found = min((plain.find(stop) for stop in stops if stop in plain), default=None)
        assert joined == whole["text"] == plain[:found], stops
        reason = "length" if found is None else "stop"
        assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == reason


def test_case_13_14_characters_of_several_bytes(converted: Callable[..., Path], emoji_gguf: Path) -> None:
    """Cases 13, 14: a model that writes emoji of many tokens: whole characters in every event."""
    options = RunOptions(threads=1, device="none", n_ctx=256)
    with running(Service(2), lambda: open_model(emoji_gguf, options)) as server:
        body = {"prompt": "x", "max_tokens": 90, "temperature": 0}
        texts = [event["choices"][0]["text"] for event in server.events("/v1/completions", body)[:-1]]
        joined = "".join(texts)
        assert joined == text_of(server.post("/v1/completions", body))
        assert max(map(ord, joined)) > 0xFFFF
        assert "\ufffd" not in joined.rstrip("\ufffd")  # it may end within a character
        assert all("\ufffd" not in text for text in texts[:-2])


# --- too long, usage --------------------------------------------------------------------------------------------------


def test_cases_5_8_9_too_long(server: Running) -> None:
    """Cases 5, 8, 9: /props tells the context of one request; what is longer is a 400 with both numbers, streamed or not."""
    n_ctx = server.get("/props").json()["n_ctx"]
    assert n_ctx == 256
    body = {"prompt": "word " * 400}
    for path, asked in {
        "/v1/completions": body,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": body["prompt"]}]},
        "/v1/responses": {"input": body["prompt"]},
    }.items():
        for stream in (False, True):
            reply = server.post(path, {**asked, "stream": stream})
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["n_ctx"]) == (400, "context_length_exceeded", n_ctx)
            assert error["n_prompt_tokens"] > 400
    almost = server.post("/v1/completions", {"prompt": [5] * (n_ctx - 1), "max_tokens": 99}).json()
    assert (almost["usage"]["completion_tokens"], almost["choices"][0]["finish_reason"]) == (1, "length")


def test_case_20_usage(server: Running) -> None:
    """Case 20: tokens told are those generated; nothing is lost at the end of a stream."""
    for n in (0, 1, 7):
        body = greedy(PROMPTS[2], n, logprobs=0, ignore_eos=True)
        whole = server.post("/v1/completions", body).json()
        assert whole["usage"]["completion_tokens"] == n
        assert len((whole["choices"][0]["logprobs"] or {"tokens": []})["tokens"]) == n
        assert whole["usage"]["prompt_tokens"] == len(
            server.post("/tokenize", {"content": PROMPTS[2], "add_special": True}).json()["tokens"]
        )
        events = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
        assert events[-2]["usage"]["completion_tokens"] == n
        assert "".join(e["choices"][0]["text"] for e in events[:-2]) == whole["choices"][0]["text"]


# --- log-probabilities (31, 32) ---------------------------------------------------------------------------------------


def logs(model: Model, ids: list[int]) -> np.ndarray:
    logits = model.logits(ids).astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )


def test_cases_31_32_log_probabilities(server: Running, model: Model) -> None:
    """Cases 31, 32: of the prompt and of the answer, by logits computed alone; while others are computed."""
    ids = model.tokenize(PROMPTS[3])
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(server.post, "/v1/completions", greedy(prompt, 30)) for prompt in PROMPTS[:2]]
        found = server.post("/v1/completions", greedy(ids, 6, echo=True, logprobs=3)).json()["choices"][0]
        for other in others:
            other.result()
    told = found["logprobs"]
    answer = alone(model, ids, 6)
    assert found["text"] == PROMPTS[3] + answer
    assert "".join(told["tokens"]) == found["text"]
    assert [
        found["text"][at:].startswith(token) for at, token in zip(told["text_offset"], told["tokens"], strict=True)
    ] == [True] * len(told["tokens"])
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    tokens = len(told["tokens"])
    assert tokens == len(ids) + 6
    whole = [*ids, *server.post("/tokenize", {"content": answer}).json()["tokens"]]
    if len(whole) == tokens:  # where the tokenizer divides the answer as the model did
        expected = logs(model, whole)
        by_model = [expected[i, whole[i + 1]] for i in range(tokens - 1)]
        np.testing.assert_allclose(told["token_logprobs"][1:], by_model, atol=2e-3)
    expected = logs(model, ids)
    by_model = [expected[i, ids[i + 1]] for i in range(len(ids) - 1)]
    np.testing.assert_allclose(told["token_logprobs"][1 : len(ids)], by_model, atol=2e-3)
    for i, row in enumerate(expected[:-1]):
        best = max(told["top_logprobs"][i + 1].values())
        assert best == pytest.approx(row.max(), abs=2e-3)
        assert len(told["top_logprobs"][i + 1]) in (3, 4)


def test_case_31_what_lm_evaluation_harness_asks(server: Running, model: Model) -> None:
    """Case 31: ids, echo, one token more; the continuation's probability is read from behind the context."""
    context, rest = model.tokenize("The President of the"), model.tokenize(" United States", add_special=False)
    body = {"prompt": [context + rest] * 2, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    for choice in server.post("/v1/completions", body).json()["choices"]:
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(context + rest) + 1
        scores = told["token_logprobs"][len(context) : -1]
        expected = logs(model, context + rest)
        by_model = [expected[len(context) - 1 + i, token] for i, token in enumerate(rest)]
        np.testing.assert_allclose(scores, by_model, atol=2e-3)
        is_greedy = [
            score == max(top.values())
            for score, top in zip(scores, told["top_logprobs"][len(context) : -1], strict=True)
        ]
        assert is_greedy == [int(expected[len(context) - 1 + i].argmax()) == token for i, token in enumerate(rest)]


def test_echo_streamed(server: Running) -> None:
    for more in ({}, {"logprobs": 2}):
        body = greedy(PROMPTS[2], 5, echo=True, **more)
        whole = server.post("/v1/completions", body).json()["choices"][0]
        events = [event["choices"][0] for event in server.events("/v1/completions", body)[:-1]]
        assert "".join(choice["text"] for choice in events) == whole["text"]
        if more:
            for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert (
                    list(itertools.chain(*(c["logprobs"][key] for c in events if c["logprobs"])))
                    == whole["logprobs"][key]
                )


def test_log_probabilities_of_chats(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0, "logprobs": True}
    found = server.post("/v1/chat/completions", {**body, "top_logprobs": 2}).json()["choices"][0]
    entries = found["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().strip() == found["message"]["content"].strip()
    for entry in entries:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]  # greedy
        assert entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
    assert server.post("/v1/chat/completions", {**body, "logprobs": False, "top_logprobs": 2}).status_code == 400


# --- chats (22 to 26) -------------------------------------------------------------------------------------------------


def prompt_of(server: Running, messages: list[Any], **more: Any) -> str:
    reply = server.post("/apply-template", {"messages": messages, **more})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["prompt"])


def test_cases_22_23_25_26_messages_of_all_forms(server: Running) -> None:
    """Cases 22, 23, 25, 26: null and parts as content, the role developer, several system messages."""
    user = {"role": "user", "content": "Hi"}
    assert prompt_of(server, [user]) == "<s><user> Hi\n<assistant>"
    assert prompt_of(server, [user, {"role": "assistant", "content": None}, user]).count("<assistant> \n") == 1
    parts = [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}]
    assert prompt_of(server, [{"role": "user", "content": parts}]) == prompt_of(server, [user])
    assert prompt_of(server, [{"role": "developer", "content": "Be brief."}, user]).startswith(
        "<s><system> Be brief.\n"
    )
    systems = [{"role": role, "content": text} for role, text in (("system", "A"), ("developer", "B"))]
    assert prompt_of(server, [*systems, user]).startswith("<s><system> A\n\nB\n<user>")
    for wrong, param in (
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([user, {"role": "wizard", "content": "x"}], "messages[1].role"),
        ([user, {"role": "user", "content": 5}], "messages[1].content"),
        ([user, "Hi"], "messages[1]"),
        ([], "messages"),
        ("Hi", "messages"),
    ):
        reply = server.post("/v1/chat/completions", {"messages": wrong})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_case_24_no_tools_are_no_tools(server: Running) -> None:
    """Case 24: an empty list changes nothing."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    texts = {
        server.post("/v1/chat/completions", {**body, **more}).json()["choices"][0]["message"]["content"]
        for more in ({}, {"tools": []}, {"tools": None, "tool_choice": None}, {"tools": [], "tool_choice": "auto"})
    }
    assert len(texts) == 1


def test_case_26_a_template_that_refuses(converted: Callable[..., Path]) -> None:
    """Cases 26, 52: what a template says is a 400; one that computes for ever is stopped."""
    options = RunOptions(threads=1, device="none", n_ctx=64)
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for template, words in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        ("{{ messages[0].content", "chat template"),
    ):
        with running(
            Service(), lambda: open_model(converted("bundled"), options), Settings(chat_template=template)
        ) as server:
            reply = server.post("/v1/chat/completions", body)
            assert reply.status_code == 400
            assert words in reply.json()["error"]["message"]
            assert server.get("/health").status_code == 200
    with running(Service(), lambda: open_model(converted("bundled"), options), Settings()) as server:
        error = server.post("/v1/chat/completions", body).json()["error"]
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]


def test_chats_in_other_forms_are_the_same_chats(server: Running) -> None:
    """/v1/responses and /v1/messages give what /v1/chat/completions gives, streamed and not; tokens are counted alike."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    more = {"temperature": 0}
    chat = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, **more}).json()
    text, n = chat["choices"][0]["message"]["content"], chat["usage"]["prompt_tokens"]

    body = {"instructions": "Be brief.", "input": "Who are you?", "max_output_tokens": 8, **more}
    found = server.post("/v1/responses", body).json()
    assert found["output"][0]["content"][0]["text"] == text
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert found["usage"]["input_tokens"] == n
    events = server.events("/v1/responses", body)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == text
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"] == [{**found["output"][0], "id": events[2]["item"]["id"]}]
    assert server.post("/v1/responses/input_tokens", body).json()["input_tokens"] == n

    body = {"system": [{"type": "text", "text": "Be brief."}], "messages": messages[1:], "max_tokens": 8, **more}
    found = server.post("/v1/messages", body).json()
    assert found["content"] == [{"type": "text", "text": text}]
    assert found["stop_reason"] == "max_tokens"
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == n
    events = server.events("/v1/messages", body)
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == text
    assert [event["type"] for event in events][-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert server.post("/v1/messages/count_tokens", body).json() == {"input_tokens": n}
    stop = text.strip()[3:5]
    found = server.post("/v1/messages", {**body, "stop_sequences": [stop]}).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)


def test_items_of_responses(server: Running) -> None:
    items: list[Any] = [
        {"role": "developer", "content": "Brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "n"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "w"}]},
    ]
    tools = [{"type": "function", "name": "look", "parameters": {}}, {"type": "web_search"}]
    items[1]["content"][0]["text"] = "?"
    reply = server.post("/v1/responses", {"input": items, "tools": tools, "max_output_tokens": 2})
    assert reply.status_code == 200, reply.text
    for wrong, param in (([{"type": "painting"}], "input[0]"), (5, "input"), ([], "input")):
        reply = server.post("/v1/responses", {"input": wrong})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert server.post("/v1/responses", {"input": "x", "previous_response_id": "r"}).status_code == 400


def test_blocks_of_messages(server: Running) -> None:
    blocks: list[Any] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "I look"}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "nothing"}]},
    ]
    assert server.post("/v1/messages", {"messages": blocks, "max_tokens": 2}).status_code == 200
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    reply = server.post("/v1/messages", {"messages": image, "max_tokens": 2})
    assert reply.json()["error"]["message"].startswith("messages[0].content[0]: ")
    assert server.post("/v1/messages", {"messages": blocks}).json()["error"]["message"] == "max_tokens: is missing"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_tokens_and_texts(server: Running, model: Model) -> None:
    ids = server.post("/tokenize", {"content": "My fellow <s>", "with_pieces": True}).json()["tokens"]
    assert [one["id"] for one in ids] == model.tokenize("My fellow <s>", add_special=False)
    assert "".join(one["piece"] for one in ids) == " My fellow <s>"
    assert server.post("/detokenize", {"tokens": [one["id"] for one in ids]}).json()["content"] == "My fellow <s>"
    for wrong in ({"tokens": [99999]}, {"tokens": ["a"]}, {"tokens": "a"}):
        assert server.post("/detokenize", wrong).status_code == 400
    assert server.post("/tokenize", {"content": 5}).json()["error"]["param"] == "content"


def test_metrics_and_slots(server: Running) -> None:
    def values() -> dict[str, float]:
        families = text_string_to_metric_families(server.get("/metrics").text)
        return {s.name + "".join(s.labels.values()): s.value for family in families for s in family.samples}

    before = values()
    found = server.post("/v1/completions", greedy(PROMPTS[1], 9, ignore_eos=True, cache_prompt=False)).json()
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["llamacpp:prompt_tokens_total"] == found["usage"]["prompt_tokens"]
    assert grown["llamacpp:tokens_predicted_total"] == found["usage"]["completion_tokens"] == 9
    assert grown["lazyneuron:answers_totallength"] == 1
    assert grown["lazyneuron:time_to_first_token_seconds_count"] == 1
    assert grown["lazyneuron:batch_tokens_bucket1"] == 8
    assert 0 < after["lazyneuron:computed_share"] < 0.5
    assert after["llamacpp:requests_processing"] == after["llamacpp:requests_deferred"] == 0
    with (
        server.client() as client,
        client.stream(
            "POST",
            "/v1/completions",
            json=greedy("The", 200, stream=True, ignore_eos=True),
            headers={"X-Request-Id": "slow"},
        ) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        pieces = reply.iter_bytes()  # kept: without it the connection ends
        next(pieces)
        busy = [slot for slot in server.get("/slots").json() if slot["is_processing"]]
        assert [slot["name"] for slot in busy] == ["slow"]
    assert len(server.get("/slots").json()) == 4


def test_case_40_health_answers_while_the_engine_computes(server: Running) -> None:
    """Case 40: many answers at once, and the loop answers others all the while."""
    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(server.post, "/v1/completions", greedy(prompt, 60, ignore_eos=True)) for prompt in PROMPTS]
        slowest = 0.0
        with server.client() as client:
            while not all(one.done() for one in work):
                began = time.perf_counter()
                assert client.get("/health").status_code == 200
                slowest = max(slowest, time.perf_counter() - began)
        assert all(one.result().status_code == 200 for one in work)
    assert slowest < 1  # 0.1 on a machine that has nothing else to do
