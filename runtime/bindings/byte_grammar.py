"""Grammars over bytes, in our native library: which tokens may follow (runtime/native/grammar.cpp)."""

from __future__ import annotations

import ctypes
import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bindings import sparse_ffn

END, OR, RULE, SET = range(4)  # kinds of elements
DEAD, TOO_MUCH = -1, -2  # in place of a state
_I32, _P = ctypes.c_int32, ctypes.c_void_p


class TooMuchError(Exception):
    """A grammar reached a bound on work or memory."""


@dataclass(frozen=True)
class TokenTable:
    """The bytes of all tokens of a vocabulary, in the order that the grammar walks them.

    data: all of them, one after the other; offsets int64 [n + 1]. order int32: tokens that have bytes, ascending by
    them; common int32: how many bytes each has in common with the one before it.
    """

    data: bytes
    offsets: npt.NDArray[np.int64]
    order: npt.NDArray[np.int32]
    common: npt.NDArray[np.int32]

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> TokenTable:
        """The table of tokens; those without bytes never follow."""
        offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum([len(token) for token in tokens], out=offsets[1:])
        order = sorted((i for i, token in enumerate(tokens) if token), key=tokens.__getitem__)
        common = [0] + [_common(tokens[a], tokens[b]) for a, b in itertools.pairwise(order)]
        return cls(b"".join(tokens), offsets, np.array(order, np.int32), np.array(common[: len(order)], np.int32))

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.data[self.offsets[token] : self.offsets[token + 1]]


def _common(one: bytes, other: bytes) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


class ByteGrammar:
    """An automaton. code int32 [n, 2]: (kind, value) of elements; rules: where each begins, the whole text's first;
    sets uint8 [n, 256]. It is trusted: indices are not checked. Freed with the last reference to it.
    """

    def __init__(self, code: npt.NDArray[np.int32], rules: npt.NDArray[np.int32], sets: npt.NDArray[np.uint8]) -> None:
        lib = _library()
        self._lib = lib
        handle = lib.lzn_grammar_new(
            code.ctypes.data, len(code), rules.ctypes.data, len(rules), sets.ctypes.data, len(sets)
        )
        if not handle:
            raise MemoryError
        self._handle = handle
        weakref.finalize(self, lib.lzn_grammar_free, handle).atexit = False

    def begin(self) -> int:
        """The state before the first byte. Raises TooMuchError."""
        return _checked(self._lib.lzn_grammar_begin(self._handle))

    def step(self, state: int, data: bytes) -> int:
        """The state after some bytes, or DEAD. Raises TooMuchError."""
        return _checked(self._lib.lzn_grammar_step(self._handle, state, data, len(data)))

    def ends(self, state: int) -> int:
        """0: more must follow; 1: the text may end; 2: it must."""
        return int(self._lib.lzn_grammar_ends(self._handle, state))

    def mask(self, state: int, table: TokenTable) -> npt.NDArray[np.bool_]:
        """Which tokens may follow, bool [n]. Raises TooMuchError."""
        allowed = np.zeros(len(table.offsets) - 1, np.uint8)
        arrays = (a.ctypes.data for a in (table.offsets, table.order, table.common))
        _checked(
            self._lib.lzn_grammar_mask(self._handle, state, table.data, *arrays, len(table.order), allowed.ctypes.data)
        )
        return allowed.view(np.bool_)


def _checked(state: int) -> int:
    if state == TOO_MUCH:
        raise TooMuchError
    return int(state)


@functools.cache
def _library() -> Any:
    lib = sparse_ffn.library()
    for name, result, arguments in (
        ("new", _P, (_P, _I32, _P, _I32, _P, _I32)),
        ("free", None, (_P,)),
        ("begin", _I32, (_P,)),
        ("step", _I32, (_P, _I32, ctypes.c_char_p, ctypes.c_int64)),
        ("ends", _I32, (_P, _I32)),
        ("mask", _I32, (_P, _I32, ctypes.c_char_p, _P, _P, _P, _I32, _P)),
    ):
        function = getattr(lib, f"lzn_grammar_{name}")
        function.restype, function.argtypes = result, arguments
    return lib
