"""Stop texts: the text is cut where the first of them begins, however the tokens divide it.

The oracle is the whole text, generated without them and then searched by `str.find`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from runtime import Sampling
from runtime.generation import Generation
from runtime.model import Model

TEXT = "abcabcabd ééé\u2603\u2603 \U0001f469\u200d\U0001f469 aaaab aab\nEND\nEN"


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, ffn="exact", threads=1, n_ctx=128) as model:
        yield model


@pytest.fixture(scope="module")
def tokens_of_bytes(model: Model) -> dict[bytes, int]:
    """A token of each one and two bytes that the vocabulary has."""
    pieces = {model.tokenizer.token_bytes(i): i for i in reversed(range(model.structure.vocab_size))}
    return {piece: token for piece, token in pieces.items() if 1 <= len(piece) <= 2}


def written(model: Model, ids: Sequence[int], stop: Any, max_tokens: int | None = None) -> Generation:
    """A generation whose tokens are `ids`, and then the end of the text."""
    script = iter([*ids, model.tokenizer.eos])

    def follow(_: Any, logits: Any) -> Any:
        allowed = np.full_like(logits, -np.inf)
        allowed[next(script)] = 0
        return allowed

    options: dict[str, Any] = {"logits_processors": follow, "stop": stop, "cache_prompt": True}
    return model.generate([1], max_tokens, Sampling(temperature=0), **options)


def checked(model: Model, ids: Sequence[int], stop: Sequence[str], max_tokens: int | None = None) -> str:
    """The text, of which the pieces told no more and no less; and the reason is right."""
    whole = b"".join(map(model.tokenizer.token_bytes, ids[:max_tokens])).decode("utf-8", "replace")
    begins = [at for text in stop if (at := whole.find(text)) >= 0]
    expected, reason = (whole[: min(begins)], "stop") if begins else (whole, "eos" if max_tokens is None else "length")
    generation = written(model, ids, stop, max_tokens)
    pieces = list(generation)
    assert (generation.text, "".join(pieces), generation.stop_reason) == (expected, expected, reason), (whole, stop)
    return expected


def divided(text: str, tokens: dict[bytes, int], draw: random.Random) -> list[int]:
    """The text as tokens of one or two bytes, characters cut in two included."""
    raw, ids = text.encode(), []
    while raw:
        length = 2 if raw[:2] in tokens and draw.random() < 0.5 else 1
        ids.append(tokens[raw[:length]])
        raw = raw[length:]
    return ids


def test_any_stop_texts_in_any_text(model: Model, tokens_of_bytes: dict[bytes, int]) -> None:
    draw, found = random.Random(1), 0
    for _ in range(60):
        ids = divided(TEXT, tokens_of_bytes, draw)
        stop = []
        for _ in range(draw.randint(0, 4)):
            at = draw.randrange(len(TEXT))
            part = TEXT[at : at + draw.randint(1, 6)]
            stop.append(part + draw.choice(["", "", "", "x", part[0]]))
        found += checked(model, ids, stop, draw.choice([None, draw.randint(1, len(ids) - 1)])) != TEXT
    assert found > 20


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["END", "abd"], "abcabc"),  # the first in the text, not in the list
        (["bc", "abca"], ""),  # which begins earlier, and is complete later
        (["bc", "abcx"], "a"),  # which begins earlier, and does not come
        (["ab", "abc"], ""),  # one begins another
        (["cab", "abc"], ""),  # they overlap
        (["aab\n"], "abcabcabd ééé☃☃ 👩\u200d👩 aaaab "),  # found after a false start within itself
        (["☃ "], "abcabcabd ééé☃"),  # a character of several tokens
        (["EN\n", "EN"], "abcabcabd ééé☃☃ 👩\u200d👩 aaaab aab\n"),
        (["ENx", "N\0"], TEXT),  # what was held back is told at the end
        (["\nEN\n", "\nENx"], TEXT),
    ],
)
def test_stop_texts_that_meet(model: Model, tokens_of_bytes: dict[bytes, int], stop: list[str], expected: str) -> None:
    for seed in range(3):
        assert checked(model, divided(TEXT, tokens_of_bytes, random.Random(seed)), stop) == expected


def test_a_stop_text_at_the_very_end(model: Model, tokens_of_bytes: dict[bytes, int]) -> None:
    ids = divided("We END", tokens_of_bytes, random.Random(0))
    assert checked(model, ids, ["END"]) == "We "
    assert checked(model, ids, ["END"], max_tokens=len(ids)) == "We "
    # An earlier one was still awaited when the text ended.
    assert checked(model, ids, ["E ENDING", "e ENDX", "EN"], max_tokens=len(ids)) == "We "
    # A character that is never completed ends a stop text too.
    assert checked(model, [*ids, tokens_of_bytes["é".encode()[:1]]], ["D\ufffd"]) == "We EN"


def test_waiting_costs_no_more_tokens_than_it_must(model: Model, tokens_of_bytes: dict[bytes, int]) -> None:
    ids = [tokens_of_bytes[bytes([byte])] for byte in b"xabcabc"]
    for stop, n in ((["abc"], 4), (["bc", "abca"], 5), (["bc", "abcx"], 5), (["ab", "abc"], 3)):
        generation = written(model, ids, stop)
        list(generation)
        assert len(generation.token_ids) == n
