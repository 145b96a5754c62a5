"""The clients that people have: openai (with strict validation of what comes back), anthropic, litellm."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from serving import TEMPLATE, Running, running

from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.service import Service
from runtime.serve.settings import Settings

KEY = "a-key-of-the-tests"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def server(converted: Callable[..., Path]) -> Iterator[Running]:
    options = RunOptions(threads=1, device="none", n_ctx=256)
    settings = Settings("tiny", keys=(KEY,), chat_template=TEMPLATE)
    with running(Service(4, 8), lambda: open_model(converted("bundled"), options), settings) as found:
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    address = f"{server.url}/v1/"
    with openai.OpenAI(base_url=address, api_key=KEY, _strict_response_validation=True, max_retries=0) as found:
        yield found


@pytest.fixture
def claude(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=server.url, api_key=KEY, _strict_response_validation=True, max_retries=0
    ) as found:
        yield found


# --- openai -----------------------------------------------------------------------------------------------------------


def test_openai_chat(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text
    assert whole.choices[0].logprobs
    assert whole.choices[0].logprobs.content
    assert len(whole.choices[0].logprobs.content) == 12
    assert whole.usage
    assert whole.usage.completion_tokens == 12
    assert whole._request_id
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    with client.chat.completions.stream(**options) as stream:  # the helper that puts the pieces together
        for _ in stream:
            pass
        assert stream.current_completion_snapshot.choices[0].message.content == text


def test_openai_completions(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": ["My fellow", "The"], "max_tokens": 6, "temperature": 0}
    # With probabilities of the prompt, too, its first token has none: null, as OpenAI's own server says it. The schema
    # that is checked here knows none, so this is left to test_serve_answers.py.
    whole = client.completions.create(**options, n=2, echo=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].text == whole.choices[1].text
    assert whole.choices[2].text.startswith("The")
    # Chunks end with a reason, and have none before: the schema, which is that of whole answers, knows no such chunk.
    with openai.OpenAI(base_url=client.base_url, api_key=KEY, max_retries=0) as lenient:
        chunks = list(lenient.completions.create(**options, stream=True, echo=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in (0, 1)]
    assert texts == [whole.choices[0].text, whole.choices[2].text]


def test_openai_responses(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "input": "Who are you?", "instructions": "Be brief.", "temperature": 0}
    whole = client.responses.create(**options, max_output_tokens=12)
    assert whole.output_text
    assert whole.usage
    assert whole.usage.output_tokens == 12
    with client.responses.stream(**options, max_output_tokens=12) as stream:
        kinds = [event.type for event in stream]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.incomplete"
        assert "response.output_text.delta" in kinds


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lazyneuron"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_openai_errors(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=1000)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    assert caught.value.request_id
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="word " * 1000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0).models.list()


def test_openai_asynchronous(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:

            async def one(i: int) -> str:
                prompt: Any = [{"role": "user", "content": f"Number {i}"}]
                stream = await client.chat.completions.create(
                    model="tiny", messages=prompt, max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(i) for i in range(6)))

    assert len(asyncio.run(ask())) == 6


# --- anthropic --------------------------------------------------------------------------------------------------------


def test_anthropic(claude: anthropic.Anthropic) -> None:
    options: Any = {"model": "tiny", "system": "Be brief.", "messages": MESSAGES[1:], "max_tokens": 12}
    options |= {"extra_body": {"temperature": 0}}  # which newer clients have no name for
    whole = claude.messages.create(**options)
    assert whole.stop_reason == "max_tokens"
    text = whole.content[0].text  # type: ignore[union-attr]
    assert text
    with claude.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == 12
    count = claude.messages.count_tokens(model="tiny", system="Be brief.", messages=MESSAGES[1:])
    assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**{**options, "extra_body": {"temperature": 1000}})
    assert "temperature" in str(caught.value)


# --- litellm ----------------------------------------------------------------------------------------------------------


def test_litellm(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or its import looks for one on the network
    import litellm

    options: Any = {"model": "openai/tiny", "api_base": f"{server.url}/v1", "api_key": KEY, "messages": MESSAGES}
    options |= {"max_tokens": 12, "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**options)
    text = whole.choices[0].message.content
    assert text
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
    assert "".join(pieces) == text
    with pytest.raises(litellm.exceptions.ContextWindowExceededError):  # by which routers know what to do
        litellm.completion(**{**options, "messages": [{"role": "user", "content": "word " * 1000}]})
