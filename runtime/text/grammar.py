"""What an answer must look like: a grammar, and what of it has been written so far.

libllama has grammars, too. Those end the process for some inputs, and some others take them for ever; ours are clients'
own, so the matcher is ours as well (runtime/native/grammar.cpp): it knows bounds, and nothing that it meets is more
than one failed request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.base.arguments import shown
from runtime.bindings.byte_grammar import DEAD, ByteGrammar, TooMuchError
from runtime.errors import UserError
from runtime.text import gbnf
from runtime.text.json_schema import gbnf_of
from runtime.text.tokenizer import Tokenizer

_LONGEST_TEXT, _LONGEST_SCHEMA = 1 << 16, 1 << 18  # characters


class Grammar:
    """A grammar of bytes, for one request: what it learns of a vocabulary is freed with it.

    text: the same in llama.cpp's notation (GBNF).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._automaton = ByteGrammar(*gbnf.parse(text).arrays())
        try:
            self._begin = self._automaton.begin()
        except TooMuchError:
            raise UserError("grammar: it refers to itself without end, or is too ambiguous") from None
        if self._begin == DEAD:
            raise UserError("grammar: no text is of this form")

    @classmethod
    def from_gbnf(cls, text: str) -> Grammar:
        """A grammar in llama.cpp's notation. Raises UserError with the place of a mistake, or for one that is too large
        or ambiguous.
        """
        if not isinstance(text, str):
            raise UserError(f"grammar is {shown(text)}, expected a text")
        if len(text) > _LONGEST_TEXT:
            raise UserError(f"grammar: {len(text)} characters, expected at most {_LONGEST_TEXT}")
        return cls(text)

    @classmethod
    def from_json_schema(cls, schema: Any) -> Grammar:
        """JSON of a schema, given as an object or as JSON text. Every text of the grammar is valid by the schema.

        Raises UserError for what is no schema, and for one that demands what cannot be promised.
        """
        if isinstance(schema, str):
            if len(schema) > _LONGEST_SCHEMA:
                raise UserError(f"schema: {len(schema)} characters, expected at most {_LONGEST_SCHEMA}")
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise UserError("schema: the text is no JSON") from None
        if not isinstance(schema, Mapping | bool):
            raise UserError(f"schema is {shown(schema)}, expected an object")
        return cls(gbnf_of(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.from_json_schema({"type": "object"})

    def start(self, vocab: Tokenizer, n_vocab: int) -> Constraint:
        """An answer of this form, in tokens of a vocabulary. n_vocab: how many logits there are, of which those beyond
        the vocabulary are never chosen.
        """
        return Constraint(self._automaton, self._begin, vocab, n_vocab)


class Constraint:
    """What may follow in one answer."""

    def __init__(self, automaton: ByteGrammar, state: int, vocab: Tokenizer, n_vocab: int) -> None:
        self._automaton, self._begin, self._state = automaton, state, state
        self._vocab, self._n_vocab = vocab, n_vocab

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self._automaton.ends(self._state) == 2

    def allows(self, token: int) -> bool:
        """Whether a token may be next. Raises UserError where the grammar turns out to be too ambiguous."""
        return self._ends(token) or self._after(token) != DEAD

    def mask(self) -> npt.NDArray[np.bool_]:
        """Which tokens may be next, bool [n_vocab]. Raises UserError as `allows`."""
        allowed = np.zeros(self._n_vocab, np.bool_)
        try:
            found = self._automaton.mask(self._state, self._vocab.table)
        except TooMuchError:
            raise _too_much() from None
        n = min(len(found), self._n_vocab)
        allowed[:n] = found[:n]
        ends = [token for token in self._vocab.ends if token < self._n_vocab]
        allowed[ends] = self._automaton.ends(self._state) > 0
        return allowed

    def accept(self, token: int) -> None:
        """Take a token that may be next. Raises UserError for another one."""
        if self._ends(token):
            return
        state = self._after(token)
        if state == DEAD:
            raise UserError(f"grammar: token {token} cannot follow")
        self._state = state

    def clone(self) -> Constraint:
        """Another one at the same place."""
        other = Constraint(self._automaton, self._begin, self._vocab, self._n_vocab)
        other._state = self._state
        return other

    def reset(self) -> None:
        """Begin again."""
        self._state = self._begin

    def _ends(self, token: int) -> bool:
        return token in self._vocab.ends and self._automaton.ends(self._state) > 0

    def _after(self, token: int) -> int:
        if token >= self._vocab.n_tokens or token in self._vocab.ends:
            return DEAD
        data = self._vocab.table.bytes_of(token)
        try:
            return self._automaton.step(self._state, data) if data else DEAD
        except TooMuchError:
            raise _too_much() from None


def _too_much() -> UserError:
    return UserError("grammar: too ambiguous: what may follow cannot be computed within its bounds")
