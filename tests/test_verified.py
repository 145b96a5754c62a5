"""Drafts change when tokens are computed, never which: texts with them are those without, token for token."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import Logits, random_ids

import runtime
from bench.make_model import Recipe, write_model
from runtime.compute.traffic import union
from runtime.draft_length import DraftLength
from runtime.errors import UserError
from runtime.generation import Generation
from runtime.lookup import Lookup
from runtime.model import Model
from runtime.text.sampling import Sampler, Sampling

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
GREEDY = Sampling(temperature=0)
PROMPTS = ("My fellow citizens,", "ROMEO.\n", "Once more unto the breach, dear friends, once more;\n", "The")


@pytest.fixture(scope="module")
def synthetic(make_once: MakeOnce) -> Callable[[str], Path]:
    """A model of random weights, with predictors: "tiny" (gated) or "tiny-opt"."""
    types = {"tiny": "q4_0", "tiny-opt": "q8_0"}

    def made(shape: str) -> Path:
        return make_once(f"verified-{shape}.gguf", lambda path: write_model(Recipe(shape, 0.1, types[shape]), path))

    return made


def continued(
    model: Model, prompt: str | list[int], n: int | None, sampling: Sampling = GREEDY, **options: Any
) -> Generation:
    with model.generate(prompt, n, sampling, **options) as generation:
        for _ in generation:
            pass
    return generation


def assert_same_tokens(path: Path, n_prompts: int, n_tokens: int, mode: str = "exact", **drafts: Any) -> None:
    """Greedy texts after random prompts, with drafts and without."""
    rng, drafted = random.Random(path.name), 0
    with runtime.load(path, ffn=mode) as plain, runtime.load(path, draft_max=15, **drafts) as drafting:
        for _ in range(n_prompts):
            prompt = random_ids(rng.randint(1, 90), plain.structure.vocab_size, seed=rng.randrange(1 << 30))
            wanted, found = continued(plain, prompt, n_tokens), continued(drafting, prompt, n_tokens)
            assert found.token_ids == wanted.token_ids
            assert (found.text, found.stop_reason) == (wanted.text, wanted.stop_reason)
            drafted += found.stats.drafted_tokens
    assert drafted > n_prompts


# With both ways of drafting, 2 x (3,000 + 2 x 1,000) = 10,000 tokens in `exact`, and as many in `verified`.
@pytest.mark.numeric
def test_greedy_tokens_of_the_bundled_model(fitted_gguf: Path, drafting: str) -> None:
    assert_same_tokens(fitted_gguf, 10, 300, ffn="verified")


@pytest.mark.numeric
@pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])
def test_greedy_tokens_of_random_weights(synthetic: Callable[[str], Path], drafting: str, shape: str) -> None:
    assert_same_tokens(synthetic(shape), 10, 100, ffn="verified")


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_lookup_changes_no_token(fitted_gguf: Path, drafting: str, mode: str) -> None:
    assert_same_tokens(fitted_gguf, 4, 200, mode, ffn=mode, lookup=True)


def test_both_sources_of_drafts(fitted_gguf: Path, drafting: str) -> None:
    assert_same_tokens(fitted_gguf, 4, 200, ffn="verified", lookup=True)


def test_as_it_chooses_itself(fitted_gguf: Path) -> None:
    """Lengths and biases chosen by the time that things take, whatever this is."""
    with runtime.load(fitted_gguf, ffn="exact") as plain, runtime.load(fitted_gguf, ffn="verified") as drafting:
        for prompt in PROMPTS:
            assert continued(drafting, prompt, 200).token_ids == continued(plain, prompt, 200).token_ids


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3),
        Sampling(seed=4, temperature=1.5, top_k=0, top_p=1, min_p=0),
        Sampling(seed=5, repeat_penalty=1.3, repeat_last_n=-1),
    ],
)
def test_sampled_tokens(fitted_gguf: Path, drafting: str, sampling: Sampling) -> None:
    """The same random numbers decide; drafts are drawn with them, too, so that many are right."""
    drafted = accepted = 0
    with runtime.load(fitted_gguf, ffn="exact") as plain, runtime.load(fitted_gguf, ffn="verified") as drafting_model:
        for prompt in PROMPTS:
            wanted = continued(plain, prompt, 80, sampling)
            found = continued(drafting_model, prompt, 80, sampling)
            assert found.token_ids == wanted.token_ids
            drafted += found.stats.drafted_tokens
            accepted += found.stats.accepted_tokens
    assert accepted > drafted / 20


def test_a_sampler_and_its_clone_choose_alike() -> None:
    rng = np.random.default_rng(0)
    with Sampler(Sampling(seed=1, repeat_penalty=1.5), 50, [3, 4]) as sampler:
        for _ in range(5):
            sampler.sample(rng.normal(0, 2, 50).astype(np.float32))
        with sampler.clone() as clone:
            rows = rng.normal(0, 2, (20, 50)).astype(np.float32)
            drafted = [clone.sample(row) for row in rows]
        assert [sampler.sample(row) for row in rows] == drafted


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_length_limits_and_stop_texts(fitted_gguf: Path, drafting: str, n: int) -> None:
    with runtime.load(fitted_gguf, ffn="exact") as plain, runtime.load(fitted_gguf, ffn="verified") as model:
        for stop in ((), (",",), ("and", "\n")):
            wanted, found = (continued(m, PROMPTS[0], n, stop=stop) for m in (plain, model))
            assert (found.text, found.token_ids, found.stop_reason) == (
                wanted.text,
                wanted.token_ids,
                wanted.stop_reason,
            )
            assert found.stats.tokens == wanted.stats.tokens


def test_to_the_end_of_the_context(fitted_gguf: Path, drafting: str) -> None:
    with (
        runtime.load(fitted_gguf, ffn="exact", n_ctx=64) as plain,
        runtime.load(fitted_gguf, ffn="verified", n_ctx=64) as model,
    ):
        for prompt in PROMPTS:
            wanted, found = continued(plain, prompt, None), continued(model, prompt, None)
            assert (found.token_ids, found.stop_reason) == (wanted.token_ids, wanted.stop_reason)


def test_processors_see_each_token_once(fitted_gguf: Path, drafting: str) -> None:
    def ban_commas(seen: list[int]) -> Callable[[Any, Logits], Logits]:
        def process(ids: Any, logits: Logits) -> Logits:
            seen.append(len(ids))
            logits[comma] = -math.inf
            return logits

        return process

    with runtime.load(fitted_gguf, ffn="exact") as plain, runtime.load(fitted_gguf, ffn="verified") as model:
        (comma,) = plain.tokenize(",", add_special=False)[-1:]
        runs: list[tuple[list[int], list[int]]] = []
        for one in (plain, model):
            seen: list[int] = []
            runs.append((continued(one, PROMPTS[0], 60, logits_processors=ban_commas(seen)).token_ids, seen))
    assert runs[0] == runs[1]


def test_the_next_generation_goes_on_from_what_was_kept(fitted_gguf: Path, drafting: str) -> None:
    """A chat: what was drafted and not taken leaves nothing behind."""
    texts = []
    for ffn in ("exact", "verified"):
        with runtime.load(fitted_gguf, ffn=ffn) as model:
            ids = model.tokenize(PROMPTS[0])
            for _ in range(5):
                generation = continued(model, ids, 17, cache_prompt=True)
                ids = [*ids, *generation.token_ids, *model.tokenize(" And then", add_special=False)]
            texts.append(ids)
            cells = model._engine.cells
            assert cells.length(0) <= len(ids)
            assert (cells.members != 0).sum() == cells.length(0)
    assert texts[0] == texts[1]


def test_figures(fitted_gguf: Path, drafting: str) -> None:
    with runtime.load(fitted_gguf, ffn="verified") as model, runtime.load(fitted_gguf, ffn="exact") as plain:
        stats, before = continued(model, PROMPTS[1], 100).stats, continued(plain, PROMPTS[1], 100).stats
        total = model.stats().total
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    assert (total.drafted_tokens, total.accepted_tokens) == (stats.drafted_tokens, stats.accepted_tokens)
    assert (before.drafted_tokens, before.accepted_tokens) == (0, 0)
    # Rejected positions are counted in the mean, so it need not be the same.
    assert stats.computed_share == pytest.approx(before.computed_share, rel=0.5)
    assert stats.bytes_per_token > 0
    assert stats.gate_shares == [1.0] * len(stats.gate_shares)


@pytest.mark.parametrize("hot", [0, 512])
def test_beside_a_device(fitted_gguf: Path, drafting: str, hot: int) -> None:
    """A device's products of one token and of several may add up in another order: every token is the likeliest one of
    `exact` there, but for rounding."""
    options: dict[str, Any] = {"device": "CPU", "hot": hot}
    with runtime.load(fitted_gguf, ffn="verified", **options) as model:
        ids = model.tokenize(PROMPTS[0])
        found = continued(model, ids, 60)
    with runtime.load(fitted_gguf, ffn="exact", **options) as plain:
        logits = plain.logits([*ids, *found.token_ids])[len(ids) - 1 : -1]
    assert found.stats.drafted_tokens > 0
    chosen = logits[np.arange(len(found.token_ids)), found.token_ids]
    assert (logits.max(1) - chosen).max() <= 0.01 * np.ptp(logits)


# --- what they are refused for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": "dense", "lookup": True}, "lookup in `dense` mode"),
        ({"ffn": "verified", "flash_attention": False}, "without flash attention"),
        ({"draft_max": 0}, "draft_max is 0, expected 1 to 15"),
        ({"draft_max": 16}, "draft_max is 16, expected 1 to 15"),
        ({"draft_bias": "low"}, "draft_bias"),
        ({"lookup": 1}, "lookup is 1, expected True or False"),
    ],
)
def test_options_that_make_no_sense(fitted_gguf: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        runtime.load(fitted_gguf, **options)


def test_a_file_without_predictors(tiny_gguf: Path) -> None:
    with pytest.raises(UserError, match="no predictor that pays, which `verified` mode needs"):
        runtime.load(tiny_gguf, ffn="verified")


# --- how many, and from where ----------------------------------------------------------------------------------------


def simulated(acceptance: float, draft: float, another: float, n: int = 3000) -> tuple[float, float]:
    """Tokens that come in the time of one by itself, and the mean length of drafts. A batch of k tokens takes
    1 + another * (k - 1), a drafted token `draft`; each draft is right with that probability.
    """
    rng, lengths = random.Random(0), DraftLength(["a"], 15)
    tokens = seconds = 0.0
    drafts = []
    lengths.batches.add(1, 1.0)
    while tokens < n:
        arm, k = lengths.choose(100, ["a"])
        drafts.append(k)
        accepted = next((i for i in range(k) if rng.random() >= acceptance), k)
        if k:
            lengths.arms[arm].seconds.append(draft)
            lengths.arms[arm].judge(k, accepted)
        lengths.batches.add(1 + k, 1 + another * k)
        tokens += 1 + accepted
        seconds += k * draft + 1 + another * k
    return tokens / seconds, sum(drafts) / len(drafts)


def test_drafts_are_made_where_they_pay() -> None:
    assert simulated(0.9, 0.3, 0.1)[0] > 1.5
    assert simulated(0.9, 0.0, 0.1)[0] > 2.5  # looked up
    gain, length = simulated(0.99, 0.2, 0.02)
    assert gain > 2.5
    assert length > 6


def test_drafts_cost_little_where_they_do_not_pay() -> None:
    assert simulated(0.2, 0.6, 0.5)[0] > 0.95
    assert simulated(0.0, 0.5, 1.0)[0] > 0.95


def test_the_length_is_never_more_than_what_is_wanted() -> None:
    lengths = DraftLength(["a"], 8)
    lengths.batches.add(1, 1.0)
    lengths.arms["a"].seconds.append(0.0)
    for _ in range(100):
        lengths.arms["a"].judge(1, 1)
    assert lengths.choose(100, ["a"])[1] == 1  # what a batch costs is found out step by step
    lengths.batches.add(2, 1.1)
    assert lengths.choose(100, ["a"])[1] == 3
    lengths.batches.add(8, 1.2)
    assert [lengths.choose(n, ["a"])[1] for n in (0, 1, 2, 5, 100)] == [0, 1, 2, 4, 8]


def test_a_first_draft_that_fails_costs_little() -> None:
    """Short generations, too, where drafts are never right and a draft takes as long as a token."""
    lengths, seconds = DraftLength(["a"], 15), 0.0
    lengths.batches.add(1, 1.0)
    for _ in range(16):
        arm, k = lengths.choose(100, ["a"])
        if k:
            lengths.arms[arm].seconds.append(1.0)
            lengths.arms[arm].judge(k, 0)
        lengths.batches.add(1 + k, 1.0 + k)
        seconds += k + 1 + k
    assert seconds < 16 + 8


def test_the_better_of_two_ways_is_taken() -> None:
    rng, lengths, used = random.Random(0), DraftLength([0.0, -1.0], 8), {0.0: 0, -1.0: 0}
    lengths.batches.add(1, 1.0)
    for _ in range(400):
        arm, k = lengths.choose(100, [0.0, -1.0])
        if k:
            right = {0.0: 0.95, -1.0: 0.5}[arm]
            used[arm] += 1
            lengths.arms[arm].seconds.append({0.0: 0.3, -1.0: 0.25}[arm])
            lengths.arms[arm].judge(k, next((i for i in range(k) if rng.random() >= right), k))
        lengths.batches.add(1 + k, 1 + 0.1 * k)
    assert used[0.0] > 5 * used[-1.0] > 0


def test_lookup_goes_on_as_before() -> None:
    lookup = Lookup()
    assert lookup.drafts([1, 2, 3], 4) == []
    assert lookup.drafts([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert lookup.drafts([1, 2, 3, 4, 5, 1, 2, 9, 9, 1, 2], 2) == [9, 9]  # the latest place
    assert Lookup().drafts([7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]  # what repeats goes on repeating
    assert Lookup().drafts([1, 2, 3, 8, 2, 3, 1, 2, 3], 1) == [8]  # three in common tell more than two


def test_lookup_finds_what_a_search_finds() -> None:
    rng, ids, lookup = random.Random(3), [0, 1], Lookup()
    for _ in range(400):
        ids.append(rng.randrange(5))
        places = [
            max((at for at in range(n, len(ids)) if ids[at - n : at] == ids[-n:]), default=0)
            for n in (4, 3, 2)
            if len(ids) > n
        ]
        place = next((at for at in places if at), 0)
        wanted = (ids[place:] * 6)[:6] if place else []
        assert lookup.drafts(ids, 6) == wanted


def test_what_several_tokens_have_in_common() -> None:
    rng = np.random.default_rng(0)
    frequencies = rng.random(4000) ** 4
    fires = rng.random((200, 5, 4000)) < frequencies
    assert union(frequencies, float(frequencies.mean()), 5) == pytest.approx(float(fires.any(1).mean()), rel=0.02)
    assert union(frequencies, 0.3, 1) == 0.3
    assert union(np.zeros(4), 0.0, 3) == 0.0
