"""What is used after `close`, by several threads, or not at all."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handles import Handles

import runtime
from runtime.bindings import logs
from runtime.model import Model
from runtime.text.sampling import Sampling
from runtime.text.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)


@pytest.fixture
def path(converted: Callable[..., Path]) -> Path:
    return converted("bundled", "q4_0")


# --- after close ------------------------------------------------------------------------------------------------------

USES: dict[str, Callable[[Model], object]] = {
    "logits": lambda m: m.logits([5]),
    "generate": lambda m: m.generate("x"),
    "generate ids": lambda m: m.generate([5]),
    "tokenize": lambda m: m.tokenize("x"),
    "detokenize": lambda m: m.detokenize([5]),
    "stats": lambda m: m.stats(),
    "layer_shares": lambda m: m.layer_shares(),
    "gate_shares": lambda m: m.gate_shares(),
    "reset_counts": lambda m: m.reset_counts(),
    "device_bytes": lambda m: m.device_bytes(),
    "encode": lambda m: m.tokenizer.encode("x"),
    "token_bytes": lambda m: m.tokenizer.token_bytes(5),
    "is_eog": lambda m: m.tokenizer.is_eog(5),
    "token_text": lambda m: m.tokenizer.token_text(5),
}


@pytest.fixture(scope="module")
def closed_model(converted: Callable[..., Path]) -> Model:
    with runtime.load(converted("bundled", "q4_0")) as model:
        list(model.generate("x", 1))
    return model


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_what_is_used_after_close_says_so(closed_model: Model, use: Callable[[Model], object]) -> None:
    with pytest.raises(runtime.UserError, match=r"`: the (model|tokenizer) is closed"):
        use(closed_model)
    closed_model.close()


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_generation_of_a_closed_model_ends_with_an_error(path: Path, handles: Handles, n: int) -> None:
    with runtime.load(path) as model:
        generation = model.generate("We the people", 50, GREEDY)
        for _ in range(n):
            next(generation)
    with pytest.raises(runtime.UserError, match="is closed"):
        list(generation)
    assert list(generation) == []
    assert handles.live == {}


def test_closing_while_others_generate(path: Path, handles: Handles) -> None:
    """From several threads at once: each close waits until all is freed, each generation ends with an error."""
    model = runtime.load(path)
    ends: list[str] = []
    begun = threading.Semaphore(0)

    def generate() -> None:
        try:
            while True:
                for _ in model.generate("We the people", 200):
                    begun.release()
        except runtime.UserError as error:
            ends.append(error.message)

    def close() -> None:
        model.close()
        ends.append(str(sum(count for (free, _), count in handles.live.items() if free.startswith("ggml_"))))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    closers = [threading.Thread(target=close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(9):
        begun.acquire()
    for thread in (*closers, *threads):
        if thread in closers:
            thread.start()
    for thread in (*closers, *threads):
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(ends)[:3] == ["0"] * 3
    assert all("is closed" in end for end in sorted(ends)[3:])
    assert handles.live == {}


# --- generations ------------------------------------------------------------------------------------------------------


def test_a_generation_that_is_never_iterated_holds_nothing(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:
        kept = [model.generate("We the people") for _ in range(3)]
        assert "llama_sampler_free" not in [free for free, _ in handles.live]
        assert len({generation.seed for generation in kept}) == 3
    assert handles.live == {}


def test_a_callback_or_another_thread_may_close_a_generation(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:
        closing = model.generate("We the people", 50, GREEDY, on_token=lambda _: closing.close())
        list(closing)
        assert len(closing.token_ids) == 1

        def close_elsewhere(_: object) -> None:
            thread = threading.Thread(target=generation.close)
            thread.start()
            thread.join()

        generation = model.generate("We the people", 50, GREEDY, on_token=close_elsewhere)
        next(generation)
        assert list(generation) == []
        assert len(generation.token_ids) == 1
        assert "llama_sampler_free" not in [free for free, _ in handles.live]


def test_closing_an_asynchronous_generation_from_another_task(path: Path, handles: Handles) -> None:
    with runtime.load(path) as model:

        async def main() -> int:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            generation = model.generate(
                "We the people", 400, GREEDY, on_token=lambda _: loop.call_soon_threadsafe(begun.set)
            )

            async def consume() -> None:
                async for _ in generation:
                    pass

            task = asyncio.create_task(consume())
            await begun.wait()
            generation.close()
            await asyncio.wait_for(task, 60)
            return len(generation.token_ids)

        assert asyncio.run(main()) < 400
    assert handles.live == {}


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_get_the_bytes_of_their_own_tokens(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks between libllama's answer and the moment that it is read."""
    from runtime.bindings import llama

    with Tokenizer(tiny_gguf) as tokenizer:
        expected = [tokenizer.token_bytes(token) for token in (400, 401)]
        piece = llama.llama_token_to_piece

        def interrupted(vocab: Any, token: int, *rest: Any) -> Any:
            answer = piece(vocab, token, *rest)
            if token == 400:
                thread = threading.Thread(target=lambda: found.append(tokenizer.token_bytes(401)))
                thread.start()
                thread.join()
            return answer

        monkeypatch.setattr(llama, "llama_token_to_piece", interrupted)
        found: list[bytes] = []
        assert [tokenizer.token_bytes(400), *found] == expected


def test_a_tokenizer_is_freed_when_its_last_call_returns(
    path: Path, handles: Handles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.bindings import llama

    tokenizer = Tokenizer(path)
    expected = tokenizer.encode("We the people")
    tokenize, inside, go_on = llama.llama_tokenize, threading.Event(), threading.Event()

    def held(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        assert handles.live  # not freed under our feet
        return tokenize(*arguments)

    monkeypatch.setattr(llama, "llama_tokenize", held)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(tokenizer.encode("We the people")))
    thread.start()
    assert inside.wait(60)
    tokenizer.close()
    go_on.set()
    thread.join()
    assert found == [expected]
    assert handles.live == {}


def test_each_thread_reads_its_own_log() -> None:
    inside, go_on = threading.Event(), threading.Event()
    logs_of: dict[str, list[str]] = {}

    def say(text: bytes) -> None:
        logs._print_or_keep(3, text, None)

    def other() -> None:
        with logs.captured_log() as lines:
            say(b"of the other\n")
            inside.set()
            assert go_on.wait(60)
        logs_of["other"] = lines

    thread = threading.Thread(target=other)
    with logs.captured_log() as lines:
        thread.start()
        assert inside.wait(60)
        say(b"of this one\n")
    go_on.set()
    thread.join()
    assert (lines, logs_of["other"]) == (["of this one"], ["of the other"])
