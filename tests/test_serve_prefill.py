"""A last message of the assistant is continued: its prompt, and what the endpoints make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from serving import TEMPLATE, Running, Scripted, end, piece, running

import runtime
from runtime.model import Model
from runtime.serve.conversation import chat_ids, chat_prompt, plain
from runtime.serve.errors import ApiError
from runtime.serve.settings import Settings
from runtime.serve.tools import tools_of

USER = {"role": "user", "content": "Who are you?"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def continued(template: str, text: str, **more: Any) -> str:
    return plain(chat_prompt(template, [USER, {"role": "assistant", "content": text}], SPECIAL, continues=True, **more))


@pytest.mark.parametrize("text", ["I am", "I am ", "", "I am </s> a", "\ufdd2I am", "I\n"])
def test_the_prompt_ends_where_the_message_does(text: str) -> None:
    """Spaces at its end count, also where the template cuts them off; what the template puts before it stays."""
    clean = text.replace("\ufdd2", "")
    assert continued(LLAMA_2, text) == f"<s>[INST] Who are you? [/INST] {clean}"
    head = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    assert continued(CHATML, text) == head + clean


def test_special_tokens_that_it_spells_stay_text(model: Model) -> None:
    prompt = chat_prompt(LLAMA_2, [USER, {"role": "assistant", "content": "a </s> b"}], SPECIAL, continues=True)
    ids = chat_ids(prompt, model.tokenize)
    assert model.tokenizer.eos not in ids
    assert ids[0] == model.tokenizer.bos


def test_tools_that_are_told_in_words_change_nothing() -> None:
    tools = tools_of({"tools": [{"name": "look"}]})
    assert continued(CHATML, "I am", tools=tools).endswith("<|im_start|>assistant\nI am")


def test_a_template_that_leaves_it_out() -> None:
    with pytest.raises(ApiError) as refused:
        continued("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "I am")
    assert (refused.value.status, refused.value.param) == (400, "messages")


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, device="none") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    service = Scripted(model, lambda _: [piece(" a king"), end(" a king")])
    with running(service, lambda: model, Settings(chat_template=TEMPLATE)) as found:
        yield found


CONVERSATION = [USER, {"role": "assistant", "content": "I am"}]
ON, NEXT, CLOSED = "<assistant> I am", "<assistant> I am\n<assistant>", "<assistant> I am\n"


@pytest.mark.parametrize(
    ("fields", "ending"),
    [
        ({}, ON),
        ({"continue_final_message": True, "add_generation_prompt": False}, ON),
        ({"continue_final_message": True}, ON),
        ({"add_generation_prompt": True}, ON),
        ({"continue_final_message": False}, NEXT),
        ({"continue_final_message": False, "add_generation_prompt": False}, CLOSED),
        ({"add_generation_prompt": False}, CLOSED),
    ],
)
def test_what_a_request_may_say(server: Running, model: Model, fields: dict[str, bool], ending: str) -> None:
    assert isinstance(server.service, Scripted)
    body = {"messages": CONVERSATION, **fields}
    prompt = server.post("/apply-template", body).json()["prompt"]
    assert prompt == f"<s><user> Who are you?\n{ending}"
    whole = server.post("/v1/chat/completions", body).json()
    assert whole["choices"][0]["message"]["content"] == " a king"
    assert server.service.jobs[-1].prompt == chat_ids(prompt, model.tokenize)
    chunks = server.events("/v1/chat/completions", body)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == " a king"


def test_what_cannot_be_continued(server: Running) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
    for messages, more in (
        ([USER], {}),
        ([USER, called], {}),
        (CONVERSATION, {"add_generation_prompt": True}),
    ):
        for path in ("/v1/chat/completions", "/apply-template"):
            reply = server.post(path, {"messages": messages, "continue_final_message": True, **more})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "continue_final_message")
    assert server.post("/apply-template", {"messages": [USER, called]}).json()["prompt"].endswith("\n<assistant>")


def test_anthropics_prefill_and_no_one_in_responses(server: Running, model: Model) -> None:
    assert isinstance(server.service, Scripted)
    messages: Any = CONVERSATION
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as claude:
        found = claude.messages.create(model="x", max_tokens=9, messages=messages)
        assert [block.text for block in found.content if block.type == "text"] == [" a king"]
        prompt = server.service.jobs[-1].prompt
        assert model.detokenize(prompt).endswith(ON)
        count = claude.messages.count_tokens(model="x", messages=messages)
        assert count.input_tokens == len(prompt)
    body = {"input": CONVERSATION}
    assert server.post("/v1/responses", body).status_code == 200
    prompt = server.service.jobs[-1].prompt
    assert model.detokenize(prompt).endswith(NEXT)
    assert server.post("/v1/responses/input_tokens", body).json()["input_tokens"] == len(prompt)
