"""Arguments of a model's methods: what has a plain meaning works, everything else is one UserError that names the argument."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import Sampling, UserError
from runtime.model import Model

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, ffn="exact", threads=1, n_ctx=128) as model:
        yield model


def kind(value: Any) -> str:
    """A short name of a case, also where the value has no spelling."""
    return value if isinstance(value, str) and value.isidentifier() else type(value).__name__


def text_of(model: Model, prompt: Any = "We hold", max_tokens: Any = 6, **options: Any) -> str:
    return "".join(model.generate(prompt, max_tokens, GREEDY, **options))


def test_ids_may_come_in_any_order_that_is_one(model: Model) -> None:
    ids = model.tokenize("We hold")
    usual = text_of(model)
    assert usual
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), iter(ids), [np.int64(i) for i in ids]):
        assert text_of(model, prompt) == usual
    assert np.array_equal(model.logits(np.array(ids)), model.logits(ids))
    assert model.detokenize(np.array(ids)) == model.detokenize(ids) == "We hold"


@pytest.mark.parametrize(
    "ids",
    [
        *(
            None,
            5,
            b"We",
            bytearray(b"We"),
            memoryview(b"We"),
            {1: 2},
            {1, 2},
            [1, 2.0],
            [1, True],
            ["a"],
            [None],
            [[1, 2]],
        ),
        *([-1], [4096], [1 << 70], [10**5000], np.array([1.0, 2.0]), np.array([True]), np.array([[1, 2]]), np.array(3)),
    ],
    ids=kind,
)
def test_what_are_no_ids_is_refused(model: Model, ids: Any) -> None:
    with pytest.raises(UserError, match=r"^prompt"):
        model.generate(ids)
    for method in (model.logits, model.detokenize):
        with pytest.raises(UserError, match=r"^ids"):
            method(ids)


@pytest.mark.parametrize("text", [None, b"We", 5, ["We"]], ids=kind)
def test_only_a_text_is_tokenized(model: Model, text: Any) -> None:
    with pytest.raises(UserError, match=r"^text is a .*, expected a str"):
        model.tokenize(text)


def test_an_empty_prompt(model: Model) -> None:
    assert text_of(model, "") == text_of(model, [1])  # the start token
    for nothing in ([], (), np.array([], int)):
        with pytest.raises(UserError, match="no tokens"):
            model.generate(nothing)


def test_how_many_tokens(model: Model) -> None:
    for n in (0, 1, np.int8(3)):
        generation = model.generate("We hold", n, GREEDY)
        list(generation)
        assert (len(generation.token_ids), generation.stop_reason) == (n, "length")
    whole = text_of(model, max_tokens=None)
    assert text_of(model, max_tokens=-1) == whole
    assert len(whole) > 100


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", value) for value in (-2, 1.0, float("nan"), float("inf"), "5", True, 1 << 31)),
        *(("stop", value) for value in (b"END", 5, [""], "", ["a", None], [b"a"], [["a"]], {"a": 1}, True)),
        *(("logits_processors", value) for value in (5, "a", [None], [5], {"a": 1})),
        *((name, value) for name in ("on_token", "on_prompt") for value in (5, "a", [print])),
        *(("sampling", value) for value in ({"temperature": 0}, 0.5, Sampling)),
    ],
    ids=kind,
)
def test_what_has_no_meaning_is_refused(model: Model, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name}"):
        model.generate("We hold", **{name: value})


def test_one_stands_for_a_list_of_one_and_none_for_none(model: Model) -> None:
    usual = text_of(model, max_tokens=12)
    absent = max(usual, key=usual.count) + "\u2603"  # begins with a character of the text, and is not in it
    stop = usual[5:8]
    assert text_of(model, max_tokens=12, stop=absent) == usual
    for given in (stop, [stop], {stop}, iter([stop]), np.array([stop]), (absent, stop)):
        assert text_of(model, max_tokens=12, stop=given) == usual[:5]
    seen: list[int] = []

    def watch(ids: Any, logits: Any) -> Any:
        seen.append(len(ids))
        return logits

    assert text_of(model, logits_processors=watch) == text_of(model, logits_processors=None, stop=None)
    assert len(seen) == 6


# --- the penalty and the prompt ---------------------------------------------------------------------------------------


def fixed(_: Any, logits: Any) -> Any:
    logits[:] = 0
    logits[[300, 310, 320]] = 10, 9, 8  # of which a penalty of 2 makes 5, 4.5 and 4
    return logits


@pytest.mark.parametrize(
    ("last_n", "expected"),
    [
        (64, [310, 320, 300]),
        (-1, [310, 320, 300]),
        (4, [310, 320, 300]),
        (3, [310, 300, 320]),
        (2, [300, 310, 320]),
        (0, [300] * 3),
    ],
)
@pytest.mark.parametrize("cache_prompt", [False, True])
def test_the_repeat_penalty_counts_the_prompts_last_tokens(
    model: Model, last_n: int, expected: list[int], cache_prompt: bool
) -> None:
    sampling = Sampling(temperature=0, repeat_penalty=2.0, repeat_last_n=last_n)
    generation = model.generate([1, 300, 330, 340], 3, sampling, cache_prompt=cache_prompt, logits_processors=fixed)
    list(generation)
    assert generation.token_ids == expected


# --- load -------------------------------------------------------------------------------------------------------------


def test_load_takes_numbers_of_every_kind(tiny_gguf: Path) -> None:
    options: dict[str, Any] = {
        "threads": np.int64(1),
        "n_ctx": np.uint16(64),
        "n_batch": np.int8(8),
        "cpus": iter([np.int32(0)]),
    }
    with runtime.load(str(tiny_gguf), device="none", predictor_bias=np.float32(np.inf), **options) as model:
        assert (model.threads, model.n_ctx) == (1, 64)
        assert model.logits([1, 5, 6]).shape == (3, 4096)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("path", [None, 5, b"x", ["a"]]),
        ("ffn", [5, ["exact"], "lazy", b"exact"]),
        ("threads", [1.0, "1", True, 0, -1, 513, float("nan"), [1]]),
        ("n_ctx", [64.0, "64", True, 0, -1, 10**9]),
        ("kv_type", [["f16"], None, 5, "f64"]),
        ("n_batch", [0, -1, 1.5, "8", None, True]),
        ("predictor_bias", [float("nan"), "1", None, True, 1j]),
        ("cpus", [[0.0], 5, "x", None, [True]]),
        ("priority", [None, 5, ["low"], "x"]),
        ("device", [None, 5, ["none"], "x"]),
        ("hot", [1.5, "x", [1.5], True, {1: 2}]),
        ("trace", [5, ["x"]]),
    ],
)
def test_load_refuses_what_has_no_meaning(tiny_gguf: Path, name: str, values: list[Any]) -> None:
    for value in values:
        options = {"path": tiny_gguf, "device": "none", name: value}
        with pytest.raises(UserError, match=rf"\b{name}\b.*(, expected |, found CPU)"):
            runtime.load(**options)
