"""Cases of docs/serve.md that no other file has: prompts that nobody waits for, texts held back, a full pool; and that the table there names tests that are there."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import TEMPLATE, Running, running
from test_service import GREEDY, TEXT, answer, with_service

from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.jobs import End, Job, Progress
from runtime.serve.service import Service, Ticket
from runtime.serve.settings import Settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server(converted: Callable[..., Path]) -> Iterator[Running]:
    options = RunOptions(threads=1, device="none", kv_type="f32", n_ctx=128)
    with running(
        Service(2, 20), lambda: open_model(converted("bundled"), options), Settings(chat_template=TEMPLATE)
    ) as found:
        yield found


# --- prompts and cells ------------------------------------------------------------------------------------------------


def slowed(service: Service, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.03) -> None:
    """Let each step take so long, at least."""
    compute = service.model.engine.compute

    def slow(*given: Any) -> Any:
        time.sleep(seconds)
        return compute(*given)

    monkeypatch.setattr(service.model.engine, "compute", slow)


def test_case_3_a_long_prompt_ends_within_a_piece(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 3: whoever leaves while a prompt is computed is not computed for beyond the piece that has begun."""

    async def test(service: Service) -> None:
        slowed(service, monkeypatch)
        ticket = service.submit(Job(tuple(service.model.tokenize(TEXT)[:240]), 5, GREEDY))[0]
        done = 0
        async for event in ticket:
            if isinstance(event, Progress) and event.done and not done:
                done = event.done
                ticket.cancel()
            last = event
        assert isinstance(last, End) and last.reason == "cancelled"
        assert done == 17
        await asyncio.sleep(0.2)
        assert service.figures().counts.prompt_tokens <= 2 * done
        assert not service.slots()

    with_service(tiny_gguf, test, n_batch=17)


def test_case_53_a_full_pool_lets_requests_wait(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 53: more is asked for than there are cells: each request gets its whole answer, some of them later."""

    async def test(service: Service) -> None:
        slowed(service, monkeypatch, 0.001)
        prompts = [tuple(service.model.tokenize(TEXT[k * 50 :])[:100]) for k in range(5)]
        jobs = [Job(prompt, 16, GREEDY, ignore_eos=True) for prompt in prompts]
        alone = [(await answer(service.submit(job)[0])).text for job in jobs]
        most = 0

        async def watched(ticket: Ticket) -> End:
            nonlocal most
            async for event in ticket:
                most = max(most, service.figures().running)
                if isinstance(event, End):
                    return event
            raise AssertionError

        ends = await asyncio.gather(*(watched(service.submit(job)[0]) for job in jobs))
        assert [(end.text, end.reason, end.stats.tokens) for end in ends] == [(text, "length", 16) for text in alone]
        assert most == 2  # of 115 cells each

    with_service(tiny_gguf, test, n_cells=300, parallel=5)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "reason"), [({}, "stop"), ({"max_tokens": 3}, "length")])
def test_case_12_what_was_held_back_is_told_at_the_end(server: Running, fields: dict[str, Any], reason: str) -> None:
    """Case 12: an end that might have become a stop text comes with the end of the text, and with that of the room."""
    body = {"prompt": "The", "grammar": 'root ::= "a king END"', "temperature": 0, **fields}
    plain = server.post("/v1/completions", body).json()["choices"][0]
    assert plain["finish_reason"] == reason
    held = {**body, "stop": [plain["text"][-3:] + "#", plain["text"][-1:] + "never"]}
    assert server.post("/v1/completions", held).json()["choices"][0] == plain
    events = server.events("/v1/completions", held)[:-1]
    assert "".join(event["choices"][0]["text"] for event in events) == plain["text"]
    assert events[-1]["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_case_22_no_content_in_any_role(server: Running, role: str) -> None:
    """Case 22: null, or none at all, is an empty text."""
    after = {"role": "user", "content": "Hi"}
    for content in ({"content": None}, {}, {"content": ""}, {"content": []}):
        reply = server.post("/v1/chat/completions", {"messages": [{"role": role, **content}, after], "max_tokens": 1})
        assert reply.status_code == 200, reply.text


def test_case_8_nothing_of_a_long_prompt_is_computed(server: Running) -> None:
    """Case 8: in each form a 400 with both numbers, before anything is computed."""
    text = "word " * 200
    chat = [{"role": "user", "content": text}]
    before = server.service.figures().counts.prompt_tokens
    for path, body in {
        "/v1/completions": {"prompt": text},
        "/completion": {"prompt": text},
        "/v1/chat/completions": {"messages": chat},
        "/v1/responses": {"input": text},
        "/v1/messages": {"messages": chat, "max_tokens": 5},
    }.items():
        for stream in (False, True):
            reply = server.post(path, {**body, "stream": stream})
            error = reply.json()["error"]
            assert (reply.status_code, error["type"], error["n_ctx"]) == (400, "invalid_request_error", 128), path
            assert error["n_prompt_tokens"] > 200
    assert server.service.figures().counts.prompt_tokens == before


def test_case_50_no_embeddings(server: Running) -> None:
    """Case 50: a 404 in OpenAI's form, not something that looks like one."""
    reply = server.post("/v1/embeddings", {"input": "x", "model": "model"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "not_found_error")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_table_names_tests_that_are_there() -> None:
    """Each case has a row, and each test that it names exists."""
    text = (ROOT / "docs/serve.md").read_text(encoding="utf-8").partition("\n## The cases\n")[2]
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 56))
    for number, tests in rows:
        named = re.findall(r"`([\w/]+)`: `(\w+)`", tests)
        assert named, number
        for file, name in named:
            assert name in _tests(file), f"case {number}: {file} has no {name}"


@functools.cache
def _tests(file: str) -> frozenset[str]:
    """Names of the tests in a file."""
    text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))
