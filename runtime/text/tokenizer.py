"""Text to token ids and back, by libllama's own vocabulary code: the GGUF file is opened with `vocab_only`.

The file's keys are checked first, and texts rewritten where its vocabulary asks for what libllama does not do.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles, closed
from runtime.base.worker import on_worker
from runtime.bindings import llama
from runtime.bindings.byte_grammar import TokenTable
from runtime.bindings.logs import captured_log
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.text.text_rules import TextRules
from runtime.text.vocabulary import END_IDS, check_vocabulary

Ints = npt.NDArray[np.int32]
_Piece = ctypes.c_char * 64  # nearly every token fits into it
_INT32_MIN = -(1 << 31)
_HINT_CONVERT = "the file is damaged or incomplete: download it or convert the checkpoint again"


class Tokenizer(Closing):
    """The vocabulary of a GGUF file; owns one llama_model without weights.

    bos, eos: token ids, or None where the vocabulary has none. add_bos: whether texts start with `bos`.
    n_tokens: size of the vocabulary. metadata: the file's keys, where they are at hand.
    Raises UserError when the file holds no vocabulary that libllama can read.
    """

    def __init__(self, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        where = f"`{self.path}`"
        keys = _metadata(self.path) if metadata is None else metadata
        check_vocabulary(keys, where)
        self._rules = TextRules.from_metadata(keys, where)
        self._ends = frozenset(map(int, keys[END_IDS])) if END_IDS in keys else None
        self._vocab: llama.VocabP | None = on_worker(lambda: _load(self.path))
        self.n_tokens = llama.llama_vocab_n_tokens(self._vocab)
        self.bos = _id_or_none(llama.llama_vocab_bos(self._vocab))
        self.eos = _id_or_none(llama.llama_vocab_eos(self._vocab))
        self.add_bos = llama.llama_vocab_get_add_bos(self._vocab)
        self._check_ends_of_texts(where)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, any Unicode, NUL included (a lone surrogate becomes `?`).

        add_special: begin with BOS (and end with EOS) where the vocabulary says so.
        parse_special: `<s>` in the text is that token, not three characters.
        """
        if self._rules:
            text = self._rules.rewritten(text, parse_special)
        raw = text.encode("utf-8", "replace")
        # A token is at least one byte, but for BOS, EOS and the prefixed space; where that is wrong libllama says the
        # size.
        n = len(raw) + 4
        ids = np.empty(n, np.int32)
        found = self._tokenize(raw, ids, add_special, parse_special)
        if found < 0:
            ids = np.empty(-found, np.int32)
            found = self._tokenize(raw, ids, add_special, parse_special)
        found_ids: list[int] = ids[:found].tolist()
        return found_ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`, without the space that the vocabulary puts before a text; bytes that are no UTF-8: �.

        skip_special: leave out BOS, EOS and other control tokens instead of spelling them.
        """
        pieces = [(i, self.token_bytes(i, special=not skip_special)) for i in ids]
        first = next((k for k, (i, _) in enumerate(pieces) if i != self.bos), None)
        if first is not None and self._prefixes_space:
            pieces[first] = (pieces[first][0], pieces[first][1].removeprefix(b" "))
        return b"".join(piece for _, piece in pieces).decode("utf-8", "replace")

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes that `token` stands for, possibly a part of a character.

        special: spell control tokens (`</s>`) instead of returning nothing for them.
        """
        self._check(token)
        # A buffer for each call: several threads may ask at once.
        buffer = _Piece()
        n = self._piece(token, special, buffer)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = self._piece(token, special, buffer)
        return buffer.raw[:n]

    def token_text(self, token: int) -> str:
        """The token as the vocabulary spells it, e.g. `<s>` or `▁the`."""
        self._check(token)
        return llama.llama_vocab_get_text(self.handle, token).decode("utf-8", "replace")

    def special_tokens(self, named: Any = None) -> dict[str, Any]:
        """Texts of the special tokens by the names that Hugging Face gives them, such as bos_token.

        named: the same as a JSON object, as our files hold it: a template may ask whether one is there at all.
        Raises UserError for one that is damaged.
        """
        if named is None:
            ends = (("bos_token", self.bos), ("eos_token", self.eos))
            return {name: self.token_text(i) for name, i in ends if i is not None}
        try:
            return dict(json.loads(named))
        except (TypeError, ValueError, RecursionError):
            raise UserError(
                f"`{self.path}`: its special tokens are {str(named)[:80]!r}, expected a JSON object", _HINT_CONVERT
            ) from None

    def is_eog(self, token: int) -> bool:
        """Whether `token` ends a generation (EOS, end of turn): as the file says, or by libllama's names of such
        tokens.
        """
        self._check(token)
        by_name = llama.llama_vocab_is_eog(self.handle, token)
        return by_name if self._ends is None else token in self._ends

    @property
    def end_ids(self) -> list[int]:
        """All tokens that end a generation."""
        return [token for token in range(self.n_tokens) if self.is_eog(token)]

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The same, computed once."""
        return frozenset(self.end_ids)

    @functools.cached_property
    def table(self) -> TokenTable:
        """The bytes of all tokens, for grammars; control tokens have none. Made once, in a tenth of a second or so."""
        return TokenTable.of([self.token_bytes(token) for token in range(self.n_tokens)])

    def close(self) -> None:
        """Free libllama's vocabulary, when no other thread uses it any more; the tokenizer cannot be used
        afterwards.
        """
        self._vocab = None

    @property
    def handle(self) -> llama.VocabP:
        """libllama's vocabulary, for its other functions; it lives as long as this reference, or the tokenizer."""
        vocab = self._vocab
        if vocab is None:
            raise closed(f"`{self.path}`: the tokenizer")
        return vocab

    @functools.cached_property
    def _prefixes_space(self) -> bool:
        """Whether a text is tokenized as if it began with a space (SentencePiece's dummy prefix)."""
        probe = self.encode("a", add_special=False)
        return bool(probe) and self.token_bytes(probe[0]).startswith(b" ")

    def _check_ends_of_texts(self, where: str) -> None:
        # libllama asserts that there is a token to add, text by text.
        for adds, token, name in (
            (self.add_bos, self.bos, "bos"),
            (llama.llama_vocab_get_add_eos(self.handle), self.eos, "eos"),
        ):
            if adds and token is None:
                self.close()
                raise UserError(f"{where}: its vocabulary adds a {name} token to texts, and has none", _HINT_CONVERT)

    def _check(self, token: int) -> None:
        # libllama throws a C++ exception for an id outside the vocabulary, which would end the process.
        if not 0 <= token < self.n_tokens:
            raise UserError(f"token id {token}, expected 0 to {self.n_tokens - 1}")

    def _piece(self, token: int, special: bool, buffer: ctypes.Array[ctypes.c_char]) -> int:
        return llama.llama_token_to_piece(self.handle, token, buffer, len(buffer), 0, special)

    def _tokenize(self, raw: bytes, ids: Ints, add_special: bool, parse_special: bool) -> int:
        n = llama.llama_tokenize(self.handle, raw, len(raw), ids.ctypes.data, len(ids), add_special, parse_special)
        if n == _INT32_MIN:
            raise UserError(f"a text of {len(raw)} bytes has too many tokens to count", "split it")
        return n


def _id_or_none(token: int) -> int | None:
    return None if token < 0 else token


def _metadata(path: Path) -> Mapping[str, Any]:
    with GgufFile(path) as file:
        return file.metadata


def _load(path: Path) -> llama.VocabP:
    """The vocabulary of a file. It is freed with the last reference to it: a call in another thread holds one until it
    returns.

    Not for the main thread: libllama logs hundreds of lines, and Ctrl-C would be lost if it came within the callback
    that takes them.
    """
    with captured_log() as log:
        params = llama.llama_model_default_params()
        overrides = _llama_override()
        params.kv_overrides = overrides
        params.vocab_only = True
        model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise UserError(f"`{path}`: {_reason(log)}", _HINT_CONVERT)
    with Handles() as handles:
        handles.add(model, llama.llama_model_free)
        vocab = llama.llama_model_get_vocab(llama.ConstModelP(model.value))
        weakref.finalize(vocab, handles.pop_all().close).atexit = False  # then the process ends anyway
    return vocab


def _llama_override() -> ctypes.Array[llama.llama_model_kv_override]:
    # libllama refuses architectures that it does not know, though the vocabulary does not depend on them; and it treats
    # tokens of models with certain names in another way. An entry with an empty key ends the array.
    values = {b"general.architecture": b"llama", b"general.name": b""}
    overrides = (llama.llama_model_kv_override * (len(values) + 1))()
    for i, (key, value) in enumerate(values.items()):
        overrides[i] = llama.llama_model_kv_override(tag=llama.KV_OVERRIDE_TYPE_STR, key=key, val_str=value)
    return overrides


def _reason(log: list[str]) -> str:
    """The one line of libllama's log that says why a file was refused."""
    errors = [line for line in log if "error loading" in line] or log or ["refused by libllama without a reason"]
    line = errors[-1]
    return f"its vocabulary cannot be loaded ({line.rpartition('error loading model: ')[2]})"
