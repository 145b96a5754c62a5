"""Token ids by a checkpoint's own library: what a written vocabulary is held against.

Each oracle encodes a text without BOS and EOS, added tokens in it as tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import tokenizers
from tokenizers import models

from convert.tokenizer.added_tokens import AddedToken
from convert.tokenizer.merges import Spaces
from convert.tokenizer.spm import CONTROL, UNKNOWN, SentencePiece
from runtime.errors import UserError

Added = Mapping[int, AddedToken]
_PLAIN = "[plain]"


class Oracle(Protocol):
    """Gives the ids of texts."""

    def encode(self, text: str) -> list[int]: ...  # noqa: D102


class TokenizersOracle:
    """A tokenizer.json, with added tokens that other files name."""

    def __init__(self, values: Mapping[str, Any], added: Added, vocab_size: int, where: str) -> None:
        """values: of the file; added: every added token by id, in place of the file's own of the same id; vocab_size:
        ids from there on do not exist.
        """
        own = {entry["id"]: entry for entry in values.get("added_tokens") or () if entry["id"] < vocab_size}
        entries = own | {i: token.to_json(i) for i, token in added.items()}
        vocab = dict(values["model"]["vocab"])
        taken = set(vocab.values())
        for i, entry in entries.items():
            if i not in taken:
                vocab.setdefault(entry["content"], i)  # or the library would number it itself
        changed = {
            **values,
            "model": {**values["model"], "vocab": vocab},
            "added_tokens": [entries[i] for i in sorted(entries)],
            "truncation": None,
            "padding": None,
        }
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(changed))
        except Exception as error:  # the library raises nothing more special
            raise UserError(
                f"{where}: the tokenizers library cannot read it ({str(error)[:200]})",
                "fetch the tokenizer's files again from where the checkpoint came from",
            ) from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def whole(self, text: str) -> list[int]:
        """The ids with what the file's post-processor adds."""
        return list(self._tokenizer.encode(text).ids)


class SentencePieceOracle:
    """A tokenizer.model, between the tokens that Hugging Face cuts out first."""

    def __init__(self, model: SentencePiece, spaces: Spaces, added: Added) -> None:
        """spaces: as in transformers' tokenizers of such models, where a space is also put after added tokens unless
        `legacy` is false.
        """
        self._model, self._spaces = model, spaces
        # The model finds its own user-defined pieces, unless other files list them as well.
        cut = {
            i: AddedToken(piece.text, special=True)
            for i, piece in enumerate(model.pieces)
            if piece.kind in (CONTROL, UNKNOWN)
        } | dict(added)
        self._cutter = tokenizers.Tokenizer(models.WordLevel({_PLAIN: 0}, unk_token=_PLAIN))
        for token in cut.values():
            flags = {name: value for name, value in token.__dict__.items() if name != "text"}
            self._cutter.add_tokens([tokenizers.AddedToken(token.text, **flags)])
        self._ids = {self._cutter.token_to_id(token.text): i for i, token in cut.items()}

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = []
        found = self._cutter.encode(text)
        for i, (token, (start, end)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            if token:
                ids.append(self._ids[token])
            elif start < end:
                ids += self._model.encode(text[start:end], self._spaces.prefix and (i == 0 or self._spaces.each))
        return ids
