"""`exact` against `dense`, over types, threads and batches; and what both owe: the same bits, the memory promised, contexts to the limit."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, kl, random_ids, relative, transformers_logits

import runtime
from runtime.errors import UserError

pytestmark = pytest.mark.numeric

Converted = Callable[..., Path]
QUANTIZED = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k")


def logits(path: Path, ids: list[int], **options: Any) -> Logits:
    with runtime.load(path, **options) as model:
        return model.logits(ids)


@pytest.fixture(scope="module")
def dense_logits() -> Callable[[Path, int], Logits]:
    """Of so many random ids, computed once."""
    return cache(lambda path, n: logits(path, random_ids(n, 4000), ffn="dense", kv_type="f32"))


@pytest.mark.parametrize("n_batch", [1, 2, 7, 64, 512])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("type_name", "tolerance"), [("f32", 1e-4), ("f16", 2e-3), ("bf16", 2e-3)])
def test_exact_equals_dense(
    converted: Converted,
    dense_logits: Callable[[Path, int], Logits],
    type_name: str,
    tolerance: float,
    threads: int,
    n_batch: int,
) -> None:
    n = 32 if n_batch < 7 else 512
    ids, path = random_ids(n, 4000), converted("bundled", type_name)
    dense = dense_logits(path, n)
    exact = logits(path, ids, ffn="exact", kv_type="f32", threads=threads, n_batch=n_batch)
    assert relative(dense, exact) <= tolerance


@pytest.mark.parametrize("name", ["llama-gqa", "opt-pre-norm", "opt-post-norm"])
def test_exact_equals_dense_in_other_families(converted: Converted, name: str) -> None:
    ids, path = random_ids(100, 4000), converted(name)
    assert (
        relative(logits(path, ids, ffn="dense", kv_type="f32"), logits(path, ids, ffn="exact", kv_type="f32")) <= 1e-4
    )


@pytest.mark.parametrize("n_batch", [1, 512])
@pytest.mark.parametrize("type_name", QUANTIZED)
def test_exact_is_no_further_from_the_unquantised_model_than_dense(
    checkpoint: Callable[[str], Path], converted: Converted, type_name: str, n_batch: int
) -> None:
    ids, path = random_ids(128, 4000), converted("bundled", type_name)
    reference = transformers_logits(checkpoint("bundled"), ids)
    dense = kl(reference, logits(path, ids, ffn="dense", n_batch=n_batch))
    assert kl(reference, logits(path, ids, ffn="exact", n_batch=n_batch)) <= 1.2 * dense


@pytest.mark.parametrize("ffn", ["dense", "exact"])
@pytest.mark.parametrize("n_batch", [1, 512])
def test_two_runs_give_the_same_bits(converted: Converted, ffn: str, n_batch: int) -> None:
    ids, path = random_ids(200, 4000), converted("bundled", "q4_0")
    first = logits(path, ids, ffn=ffn, n_batch=n_batch, threads=2)
    assert np.array_equal(first, logits(path, ids, ffn=ffn, n_batch=n_batch, threads=2))


def test_one_model_gives_the_same_bits_whatever_it_did_before(converted: Converted) -> None:
    with runtime.load(converted("bundled", "f16")) as model:
        ids = random_ids(300, 4000)
        first = model.logits(ids)
        list(model.generate("Something else entirely", max_tokens=5))
        assert np.array_equal(first, model.logits(ids))


def greedy(model: runtime.Model, prompt: list[int], n: int, **options: Any) -> list[int]:
    generation = model.generate(prompt, max_tokens=n, sampling=runtime.Sampling(temperature=0), **options)
    list(generation)
    return generation.token_ids


def test_generation_follows_the_logits(converted: Converted) -> None:
    """Decoding token by token picks what one pass over the whole sequence says is most likely."""
    with runtime.load(converted("bundled"), kv_type="f32") as model:
        prompt = model.tokenize("My fellow citizens, the state of")
        found = greedy(model, prompt, 40)
        best = model.logits([*prompt, *found]).argmax(-1)
        assert found == best[len(prompt) - 1 : -1].tolist()


def test_generations_do_not_disturb_each_other(converted: Converted) -> None:
    with runtime.load(converted("bundled"), kv_type="f32") as model:
        prompts = [model.tokenize(text) for text in ("My fellow citizens,", "Call me Ishmael. Some years ago")]
        alone = [greedy(model, p, 12) for p in prompts]
        running = [model.generate(p, max_tokens=12, sampling=runtime.Sampling(temperature=0)) for p in prompts]
        for _ in range(12):
            for generation in running:
                next(generation, None)
        for generation in running:
            list(generation)
        assert [g.token_ids for g in running] == alone


def test_a_cached_prompt_gives_the_same_text(converted: Converted) -> None:
    with runtime.load(converted("bundled"), kv_type="f32") as model:
        prompt = model.tokenize("My fellow citizens,")
        first = greedy(model, prompt, 10)
        longer = [*prompt, *first, *model.tokenize(" and", add_special=False)]
        fresh = greedy(model, longer, 10)
        greedy(model, prompt, 10)
        generation = model.generate(longer, max_tokens=10, sampling=runtime.Sampling(temperature=0), cache_prompt=True)
        list(generation)
        assert generation.stats.cached_tokens >= len(prompt)
        assert generation.token_ids == fresh


def test_the_context_is_used_to_its_limit_and_then_said_to_be_full(converted: Converted) -> None:
    with runtime.load(converted("bundled"), n_ctx=300) as model:
        generation = model.generate(random_ids(290, 4000), sampling=runtime.Sampling(temperature=0))
        list(generation)
        assert generation.stop_reason in ("context", "eos")
        assert len(generation.token_ids) <= 10
        with pytest.raises(UserError, match="300 tokens, expected fewer than the context of 300"):
            model.generate(random_ids(300, 4000))
        with pytest.raises(UserError, match="301 tokens"):
            model.logits(random_ids(301, 4000))
        assert model.logits(random_ids(300, 4000)).shape[0] == 300


def test_the_models_own_limit(converted: Converted) -> None:
    with runtime.load(converted("bundled")) as model:
        assert model.n_ctx == 1024
        assert np.isfinite(model.logits(random_ids(1024, 4000))).all()
    with pytest.raises(UserError, match="n_ctx 1025, expected 1 to 1024"):
        runtime.load(converted("bundled"), n_ctx=1025)


def test_stop_strings(converted: Converted) -> None:
    with runtime.load(converted("bundled")) as model:
        whole = model.generate("My fellow citizens,", max_tokens=30, sampling=runtime.Sampling(temperature=0))
        text = "".join(whole)
        stop = text[10:14]
        cut = model.generate(
            "My fellow citizens,", max_tokens=30, sampling=runtime.Sampling(temperature=0), stop=[stop]
        )
        assert "".join(cut) == text[: text.find(stop)] == cut.text
        assert cut.stop_reason == "stop"


def test_exact_computes_few_neurons_and_says_so(converted: Converted) -> None:
    with runtime.load(converted("bundled")) as model:
        sparse = model.generate("My fellow citizens,", max_tokens=20)
        list(sparse)
        assert 0.01 < sparse.stats.computed_share < 0.3
        assert len(sparse.stats.layer_shares) == 6
    with runtime.load(converted("bundled"), ffn="dense") as model:
        dense = model.generate("My fellow citizens,", max_tokens=20)
        list(dense)
        assert dense.stats.computed_share == 1
        assert dense.stats.bytes_per_token > sparse.stats.bytes_per_token


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_thousand_tokens_do_not_grow_the_process(converted: Converted) -> None:
    with runtime.load(converted("bundled", "f16")) as model:
        warm = model.generate("My", max_tokens=5)
        list(warm)
        before = resident()
        generation = model.generate("My", max_tokens=1000, sampling=runtime.Sampling(seed=3))
        n = sum(1 for _ in generation)
        while len(generation.token_ids) < 1000 and n < 2000:  # the model may end before
            generation = model.generate(
                "My", max_tokens=1000 - len(generation.token_ids), sampling=runtime.Sampling(seed=n)
            )
            n += sum(1 for _ in generation)
        assert resident() - before < 5e6


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_weights_are_mapped_not_copied(converted: Converted) -> None:
    path = converted("bundled", "f16")
    with runtime.load(path, mmap=True) as model:
        mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
        ranges = [tuple(int(a, 16) for a in line[0].split("-")) for line in mapped]
        for name in ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t"):
            address = model._engine.weights[f"blk.3.{name}.weight"].data
            assert any(a <= address < b for a, b in ranges)


def test_an_unclosed_model_warns(converted: Converted) -> None:
    with pytest.warns(ResourceWarning, match="unclosed model"):
        runtime.load(converted("bundled"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"ffn": "fast"}, "ffn mode `fast`"),
        ({"kv_type": "q8_0"}, "kv_type `q8_0`"),
        ({"threads": 0}, "threads is 0"),
        ({"n_batch": 0}, "n_batch is 0"),
    ],
)
def test_options_out_of_range(converted: Converted, option: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        runtime.load(converted("bundled"), **option)
