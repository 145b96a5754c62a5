"""Grammars: what they let through, judged by Python's re; mistakes and hostile ones; what a sampler makes of them."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import UserError
from runtime.text.grammar import Grammar
from runtime.text.sampling import Sampler, Sampling
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.native


@pytest.fixture(scope="module")
def vocab(tiny_gguf: Path) -> Iterator[Tokenizer]:
    with Tokenizer(tiny_gguf) as tokenizer:
        yield tokenizer


def accepts(grammar: Grammar, text: str) -> bool:
    automaton = grammar._automaton
    state = automaton.step(automaton.begin(), text.encode())
    return state >= 0 and automaton.ends(state) > 0


TEXTS = ["".join(signs) for n in range(6) for signs in itertools.product("ab", repeat=n)]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= "ab"', "ab"),
        ('root ::= "a" | "b" "a"+', "a|ba+"),
        ('root ::= ("a" | "bb")*', "(a|bb)*"),
        ('root ::= "a"{2} "b"?', "a{2}b?"),
        ('root ::= "a"{2,} [ab]', "a{2,}[ab]"),
        ('root ::= "ab"{1,2} "a"{0,1}', "(ab){1,2}a?"),
        ("root ::= [^a]{1,3}", "[^a]{1,3}"),
        ('root ::= x* "b"\nx ::= "a" |', "a*b"),
        ('root ::= (("a"?)*)* "b"', "a*b"),
        ("root ::= .{3}", "..."),
        ('# a comment\nroot ::= (  # another\n "a"\n | \n"b" "b" )\n', "a|bb"),
        ('root ::= "" | "\\x61\\u0062" [\\U00000061-b]', "|ab[ab]"),
        ('root ::= "a" r\nr ::= "b" root | "b"', "(ab)+"),
    ],
)
def test_a_grammar_is_the_same_as_an_expression(grammar: str, pattern: str) -> None:
    parsed = Grammar.from_gbnf(grammar)
    for text in TEXTS:
        assert accepts(parsed, text) == bool(re.fullmatch(pattern, text)), text


def test_what_no_expression_can_say() -> None:
    parsed = Grammar.from_gbnf('root ::= "a" root "b" | ""')
    for text in TEXTS:
        n = len(text) // 2
        assert accepts(parsed, text) == (text == "a" * n + "b" * n)
    for depth in (100, 1000):
        assert accepts(parsed, "a" * depth + "b" * depth)
        assert not accepts(parsed, "a" * depth + "b" * (depth - 1))


@pytest.mark.parametrize("low,high", [(0, 0x10FFFF), (0x7F, 0x80), (0x7FF, 0x801), (0xD000, 0xE001), (0xFFFE, 0x10001)])
def test_characters_of_all_lengths(low: int, high: int) -> None:
    one = Grammar.from_gbnf(f"root ::= [\\U{low:08X}-\\U{high:08X}]")
    others = Grammar.from_gbnf(f"root ::= [^\\U{low:08X}-\\U{high:08X}]") if low else None
    for code in (*range(0, 0x10FFFF, 577), low, high, max(0, low - 1), min(high + 1, 0x10FFFF), 0x7F, 0x80, 0xFFFF):
        if not 0xD800 <= code <= 0xDFFF:
            assert accepts(one, chr(code)) == (low <= code <= high)
            assert others is None or accepts(others, chr(code)) != (low <= code <= high)
    automaton = one._automaton
    assert automaton.step(automaton.begin(), b"\xff") == automaton.step(automaton.begin(), b"\xed\xa0\x80") == -1


def test_a_mask_is_what_each_token_alone_is(vocab: Tokenizer) -> None:
    for grammar in (Grammar.json_object(), Grammar.from_gbnf('root ::= [a-z ]{3,20} ("é" | "ß")* "."')):
        constraint = grammar.start(vocab, vocab.n_tokens + 7)
        rng = np.random.default_rng(0)
        for _ in range(30):
            mask = constraint.mask()
            assert mask.tolist() == [constraint.allows(token) for token in range(vocab.n_tokens + 7)]
            choices = [t for t in np.flatnonzero(mask) if t not in vocab.ends]
            if not choices:
                break
            constraint.accept(int(rng.choice(choices)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rule `root`"),
        ("root ::= nothing", "line 1, column 10: no rule `nothing`"),
        ('root ::= "a', "ends within a text"),
        ('root ::= ("a"', r"expected \)"),
        ('root ::= "a")', "expected the end of the line"),
        ('root ::= "\\q"', "unknown escape"),
        ('root ::= "\\ud800"', "hexadecimal"),
        ('root ::= "\ud800"', "surrogate"),
        ("root ::= [b-a]", "ends before it begins"),
        ('root ::= "a"{3,1}', "repetitions"),
        ('root ::= "a"{99999}', "repetitions"),
        ('root ::= "a"{}', r"\{2,\} or"),
        ("root ::= *", "end of the line"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1: a rule for the second time"),
        ("root ::= <token>", "tokens by name"),
        ("root = 5", "expected ::="),
        ("root ::= root", "no text"),
        ('root ::= root "a" | "b"', "without end"),
        ('root ::= e root "x" | "y"\ne ::= f\nf ::= ""', "without end"),
        ("root ::= " + "(" * 5000, "parentheses within each other"),
        ("root ::= " + '("a"{2000}){2000}' * 60, "more than 200000 elements"),
        ("x" * 70000, "70000 characters"),
    ],
)
def test_a_mistake_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Grammar.from_gbnf(text)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 200


def test_damaged_grammars_are_refused_or_work() -> None:
    good = 'root ::= ("a" [b-d]{2,3} | x)* # end\nx ::= "\\x41" . | [^\\]q]+ "é"?\n'
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(1500):
        signs = list(good)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(signs)))
            signs[at : at + int(rng.integers(0, 3))] = list(
                rng.choice(list('"[]()|*+?{}\\:=\n#^.-x3é \0'), int(rng.integers(3)))
            )
        try:
            accepts(Grammar.from_gbnf("".join(signs)), "abbAx")
        except UserError:
            refused += 1
    assert 100 < refused < 1500


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a" root "b" | "a" root "c" | "a" root "d" | "a"',
        'root ::= (x x)* "b"\nx ::= "a" | "a" x "c" | "a" x "d"',
        'root ::= ("a" | "aa" | "aaa")* root "b" | "a"',
    ],
)
def test_an_ambiguous_grammar_ends_the_request_in_time(grammar: str, vocab: Tokenizer) -> None:
    began = time.perf_counter()
    try:
        constraint = Grammar.from_gbnf(grammar).start(vocab, vocab.n_tokens)
        token = vocab.encode("aa", add_special=False)[-1]
        letter = next(t for t in range(vocab.n_tokens) if vocab.token_bytes(t) == b"a")
        with pytest.raises(UserError, match="ambiguous"):
            for _ in range(100000):
                constraint.mask()
                constraint.accept(letter)
        assert token >= 0
    except UserError as error:
        assert "without end" in error.message
    assert time.perf_counter() - began < 20


def generated(vocab: Tokenizer, grammar: Grammar, seed: int, n: int = 400, **fields: float) -> bytes | None:
    """What random logits make of a grammar; None where it has not ended after n tokens."""
    rng = np.random.default_rng(seed)
    found = b""
    quotes = np.array([7 * (vocab.token_bytes(t) == b'"') for t in range(vocab.n_tokens)], np.float32)
    sampling = Sampling(seed=seed, top_k=0, top_p=1, min_p=0, **fields)  # type: ignore[arg-type]
    with Sampler(sampling, vocab.n_tokens, [], n, vocab, grammar) as sampler:
        for _ in range(n):
            token = sampler.sample(rng.normal(0, 2, vocab.n_tokens).astype(np.float32) + quotes)
            if token in vocab.ends:
                return found
            found += vocab.token_bytes(token)
            if sampler.complete:
                return found
    return None


def test_a_sampler_writes_what_the_grammar_says(vocab: Tokenizer) -> None:
    for seed in range(20):
        text = generated(vocab, Grammar.from_gbnf('root ::= [a-z]{3,9} " " [0-9]+ "."'), seed)
        assert text is not None
        assert re.fullmatch(rb"[a-z]{3,9} [0-9]+\.", text)
    for seed in range(20):
        text = generated(vocab, Grammar.json_object(), seed, mirostat=2)
        assert text is None or isinstance(json.loads(text), dict)


def test_a_clone_of_a_bound_sampler_goes_on_alike_and_alone(vocab: Tokenizer) -> None:
    logits = [np.random.default_rng(i).normal(0, 2, vocab.n_tokens).astype(np.float32) for i in range(30)]
    grammar = Grammar.from_gbnf("root ::= [a-z ]{100,}")
    with Sampler(Sampling(seed=1), vocab.n_tokens, [], 100, vocab, grammar) as sampler:
        first = [sampler.sample(row) for row in logits[:10]]
        with sampler.clone() as other:
            ahead = [other.sample(row) for row in logits[10:]]
        assert [sampler.sample(row) for row in logits[10:]] == ahead
        sampler.reset()
        assert [sampler.sample(row) for row in logits[:10]] == first


def test_where_nothing_can_follow_the_answer_fails_alone(vocab: Tokenizer) -> None:
    letters = [t for t in range(vocab.n_tokens) if vocab.token_bytes(t) == b"a"]
    sampling = Sampling(logit_bias=tuple((t, float("-inf")) for t in letters))
    grammar = Grammar.from_gbnf('root ::= "a"')
    sampler = Sampler(sampling, vocab.n_tokens, [], 10, vocab, grammar)
    with sampler, pytest.raises(UserError, match="no token of the vocabulary can follow"):
        sampler.sample(np.zeros(vocab.n_tokens, np.float32))
