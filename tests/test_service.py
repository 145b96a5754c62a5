"""Many answers at once from one engine, without HTTP: each is what it would be alone, and none can harm another."""

from __future__ import annotations

import asyncio
import resource
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.errors import UserError
from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.answers import Answer
from runtime.serve.jobs import (
    End,
    Event,
    FailedError,
    FullError,
    Job,
    Piece,
    Progress,
    PromptTokens,
    PromptTooLongError,
    UnavailableError,
)
from runtime.serve.service import Service, Ticket
from runtime.text.sampling import Sampling

GREEDY = Sampling(temperature=0)
TEXT = (Path(__file__).parent.parent / "examples/tiny-relu-llama/README.md").read_text()


@asynccontextmanager
async def served(path: Path, parallel: int = 8, queue: int = 64, **options: Any) -> AsyncIterator[Service]:
    service = Service(parallel, queue)
    run = RunOptions(**{"ffn": "exact", "threads": 2, "n_ctx": 256, "n_cells": 1024, "kv_type": "f32"} | options)
    await service.start(lambda: open_model(path, run))
    try:
        yield service
    finally:
        await service.close()


def with_service(path: Path, test: Callable[[Service], Awaitable[None]], **options: Any) -> None:
    """Run an asynchronous test, in bounded time."""

    async def main() -> None:
        async with served(path, **options) as service:
            await asyncio.wait_for(test(service), 120)

    asyncio.run(main())


async def events_of(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket]


async def answer(ticket: Ticket) -> End:
    """The end of an answer, which the pieces before it add up to."""
    *others, end = await events_of(ticket)
    assert isinstance(end, End)
    assert "".join(event.text for event in others if isinstance(event, Piece)) == end.text
    return end


def jobs_of(service: Service, n: int, seed: int = 0) -> list[Job]:
    """Unlike each other: prompts of many lengths, greedy and sampled, with and without stop texts."""
    random, jobs = np.random.default_rng(seed), []
    for k in range(n):
        at, length = random.integers(0, len(TEXT) - 700), int(random.choice([3, 40, 150, 600]))
        prompt = service.model.tokenize(TEXT[at : at + length])[:200]
        sampling = GREEDY if k % 2 else Sampling(seed=k, repeat_penalty=1.1 if k % 3 else 1.0)
        jobs.append(Job(tuple(prompt), int(random.integers(1, 40)), sampling, ("the", ".") if k % 5 == 0 else ()))
    return jobs


def test_answers_in_company_are_those_of_a_model_alone(converted: Callable[..., Path]) -> None:
    """In F32, weights, keys and values: what rounding changes is too small to turn a choice."""
    path = converted("bundled", "f32")
    with runtime.load(path, ffn="exact", threads=2, n_ctx=256, kv_type="f32") as model:

        async def test(service: Service) -> None:
            jobs = jobs_of(service, 24)
            ends = await asyncio.gather(*(answer(service.submit(job)[0]) for job in jobs))
            for job, end in zip(jobs, ends, strict=True):
                with model.generate(job.prompt, job.max_tokens, job.sampling, job.stop) as alone:
                    text = "".join(alone)
                assert (end.text, end.reason, end.stats.tokens) == (text, alone.stop_reason, alone.stats.tokens)

        with_service(path, test)


@pytest.mark.numeric
@pytest.mark.parametrize("ffn", ["exact", "predicted", "dense", "verified"])
def test_deterministic_answers_have_the_same_bits_in_any_company(fitted_gguf: Path, ffn: str) -> None:
    """Alone, among others, and once more when their beginnings are known; prompts of one piece and of several, and
    caches with holes. Probabilities are compared, to the last bit.
    """

    def figures(events: list[Event]) -> list[object]:
        return [(token.id, token.logprob, token.top) for e in events if isinstance(e, Piece) for token in e.tokens]

    async def test(service: Service) -> None:
        texts = [TEXT[k * 37 : k * 37 + n] for k, n in enumerate([20, 150, 400, 990, 90, 333, 700, 7])]
        jobs = [
            Job(tuple(service.model.tokenize(text)[:230]), 25, GREEDY if k % 2 else Sampling(seed=k), top_logprobs=3)
            for k, text in enumerate(texts)
        ]
        alone = [figures(await events_of(service.submit(replace(job, cache_prompt=False))[0])) for job in jobs]
        for _ in range(2):
            together = await asyncio.gather(*(events_of(service.submit(job)[0]) for job in jobs))
            assert [figures(events) for events in together] == alone
        ends = [events[-1] for events in together]
        assert any(isinstance(end, End) and end.stats.cached_tokens >= 64 for end in ends)

    with_service(fitted_gguf, test, ffn=ffn, deterministic=True, kv_type="f16", parallel=5, n_cells=1700)


def test_seeds_decide(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        prompt = tuple(service.model.tokenize("My fellow"))
        jobs = [Job(prompt, 20, Sampling(seed=seed)) for seed in (1, 1, 2)]
        a, b, c = await asyncio.gather(*(answer(service.submit(job)[0]) for job in jobs))
        assert a.text == b.text != c.text and (a.seed, c.seed) == (1, 2)

    with_service(tiny_gguf, test)


def test_probabilities_are_those_of_the_models_logits(converted: Callable[..., Path]) -> None:
    """Of generated tokens and of a prompt's, in company; against logits computed alone."""
    path = converted("bundled", "f32")
    with runtime.load(path, ffn="exact", threads=2, n_ctx=256, kv_type="f32") as model:

        async def test(service: Service) -> None:
            others = [service.submit(job)[0] for job in jobs_of(service, 6)]
            prompt = tuple(model.tokenize(TEXT[:300]))
            job = Job(prompt, 12, Sampling(seed=3), top_logprobs=4, prompt_logprobs=True)
            events = await events_of(service.submit(job)[0])
            await asyncio.gather(*map(answer, others))
            (told,) = (e for e in events if isinstance(e, PromptTokens))
            tokens = [*told.tokens, *(t for e in events if isinstance(e, Piece) for t in e.tokens)]
            assert [t.id for t in told.tokens] == list(prompt) and np.isnan(tokens[0].logprob)
            logits = model.logits([t.id for t in tokens]).astype(np.float64)
            wanted = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            for row, token in zip(wanted, tokens[1:], strict=False):
                assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
                ranked = np.sort(row)[::-1][:4]
                assert [p for _, p in token.top] == pytest.approx(ranked.tolist(), abs=1e-4)
                assert [row[i] for i, _ in token.top] == pytest.approx(ranked.tolist(), abs=1e-4)

        with_service(path, test)


def test_several_answers_to_one_prompt_compute_it_once(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        prompt = tuple(service.model.tokenize(TEXT[:400]))
        jobs = [Job(prompt, 10, Sampling(seed=seed)) for seed in range(4)]
        ends = await asyncio.gather(*map(answer, service.submit(*jobs)))
        assert service.figures().counts.prompt_tokens == len(prompt) + 3
        assert [end.stats.cached_tokens for end in ends] == [0, *[len(prompt) - 1] * 3]
        assert len({end.text for end in ends}) > 1

    with_service(tiny_gguf, test)


def test_the_same_prompt_again_gives_the_same(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        job = Job(tuple(service.model.tokenize(TEXT[:200])), 15, GREEDY)
        first, again = await answer(service.submit(job)[0]), await answer(service.submit(job)[0])
        assert again.text == first.text and again.stats.cached_tokens == len(job.prompt) - 1

    with_service(tiny_gguf, test)


def test_ends(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        prompt = tuple(service.model.tokenize("The"))
        none, some, full, ignored = await asyncio.gather(
            *(
                answer(service.submit(job)[0])
                for job in (
                    Job(prompt, 0, GREEDY),
                    Job(prompt, 7, GREEDY, ignore_eos=True),
                    Job(prompt, None, GREEDY, ignore_eos=True),
                    Job(prompt, 100, GREEDY, stop=(" ",)),
                )
            )
        )
        assert (none.reason, none.text, none.stats.tokens) == ("length", "", 0)
        assert (some.reason, some.stats.tokens) == ("length", 7)
        assert (full.reason, full.stats.tokens) == ("context", 256 - len(prompt))
        assert (ignored.reason, ignored.stop) == ("stop", " ") and " " not in ignored.text
        with pytest.raises(
            PromptTooLongError, match=r"300 tokens, expected fewer: this model.s maximum context length is 256"
        ):
            service.submit(Job((5,) * 300))

    with_service(tiny_gguf, test)


def test_a_cancelled_answer_is_not_computed(tiny_gguf: Path) -> None:
    """While it waits, in its prompt, and while it is decoded; whoever comes next gets what it would get alone."""

    async def test(service: Service) -> None:
        prompt = tuple(service.model.tokenize(TEXT[:200]))
        running = service.submit(Job(prompt, None, GREEDY, ignore_eos=True))[0]
        waits = service.submit(Job(prompt[:50], None, GREEDY))[0]
        seen = 0
        async for event in running:
            seen += isinstance(event, Piece)
            if seen == 3:
                waits.cancel()
                before = service.figures().counts.generated_tokens
                running.cancel()
            if isinstance(event, End):
                assert event.reason == "cancelled"
        assert isinstance((await events_of(waits))[-1], End)
        assert service.figures().counts.generated_tokens <= before + 2
        assert service.figures().counts.prompt_tokens == len(prompt)
        begun = service.submit(Job(prompt[::-1], 5, GREEDY))[0]
        async for event in begun:
            if isinstance(event, Progress):
                begun.cancel()
        job = Job(prompt[::-1], 5, GREEDY)
        again = await answer(service.submit(job)[0])
        fresh = await answer(service.submit(replace(job, cache_prompt=False))[0])
        assert again.text == fresh.text and not service.slots()

    with_service(tiny_gguf, test, parallel=1)


def test_an_answer_that_fails_fails_alone(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an error of its own, and by a fault of ours."""
    took = Answer.took

    def failing(self: Answer, part: Any, logits: Any, n: int) -> None:
        if self.job.name == "own" and self.n_tokens == 2:
            raise UserError("its logits are not numbers")
        if self.job.name == "ours" and self.n_tokens == 3:
            raise ZeroDivisionError
        took(self, part, logits, n)

    monkeypatch.setattr(Answer, "took", failing)

    async def test(service: Service) -> None:
        job = Job(tuple(service.model.tokenize("My fellow")), 20, GREEDY)
        own, ours, well = (service.submit(replace(job, name=name))[0] for name in ("own", "ours", "well"))
        with pytest.raises(UserError, match="not numbers"):
            await answer(own)
        with pytest.raises(FailedError, match="ZeroDivisionError"):
            await answer(ours)
        assert (await answer(well)).stats.tokens == 20
        assert service.state == "ready" and service.figures().ended == {"error": 2, "length": 1}

    with_service(tiny_gguf, test)


def test_an_engine_that_fails_says_so(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service) -> None:
        engine = service.model.engine
        compute, steps = engine.compute, iter(range(5))

        def failing(*given: Any) -> Any:
            next(steps)  # the sixth raises StopIteration
            return compute(*given)

        monkeypatch.setattr(engine, "compute", failing)
        job = Job(tuple(service.model.tokenize("My fellow")), 20, GREEDY)
        tickets = [service.submit(job)[0] for _ in range(12)]
        for ticket in tickets:
            with pytest.raises(UnavailableError, match="the engine has failed"):
                await events_of(ticket)
        await service.died.wait()
        assert service.state == "dead" and isinstance(service.death, StopIteration)
        with pytest.raises(UnavailableError, match="the engine has failed"):
            service.submit(job)

    with_service(tiny_gguf, test)


def test_no_more_wait_than_may(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        job = Job(tuple(service.model.tokenize("My fellow")), 200, GREEDY, ignore_eos=True)
        tickets = [service.submit(job)[0] for _ in range(5)]
        with pytest.raises(FullError, match="3 requests are waiting already") as full:
            service.submit(job)
        assert full.value.seconds >= 1
        tickets[-1].cancel()
        await events_of(tickets[-1])
        tickets.append(service.submit(job)[0])
        for ticket in tickets:
            ticket.cancel()

    with_service(tiny_gguf, test, parallel=2, queue=3)


def test_an_answer_that_nobody_reads_holds_up_nobody(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        job = Job(tuple(service.model.tokenize("My fellow")), 100, GREEDY, ignore_eos=True)
        unread = service.submit(job)[0]
        assert (await answer(service.submit(job)[0])).stats.tokens == 100
        await unread.done.wait()
        assert (await answer(unread)).stats.tokens == 100

    with_service(tiny_gguf, test)


def test_what_began_ends_when_the_service_does(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        job = Job(tuple(service.model.tokenize("My fellow")), 10, GREEDY)
        short, long = service.submit(job)[0], service.submit(replace(job, max_tokens=None, ignore_eos=True))[0]
        draining = asyncio.ensure_future(service.drain(0.1))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="the server ends"):
            service.submit(job)
        await draining
        assert (await answer(short)).stats.tokens == 10
        with pytest.raises(UnavailableError, match="the server ends"):
            await answer(long)

    with_service(tiny_gguf, test, n_ctx=1024)


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        service = Service()
        with pytest.raises(UnavailableError, match="being loaded"):
            service.submit(Job((1,)))
        with pytest.raises(FileNotFoundError):
            await service.start(lambda: open_model(tmp_path / "none.gguf", RunOptions()))
        await service.close()

    asyncio.run(main())


def test_what_was_loaded_too_late_is_freed() -> None:
    loading, closed = threading.Event(), threading.Event()

    class Loaded:
        close = closed.set

    def load() -> Any:
        loading.wait(60)
        return Loaded()

    async def main() -> None:
        service = Service()
        starting = asyncio.ensure_future(service.start(load))
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        loading.set()
        while not closed.is_set():
            await asyncio.sleep(0.01)
        assert service.state == "loading"
        await service.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_an_idle_service_needs_no_processor(tiny_gguf: Path) -> None:
    async def test(service: Service) -> None:
        await answer(service.submit(Job((5, 6), 5, GREEDY))[0])
        await asyncio.sleep(0.5)  # OpenMP's threads spin for a moment
        used, started = _processor_seconds(), time.monotonic()
        await asyncio.sleep(1)
        assert _processor_seconds() - used < 0.1 * (time.monotonic() - started)

    with_service(tiny_gguf, test)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_activity_and_bytes(fitted_gguf: Path) -> None:
    """Alone as a generation says; in company a token reads less, and dense weights less than the file in any case."""
    with runtime.load(fitted_gguf, ffn="predicted", threads=2, n_ctx=256) as model:

        async def test(service: Service) -> None:
            job = Job(tuple(model.tokenize("My fellow")), 30, GREEDY, activity=True, ignore_eos=True)
            events = await events_of(service.submit(job)[0])
            end, layers = events[-1], [e.layers for e in events if isinstance(e, Piece) and e.layers]
            assert isinstance(end, End) and len(layers) == 29
            with model.generate(job.prompt, 30, GREEDY) as alone:
                list(alone)
            assert end.stats.layer_shares == pytest.approx(np.mean(layers, 0).tolist())
            if alone.stats.tokens == 30:
                assert end.stats.layer_shares == pytest.approx(alone.stats.layer_shares)
                assert end.stats.bytes_per_token == pytest.approx(alone.stats.bytes_per_token, rel=0.02)
            together = await asyncio.gather(*(answer(t) for t in service.submit(*[job] * 6)))
            assert all(e.stats.bytes_per_token < 0.7 * end.stats.bytes_per_token for e in together)

        with_service(fitted_gguf, test, ffn="predicted", kv_type="f16")
