"""The Python interface: asynchronous generations, several threads, callbacks, logits processors, figures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import Sampling, Stats, Token, UserError
from runtime.model import Model

GREEDY = Sampling(temperature=0)
PROMPTS = ["My fellow citizens, we must", "The Congress of the United States", "Peace with all nations"]


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, ffn="exact", n_batch=16) as model:
        yield model


def continued(model: Model, prompt: Any, n: int = 12, **options: Any) -> str:
    return "".join(model.generate(prompt, n, GREEDY, **options))


def long_prompt(model: Model, n: int) -> list[int]:
    ids = model.tokenize("We hold these truths to be plain, and we say them again. " * 40)
    return ids[:n]


# --- async ------------------------------------------------------------------------------------------------------------


def test_async_pieces_are_those_of_a_loop_and_other_tasks_go_on(model: Model) -> None:
    async def main() -> tuple[list[str], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        generation = model.generate(PROMPTS[0], 12, GREEDY)
        pieces = [piece async for piece in generation]
        ticking.cancel()
        assert (generation.text, generation.stop_reason) == ("".join(pieces), "length")
        return pieces, ticks

    pieces, ticks = asyncio.run(main())
    assert pieces == list(model.generate(PROMPTS[0], 12, GREEDY))
    assert ticks > 12


def test_async_generations_run_one_after_the_other(model: Model) -> None:
    alone = [continued(model, prompt) for prompt in PROMPTS]
    order: list[int] = []

    async def one(i: int) -> str:
        def note(_: Token) -> None:
            order.append(i)

        return "".join([piece async for piece in model.generate(PROMPTS[i], 12, GREEDY, on_token=note)])

    async def main() -> list[str]:
        return await asyncio.gather(*(one(i) for i in range(len(PROMPTS))))

    assert asyncio.run(main()) == alone
    assert order == sorted(order)
    assert len(order) == 12 * len(PROMPTS)


def test_leaving_an_async_loop_lets_the_next_generation_begin(model: Model) -> None:
    alone = continued(model, PROMPTS[1])

    async def main() -> str:
        left = model.generate(PROMPTS[0], None, GREEDY)
        async for _ in left:
            break
        after = "".join([piece async for piece in model.generate(PROMPTS[1], 12, GREEDY)])
        assert len(left.token_ids) < 4
        return after

    assert asyncio.run(asyncio.wait_for(main(), 60)) == alone


def test_a_cancelled_task_stops_within_a_batch_of_the_prompt(model: Model) -> None:
    prompt, seen = long_prompt(model, 400), []
    alone = continued(model, PROMPTS[1])

    async def main() -> str:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            seen.append((done, total))
            loop.call_soon_threadsafe(begun.set)

        generation = model.generate(prompt, 12, GREEDY, on_prompt=progress)
        task = asyncio.create_task(consume(generation.__aiter__()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (generation.stop_reason, generation.token_ids) == (None, [])
        return "".join([piece async for piece in model.generate(PROMPTS[1], 12, GREEDY)])

    assert asyncio.run(main()) == alone
    assert seen[0] == (16, 400)
    assert seen[-1][0] < 400


async def consume(pieces: AsyncIterator[str]) -> None:
    async for _ in pieces:
        pass


def test_a_timeout_stops_decoding_and_keeps_what_was_generated(model: Model) -> None:
    async def main() -> None:
        enough = asyncio.Event()
        loop = asyncio.get_running_loop()
        generation = model.generate(PROMPTS[0], None, GREEDY, on_token=lambda _: loop.call_soon_threadsafe(enough.set))
        task = asyncio.create_task(consume(generation.__aiter__()))
        await enough.wait()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(task, 0)
        n = len(generation.token_ids)
        assert generation.text == model.detokenize(generation.token_ids) or n == 1
        await asyncio.sleep(0.05)
        assert len(generation.token_ids) == n

    asyncio.run(main())


def test_a_cancelled_task_does_not_wait_for_text_that_is_held_back(model: Model) -> None:
    (letter,) = model.tokenize("a", add_special=False)[-1:]

    def only(_: Any, logits: Any) -> Any:
        logits[:] = -np.inf
        logits[letter] = 0
        return logits

    async def main() -> int:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        generation = model.generate(
            PROMPTS[0],
            400,
            GREEDY,
            stop=[model.tokenizer.token_bytes(letter).decode() * 1000],
            logits_processors=[only],
            on_token=lambda _: loop.call_soon_threadsafe(begun.set),
        )
        task = asyncio.create_task(consume(generation.__aiter__()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(generation.token_ids)

    assert asyncio.run(main()) < 200


def test_an_error_reaches_the_async_loop_and_frees_the_model(model: Model) -> None:
    def broken(_ids: Any, _logits: Any) -> Any:
        raise KeyError("mine")

    async def main() -> str:
        with pytest.raises(KeyError, match="mine"):
            await consume(model.generate(PROMPTS[0], 5, GREEDY, logits_processors=[broken]).__aiter__())
        return "".join([piece async for piece in model.generate(PROMPTS[0], 5, GREEDY)])

    assert asyncio.run(asyncio.wait_for(main(), 60)) == continued(model, PROMPTS[0], 5)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_generate_at_once_and_each_gets_its_own_text(model: Model) -> None:
    alone = [continued(model, prompt) for prompt in PROMPTS]
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = continued(model, PROMPTS[i])

    run_all([threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))])
    assert [found[i] for i in range(len(PROMPTS))] == alone


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_prompt_begun_while_another_is_computed_is_not_taken_for_cached(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-C in a long prompt: the batch that was being computed ends later than the next prompt begins."""
    first = model.tokenize("A long and happy life to all of you, and to the many who are not here with us", False)[:16]
    second = model.tokenize("War is not the answer that we look for now, nor at any time that we can foresee", False)[
        :16
    ]
    third = model.tokenize(" trees", False)
    expected = model.logits([*second, *third])[-1]
    engine, resetting = model._engine, threading.Thread(target=model._sequence.clear)
    schedule, asked = engine._executor.schedule, []

    def reset_meanwhile(spec: Any) -> Any:
        asked.append(spec)
        if len(asked) == 2:
            resetting.start()
            resetting.join(0.5)
        return schedule(spec)

    with monkeypatch.context() as patch:
        patch.setattr(engine._executor, "schedule", reset_meanwhile)
        model._sequence.logits([*first, *second])
    resetting.join()
    # F16 keys and values in other batches; another context differs by more than 1.
    np.testing.assert_allclose(model._sequence.logits([*second, *third])[0], expected, atol=0.05)


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_tokens_come_with_the_logarithm_of_their_probability(model: Model) -> None:
    tokens: list[Token] = []
    generation = model.generate(PROMPTS[0], 8, Sampling(seed=3), on_token=tokens.append)
    text = "".join(generation)
    assert [token.id for token in tokens] == generation.token_ids
    assert b"".join(token.data for token in tokens).decode() == text
    prompt = model.tokenize(PROMPTS[0])
    logits = model.logits([*prompt, *generation.token_ids])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        [token.logprob for token in tokens], expected[np.arange(8), generation.token_ids], atol=5e-3
    )


def test_a_callback_that_says_no_ends_the_generation(model: Model) -> None:
    ids: list[int] = []

    def three(token: Token) -> bool:
        ids.append(token.id)
        return len(ids) < 3

    # The text that might become the stop string is not lost.
    whole = model.generate(PROMPTS[0], 3, GREEDY)
    text = "".join(whole)
    generation = model.generate(PROMPTS[0], 50, GREEDY, stop=[text[-2:] + "\0"], on_token=three)
    assert "".join(generation) == text == generation.text
    assert (generation.token_ids, generation.stop_reason) == (whole.token_ids, "callback")


def test_the_prompts_progress_is_told_batch_by_batch(model: Model) -> None:
    seen: list[tuple[int, int]] = []
    prompt = long_prompt(model, 40)
    with model.generate(prompt, 1, GREEDY, on_prompt=lambda done, total: seen.append((done, total))) as generation:
        list(generation)
    assert seen == [(16, 40), (32, 40), (40, 40)]
    refused = model.generate(prompt, 5, GREEDY, on_prompt=lambda done, _: done < 32)
    assert (list(refused), refused.stop_reason, refused.stats.tokens) == ([], "callback", 0)


# --- logits processors ------------------------------------------------------------------------------------------------


def test_processors_see_the_ids_and_decide_what_is_allowed(model: Model) -> None:
    lengths: list[int] = []
    script = model.tokenize(" one two three", add_special=False)

    def follow(ids: np.ndarray[Any, np.dtype[np.int32]], logits: np.ndarray[Any, np.dtype[np.float32]]) -> Any:
        lengths.append(len(ids))
        allowed = np.full_like(logits, -np.inf)
        allowed[script[len(lengths) - 1]] = 0
        return allowed

    generation = model.generate(PROMPTS[0], len(script), Sampling(seed=1), logits_processors=[follow])
    list(generation)
    n = len(model.tokenize(PROMPTS[0]))
    assert generation.token_ids == script
    assert lengths == [n + i for i in range(len(script))]


def test_processors_are_called_in_order_and_may_change_the_array(model: Model) -> None:
    best = model.generate(PROMPTS[0], 1, GREEDY)
    list(best)

    def forbid(_: Any, logits: Any) -> Any:
        logits[best.token_ids[0]] = -np.inf
        return logits

    def negate(_: Any, logits: Any) -> Any:
        return (-logits).astype(np.float64)

    forbidden, worst = (
        model.generate(PROMPTS[0], 1, GREEDY, logits_processors=chosen) for chosen in ([forbid], [negate])
    )
    list(forbidden), list(worst)
    logits = model.logits(model.tokenize(PROMPTS[0]))[-1]
    assert forbidden.token_ids == [int(np.argsort(logits)[-2])]
    assert worst.token_ids == [int(np.argmin(logits))]


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (lambda _, logits: logits[:-1], r"returned \(\d+,\), expected logits of shape"),
        (lambda _, logits: None, r"returned \(\), expected"),
        (lambda _, logits: np.array(["a"] * len(logits)), r"returned a ndarray, expected logits of shape"),
        (lambda _, logits: [[0.0], [0.0, 1.0]], r"returned a list, expected logits of shape"),
        (lambda _, logits: np.full_like(logits, -np.inf), "left -inf as the largest logit"),
        (lambda _, logits: np.full_like(logits, np.nan), "left nan as the largest logit"),
    ],
)
def test_processors_that_leave_nothing_to_choose_are_refused(
    model: Model, process: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UserError, match=message), model.generate("A", 2, logits_processors=[process]) as generation:
        list(generation)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_stats_cover_all_generations(tiny_gguf: Path) -> None:
    with runtime.load(tiny_gguf, ffn="exact", n_ctx=128, threads=1) as model:
        assert (model.stats().generations, model.stats().total) == (0, Stats())
        both = []
        for n in (3, 9):
            generation = model.generate(PROMPTS[0], n, GREEDY)
            list(generation)
            both.append(generation.stats)
        model.generate(PROMPTS[0], 3)  # never begun
        found = model.stats()
    assert (found.generations, found.ffn, found.threads, found.n_ctx, found.device_bytes) == (2, "exact", 1, 128, ())
    assert found.file_bytes == tiny_gguf.stat().st_size
    s = model.structure
    assert found.kv_bytes == 2 * s.block_count * 128 * s.head_count_kv * s.head_length * 2
    total = found.total
    assert (total.tokens, total.decoded_tokens, total.prompt_tokens) == (12, 10, 2 * both[0].prompt_tokens)
    assert total.tokens_per_s == pytest.approx(10 / (both[0].seconds + both[1].seconds))
    expected = [(3 * a + 9 * b) / 12 for a, b in zip(both[0].layer_shares, both[1].layer_shares, strict=True)]
    assert total.layer_shares == pytest.approx(expected)
    assert min(s.bytes_per_token for s in both) <= total.bytes_per_token <= max(s.bytes_per_token for s in both)


def test_the_packages_say_that_they_are_typed() -> None:
    for package in ("convert", "predictors", "runtime"):
        assert (Path(__file__).parent.parent / package / "py.typed").is_file()
