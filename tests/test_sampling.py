"""The sampler chain: what each knob does, judged by numpy on known logits."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from runtime.errors import UserError
from runtime.text.sampling import Sampler, Sampling

N_VOCAB = 500
OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
Logits = npt.NDArray[np.float32]


def random_logits(seed: int, n: int = N_VOCAB) -> Logits:
    return np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)


def softmax(logits: Logits) -> npt.NDArray[np.float64]:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def changed(**fields: Any) -> Sampling:
    return Sampling(**(OFF.__dict__ | fields))


def draws(sampling: Sampling, logits: Logits, n: int) -> list[int]:
    with Sampler(sampling, len(logits)) as sampler:
        return [sampler.sample(logits) for _ in range(n)]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=1), changed(top_p=0.0), changed(min_p=1.0)]
)
def test_greedy_is_argmax(sampling: Sampling) -> None:
    for seed in range(20):
        logits = random_logits(seed)
        assert draws(sampling, logits, 3) == [int(logits.argmax())] * 3


def test_a_seed_repeats_and_another_differs() -> None:
    logits = random_logits(0)
    first = draws(changed(seed=7), logits, 50)
    assert draws(changed(seed=7), logits, 50) == first
    assert draws(changed(seed=8), logits, 50) != first


def test_an_unset_seed_is_drawn_and_told() -> None:
    logits = random_logits(0)
    with Sampler(changed(seed=None), N_VOCAB) as one, Sampler(changed(seed=None), N_VOCAB) as two:
        assert one.seed != two.seed
        found = [one.sample(logits) for _ in range(30)]
    assert draws(changed(seed=one.seed), logits, 30) == found
    assert changed(seed=None).seeded().seed is not None
    assert changed(seed=5).seeded() == changed(seed=5)


def test_reset_starts_the_sequence_again() -> None:
    logits = random_logits(0)
    with Sampler(changed(seed=3), N_VOCAB) as sampler:
        first = [sampler.sample(logits) for _ in range(30)]
        sampler.reset()
        assert [sampler.sample(logits) for _ in range(30)] == first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits, n = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -30.0], np.float32), 6000
    expected = softmax(logits / np.float32(temperature)) * n
    found = Counter(draws(changed(temperature=temperature), logits, n))
    chi_square = sum((found[i] - e) ** 2 / e for i, e in enumerate(expected[:5]))
    assert chi_square < 23.5  # 4 degrees of freedom: p = 1e-4
    assert not found[5]


def test_filters_keep_what_they_say() -> None:
    logits = random_logits(3, 40) / 2
    order, p = np.argsort(-logits), np.sort(softmax(logits))[::-1]
    kept = {
        "top_k": (5, 5),
        "top_p": (0.8, int(np.searchsorted(np.cumsum(p), 0.8)) + 1),
        "min_p": (0.1, int((p >= 0.1 * p[0]).sum())),
    }
    for name, (value, n) in kept.items():
        assert 1 < n < 20
        sampling = changed(**{name: value, "temperature": 3.0})  # hot: whatever is kept gets drawn
        assert set(draws(sampling, logits, 1500)) == set(order[:n].tolist()), name


def test_repeat_penalty_moves_on_and_forgets() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], np.float32)
    assert draws(Sampling(temperature=0, repeat_penalty=1.5), logits, 4) == [0, 1, 2, 0]
    assert draws(Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=1), logits, 4) == [0, 1, 0, 1]
    assert draws(Sampling(temperature=0, repeat_penalty=1.5, repeat_last_n=0), logits, 3) == [0, 0, 0]
    with Sampler(Sampling(temperature=0, repeat_penalty=1.5), 4) as sampler:
        sampler.accept(0)
        assert sampler.sample(logits) == 1


def test_the_logits_are_left_alone_and_may_be_a_view() -> None:
    table = np.stack([random_logits(i) for i in range(4)], axis=1)
    column = table[:, 2]
    before = column.copy()
    assert draws(Sampling(temperature=0), column, 1) == [int(before.argmax())]
    np.testing.assert_array_equal(column, before)


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(N_VOCAB, -math.inf, np.float32)
    logits[[3, 4]] = 0
    assert set(draws(OFF, logits, 100)) == {3, 4}


def test_logits_that_are_no_numbers_are_refused() -> None:
    logits = random_logits(0)
    logits[17] = math.nan
    with Sampler(OFF, N_VOCAB) as sampler, pytest.raises(UserError, match="not numbers"):
        sampler.sample(logits)


def test_a_closed_sampler_says_so() -> None:
    sampler = Sampler(OFF, N_VOCAB)
    sampler.close()
    sampler.close()
    with pytest.raises(UserError, match="the sampler is closed"):
        sampler.sample(random_logits(0))


@pytest.mark.parametrize("temperature", [1e-40, 5e-324, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        logits = random_logits(seed) * 40
        assert draws(changed(temperature=temperature), logits, 3) == [int(logits.argmax())] * 3


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 100.0])
def test_no_logit_is_too_large_for_a_temperature(temperature: float) -> None:
    logits = np.array([1.0, 3e38, 2.0, -3e38, -np.inf], np.float32)
    for penalty in (1.0, 0.01, 100.0):
        sampling = changed(temperature=temperature, repeat_penalty=penalty, repeat_last_n=1)
        assert set(draws(sampling, logits, 30)) == {1}


def test_the_penalty_knows_the_end_of_the_prompt() -> None:
    logits = np.array([10.0, 9.0, 8.0, -1.0], np.float32)

    def first(prompt: list[int], last_n: int, n_ctx: int = 100) -> int:
        sampling = Sampling(temperature=0, repeat_penalty=2.0, repeat_last_n=last_n)
        with Sampler(sampling, 4, prompt, n_ctx) as sampler:
            return sampler.sample(logits)

    assert [first([0, 1, 3], n) for n in (0, 1, 2, 3, 64, -1)] == [0, 0, 0, 2, 2, 2]
    assert first([], 64) == 0
    assert first([0, *[3] * 90], -1) == 1
    assert first([0, *[3] * 90], 1 << 24) == 1
    with Sampler(Sampling(temperature=0, repeat_penalty=2.0, repeat_last_n=2), 4, [0, 1]) as sampler:
        assert [sampler.sample(logits) for _ in range(3)] == [2, 0, 1]  # which forgets the prompt bit by bit


def test_numbers_of_every_kind_and_the_usual_words_for_none() -> None:
    given = Sampling(np.float32(0.5), np.int64(3), Fraction(1, 2), 0, 1, np.uint8(4), np.int32(9))  # type: ignore[arg-type]
    assert given == Sampling(0.5, 3, 0.5, 0.0, 1.0, 4, 9)
    assert all(type(value) in (int, float, tuple) for value in vars(given).values())
    assert Sampling(top_k=-1).top_k == 0
    assert Sampling(seed=-1).seed is None
    logits = random_logits(1)
    assert draws(changed(top_k=-1), logits, 20) == draws(OFF, logits, 20)
    assert len(set(draws(changed(top_k=N_VOCAB * 3, temperature=100), logits, 5000))) > 0.98 * N_VOCAB


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-0.1, math.nan, math.inf, "0.5", None, True, 1j, [0.5], 10**400)),
        *({"top_k": value} for value in (-2, 1 << 31, 4.0, None, "40", True, np.float32(4), 10**5000)),
        *({name: value} for name in ("top_p", "min_p") for value in (-0.5, 1.1, math.nan, -math.inf, None, "1", False)),
        *({"repeat_penalty": value} for value in (0.0, -1.0, math.nan, 101, None, "1")),
        *({"repeat_last_n": value} for value in (-2, (1 << 24) + 1, 64.0, None, True)),
        *({"seed": value} for value in (-2, (1 << 32) - 1, 1 << 32, 1.0, -1.0, True, "7", math.nan)),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_no_number_or_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^{next(iter(wrong))} is .*, expected ") as refused:
        Sampling(**wrong)
    assert len(refused.value.message) < 200
