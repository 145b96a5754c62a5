"""The samplers beyond top_k and its kind: what each one leaves, judged by float64 numpy on known logits."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from runtime.errors import UserError
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import Tokenizer

Logits = npt.NDArray[np.float32]
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
N = 40


def logits_of(seed: int, n: int = N) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, n).astype(np.float32)


def softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return np.asarray(weights / weights.sum())


def drawn(n: int, logits: Logits, **fields: Any) -> Counter[int]:
    """What is drawn by these logits alone: each time anew, with a random state of its own."""
    found: Counter[int] = Counter()
    for seed in range(n):
        with Sampler(Sampling(**(OFF | {"seed": seed} | fields)), len(logits)) as sampler:
            found[sampler.sample(logits)] += 1
    return found


def greedy(logits: Logits, n: int, prompt: tuple[int, ...] = (), **fields: Any) -> list[int]:
    with Sampler(Sampling(temperature=0, **fields), len(logits), prompt) as sampler:
        return [sampler.sample(logits) for _ in range(n)]


def fits(found: Counter[int], expected: npt.NDArray[np.float64]) -> bool:
    """Whether draws can come from these probabilities, by chi-square with a p of about 1e-4; none where it is zero."""
    n = found.total()
    likely = np.flatnonzero(expected * n >= 5)
    chi_square = sum((found[int(i)] - expected[i] * n) ** 2 / (expected[i] * n) for i in likely)
    degrees = len(likely)
    bound = degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
    return chi_square < bound and not any(found[int(i)] for i in np.flatnonzero(expected == 0))


def only(kept: npt.NDArray[np.bool_], logits: Logits) -> npt.NDArray[np.float64]:
    return softmax(np.where(kept, logits, -np.inf))


# --- what changes single logits ---------------------------------------------------------------------------------------


def test_frequency_and_presence_count_what_was_generated_alone() -> None:
    logits = np.array([5.0, 4.0, 3.5, 0.0], np.float32)
    assert greedy(logits, 6, (0, 0, 0), presence_penalty=0.9) == [0] * 6
    assert greedy(logits, 6, (0, 0, 0), presence_penalty=1.2) == [0, 1, 0, 0, 0, 0]
    assert greedy(logits, 6, (0, 0, 0), frequency_penalty=0.6) == [0, 0, 1, 0, 2, 1]
    assert greedy(logits, 4, frequency_penalty=-2.0, presence_penalty=0.5) == [0] * 4
    scores, counts = logits.astype(np.float64), np.zeros(4)
    expected = []
    for _ in range(40):
        expected.append(int((scores - 0.37 * counts - 0.9 * (counts > 0)).argmax()))
        counts[expected[-1]] += 1
    assert greedy(logits, 40, frequency_penalty=0.37, presence_penalty=0.9) == expected


def test_the_repeat_penalty_comes_before_the_others_and_sees_the_prompt() -> None:
    logits = np.array([4.0, 3.0, 2.9, -1.0], np.float32)
    assert greedy(logits, 3, (0,), repeat_penalty=2.0, presence_penalty=0.2) == [1, 2, 0]


def test_a_bias_is_added_and_minus_infinity_forbids() -> None:
    logits = logits_of(1)
    order = np.argsort(-logits)
    best, second = int(order[0]), int(order[1])
    assert greedy(logits, 1, logit_bias=((best, -math.inf),)) == [second]
    assert greedy(logits, 1, logit_bias={17: 100}) == [17]
    changed = logits.copy()
    changed[3] += 2.5
    changed[best] = -np.inf
    found = drawn(1500, logits, logit_bias=((3, 2.5), (best, -math.inf)))
    assert fits(found, softmax(changed))
    assert not fits(found, softmax(logits))


def test_to_forbid_everything_is_refused_when_it_matters() -> None:
    bias = tuple((i, -math.inf) for i in range(4))
    for temperature in (0, 1):
        sampler = Sampler(Sampling(temperature=temperature, logit_bias=bias), 4)
        with sampler, pytest.raises(UserError, match="forbids every token"):
            sampler.sample(np.zeros(4, np.float32))
    with pytest.raises(UserError, match=r"logit_bias: token id 4, expected 0 to 3"):
        Sampler(Sampling(logit_bias=((4, 1.0),)), 4)


# --- filters -----------------------------------------------------------------------------------------------------------


def test_top_n_sigma() -> None:
    logits = logits_of(2)
    kept = logits >= logits.max() - 1.5 * logits.std()
    assert 2 < kept.sum() < 15
    assert fits(drawn(1500, logits, top_n_sigma=1.5), only(kept, logits))
    assert fits(drawn(1500, logits, top_n_sigma=0), softmax(logits))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_typical_keeps_the_least_surprising_information(share: float) -> None:
    logits = logits_of(3) / 2
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum()
    order = np.argsort(np.abs(-np.log(p) - entropy))
    n = int(np.searchsorted(np.cumsum(p[order]), share)) + 1
    kept = np.zeros(N, bool)
    kept[order[:n]] = True
    assert 1 < n < N
    assert fits(drawn(1500, logits, typical_p=share), only(kept, logits))


def test_typical_bears_tokens_that_cannot_be() -> None:
    logits = np.array([0.0, -1.0, -2.0, -400.0, -np.inf, -200.0], np.float32)
    assert set(drawn(300, logits, typical_p=0.9)) <= {0, 1, 2}
    assert set(drawn(300, logits, mirostat=1)) <= {0, 1, 2}


def test_xtc_leaves_out_all_likely_tokens_but_the_last() -> None:
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.12, 0.05, 0.03])).astype(np.float32)
    kept = np.array([False, False, False, True, True, True])
    assert fits(drawn(1200, logits, xtc_probability=1, xtc_threshold=0.1), only(kept, logits))
    mixed = 0.3 * only(kept, logits) + 0.7 * softmax(logits)
    assert fits(drawn(2500, logits, xtc_probability=0.3, xtc_threshold=0.1), mixed)
    assert fits(drawn(1200, logits, xtc_probability=1, xtc_threshold=0.1, min_keep=4), softmax(logits))


def test_min_keep_holds_for_the_filters() -> None:
    logits = logits_of(4)
    order = np.argsort(-logits)
    for name, value in (("top_p", 0.0), ("min_p", 1.0)):
        assert set(drawn(60, logits, temperature=50.0, **{name: value})) == {int(order[0])}
        assert set(drawn(200, logits, temperature=50.0, min_keep=3, **{name: value})) == set(order[:3].tolist())


# --- temperature and mirostat -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("range_", "exponent"), [(0.5, 1.0), (0.7, 2.5)])
def test_dynamic_temperature(range_: float, exponent: float) -> None:
    logits = logits_of(5)
    p = softmax(logits)
    share = -(p * np.log(p)).sum() / math.log(N)
    temperature = 1 - range_ + 2 * range_ * share**exponent
    assert abs(temperature - 1) > 0.05
    found = drawn(2500, logits, dynatemp_range=range_, dynatemp_exponent=exponent)
    assert fits(found, softmax(logits.astype(np.float64) / temperature))


def test_mirostat_2_cuts_at_a_surprise_that_it_corrects() -> None:
    logits = logits_of(6)
    p, mu = softmax(logits), 2 * 1.5
    with Sampler(Sampling(**OFF, mirostat=2, mirostat_tau=1.5, mirostat_eta=0.3), N) as sampler:
        for _ in range(200):
            kept = -np.log2(p) <= mu
            if not kept.any():
                kept = p == p.max()
            token = sampler.sample(logits)
            assert kept[token]
            mu -= 0.3 * (-math.log2(p[token] / p[kept].sum()) - 1.5)


def test_mirostat_holds_the_surprise_and_follows_its_seed() -> None:
    logits = logits_of(7, 400)
    for version in (1, 2):
        for tau in (1.0, 3.0):
            sampling = Sampling(**OFF, mirostat=version, mirostat_tau=tau, mirostat_eta=0.1)
            with Sampler(sampling, 400) as one, Sampler(sampling, 400) as two:
                tokens = [one.sample(logits) for _ in range(600)]
                assert tokens == [two.sample(logits) for _ in range(600)]
            # The surprise within what was kept is at most that within all.
            assert -np.log2(softmax(logits))[tokens[200:]].mean() > 0.7 * tau
        few = len(set(_tokens(version, 1.0, logits)))
        assert few < len(set(_tokens(version, 4.0, logits)))


def _tokens(version: int, tau: float, logits: Logits) -> list[int]:
    with Sampler(Sampling(**OFF, mirostat=version, mirostat_tau=tau), len(logits)) as sampler:
        return [sampler.sample(logits) for _ in range(400)]


# --- DRY ----------------------------------------------------------------------------------------------------------------


def dry_by_hand(seen: list[int], token: int, multiplier: float, base: float, allowed: int) -> float:
    """What DRY takes from `token` after `seen`: by the longest end of `seen` that stood before another `token`."""
    longest = 0
    for at, other in enumerate(seen):
        if other == token:
            n = 0
            while n < at and seen[at - 1 - n] == seen[-1 - n]:
                n += 1
            longest = max(longest, n)
    return multiplier * base ** (longest - allowed) if longest >= allowed and longest else 0.0


@pytest.mark.parametrize(("multiplier", "base", "allowed"), [(0.8, 1.75, 2), (3.0, 1.2, 1)])
def test_dry_is_that_of_its_definition(multiplier: float, base: float, allowed: int) -> None:
    rng = np.random.default_rng(8)
    prompt = rng.integers(0, 4, 30).tolist()
    seen = list(prompt)
    sampling = Sampling(
        temperature=0, dry_multiplier=multiplier, dry_base=base, dry_allowed_length=allowed, dry_penalty_last_n=-1
    )
    changed = 0
    with Sampler(sampling, 4, prompt, 300) as sampler:
        for _ in range(100):
            logits = rng.normal(0, 1, 4).astype(np.float32)
            scores = [logits[i] - dry_by_hand(seen, i, multiplier, base, allowed) for i in range(4)]
            seen.append(sampler.sample(logits))
            assert seen[-1] == int(np.argmax(scores))
            changed += seen[-1] != int(logits.argmax())
    assert changed > 10


def test_texts_break_the_sequences_of_dry(tiny_gguf: Path) -> None:
    with Tokenizer(tiny_gguf) as vocab:
        n = vocab.n_tokens
        prompt = vocab.encode("We, the people, of the land, and we, the people", add_special=False)
        logits = np.zeros(n, np.float32)
        comma = vocab.encode("a, b", add_special=False)[1]
        assert vocab.decode([comma]) == ","
        logits[comma] = 1.0
        given = {"temperature": 0, "dry_multiplier": 5.0}
        for breakers, chosen in (((), False), ((",",), True), (("x", "q"), False)):
            with Sampler(Sampling(**given, dry_sequence_breakers=breakers), n, prompt, 100, vocab) as sampler:
                assert (sampler.sample(logits) == comma) is chosen


# --- all of them ----------------------------------------------------------------------------------------------------------

EVERYTHING: list[dict[str, Any]] = [
    {"frequency_penalty": 0.5, "presence_penalty": 0.2, "repeat_penalty": 1.2},
    {"typical_p": 0.8, "top_n_sigma": 2.0, "xtc_probability": 0.5, "dynatemp_range": 0.5},
    {"dry_multiplier": 1.0, "dry_allowed_length": 1, "logit_bias": ((1, -math.inf), (2, 3.0))},
    {"mirostat": 1},
    {"mirostat": 2, "frequency_penalty": 1.0},
    {"temperature": 0, "dry_multiplier": 1.0, "dry_allowed_length": 1, "presence_penalty": 1.0},
]


@pytest.mark.parametrize("fields", EVERYTHING, ids=lambda fields: next(iter(fields)))
def test_a_clone_goes_on_as_the_sampler_does_and_a_reset_begins_again(fields: dict[str, Any]) -> None:
    logits = [logits_of(i) / 2 for i in range(60)]
    with Sampler(Sampling(**(OFF | fields)), N, [], 200) as sampler:
        first = [sampler.sample(row) for row in logits[:30]]
        with sampler.clone() as other:
            ahead = [other.sample(row) for row in logits[30:]]
        assert [sampler.sample(row) for row in logits[30:]] == ahead
        sampler.reset()
        assert [sampler.sample(row) for row in logits[:30]] == first


@pytest.mark.parametrize("fields", [{"top_p": 0.0}, *EVERYTHING], ids=lambda fields: next(iter(fields)))
def test_extreme_logits_give_a_token(fields: dict[str, Any]) -> None:
    for row in ([3e38, -3e38, -np.inf, 0.0], [-np.inf, -np.inf, 5.0, -np.inf], [0.0, 0.0, 0.0, 0.0], [-3e38] * 4):
        logits = np.array(row, np.float32)
        with Sampler(Sampling(**(OFF | fields)), 4, [], 100) as sampler:
            for _ in range(40):
                token = sampler.sample(logits)
                assert 0 <= token < 4
                assert logits[token] > -np.inf


@pytest.mark.parametrize(
    "wrong",
    [
        *({"frequency_penalty": value} for value in (101, -101, math.nan, "1", True)),
        *({"typical_p": value} for value in (-0.1, 1.1, None)),
        *({"top_n_sigma": value} for value in (-2, math.inf)),
        *({"xtc_probability": value} for value in (2, math.nan)),
        *({"dry_multiplier": value} for value in (-1, 101)),
        *({"dry_allowed_length": value} for value in (-1, 2.0)),
        *({"dry_penalty_last_n": value} for value in (-2, 1 << 30)),
        *({"mirostat": value} for value in (-1, 3, 1.0)),
        *({"mirostat_eta": value} for value in (-0.1, 2.0)),
        *({"min_keep": value} for value in (-1, 0.5)),
        *({"logit_bias": value} for value in (5, "ab", [(1,)], [(1, "x")], [(-1, 1)], [(1, math.nan)], [(1.5, 1)])),
        {"logit_bias": [(i, 1.0) for i in range(1025)]},
        *({"dry_sequence_breakers": value} for value in (5, ["a"] * 17, ["é" * 21], ["a\0b"], [""])),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(wrong))}") as refused:
        Sampling(**wrong)
    assert len(refused.value.message) < 200
    assert "\n" not in refused.value.message
