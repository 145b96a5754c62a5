"""What requests leave behind goes at once: Python's collector, which stops every thread, has next to nothing to do."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.bindings import ggml
from runtime.compute.repack import Repacked
from runtime.compute.weights import Weights
from runtime.model import open_model
from runtime.options import RunOptions
from runtime.serve.collector import sparing
from runtime.serve.jobs import Job
from runtime.serve.service import Service
from runtime.text.tokenizer import Tokenizer


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Nothing is collected but by counting references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("leaves", [False, True])
def test_an_answer_goes_when_it_has_ended(leaves: bool, tiny_gguf: Path) -> None:
    async def main() -> None:
        service = Service()
        await service.start(lambda: open_model(tiny_gguf, RunOptions(ffn="exact", threads=1, n_ctx=64)))
        (ticket,) = service.submit(Job((5, 6, 7), 5))
        answer = weakref.ref(ticket.answer)
        if leaves:
            ticket.cancel()
        async for _ in ticket:
            pass
        for _ in range(100):  # the other thread lets go of it a moment later
            if answer() is None:
                break
            await asyncio.sleep(0.05)
        assert answer() is None
        await service.close()

    asyncio.run(main())


@pytest.mark.usefixtures("uncollected")
def test_tokenizing_leaves_nothing_behind(tiny_gguf: Path) -> None:
    with Tokenizer(tiny_gguf) as tokenizer:
        gc.collect()
        for n in range(50):
            for token in tokenizer.encode("a" * n):
                tokenizer.token_bytes(token)
        assert gc.collect() < 50


@pytest.mark.usefixtures("uncollected")
def test_repacked_matrices_go_when_they_are_closed(tiny_gguf: Path) -> None:
    model = open_model(tiny_gguf, RunOptions(threads=1))
    backend = ggml.ggml_backend_cpu_init()
    try:
        weights: Weights = model.engine.weights
        copies = Repacked(weights, backend, {})
        reference = weakref.ref(copies)
        copies.close()
        copies.close()
        del copies
        assert reference() is None
    finally:
        ggml.ggml_backend_free(backend)
        model.close()


def test_what_is_loaded_is_left_alone() -> None:
    before = gc.get_freeze_count()
    kept = sparing(lambda: [[i] for i in range(1000)])()
    try:
        assert gc.get_freeze_count() >= before + len(kept)
        assert not any(one is kept[5] for one in gc.get_objects(generation=2))
    finally:
        gc.unfreeze()
