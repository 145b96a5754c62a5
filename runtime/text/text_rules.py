"""What a vocabulary asks for and libllama does not do: where a space goes before a text, white space around added
tokens, composed characters.

A text is rewritten so that libllama's tokens for it are those of the vocabulary's own library.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError

KEYS = "lazyneuron.tokenizer"
PREFIXES = ("first", "added")
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # GGUF's types of tokens that are matched before a text is split
# Unicode's White_Space, which the `tokenizers` library strips. Python's own strip takes four control characters more.
_SPACE = "".join(map(chr, (*range(9, 14), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029)))
_SPACE += "\u202f\u205f\u3000"


@dataclass(frozen=True)
class TextRules:
    """How texts are rewritten before libllama sees them.

    special, user_defined: texts of the tokens that are matched as a whole; special ones only where they are parsed.
    SentencePiece's own user-defined pieces are none of them: they are found in a text, and spaces are put as if they
    were any text.
    prefix: "" for no space, "first" for one before a text that does not begin with such a token, "added" for one after
    each of these tokens too. once: not before a space (or SentencePiece's sign for it).
    lstrip, rstrip: tokens that take the white space before or after them. nfc: whether characters are composed (NFC).
    """

    special: frozenset[str] = frozenset()
    user_defined: frozenset[str] = frozenset()
    prefix: str = ""
    once: bool = False
    lstrip: frozenset[str] = frozenset()
    rstrip: frozenset[str] = frozenset()
    nfc: bool = False

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> TextRules | None:
        """The rules of a file with these keys, None where libllama needs no help. Raises UserError for values that mean
        nothing.
        """
        names = (
            "space_prefix",
            "space_prefix_once",
            "piece_token_ids",
            "lstrip_token_ids",
            "rstrip_token_ids",
            "normalizer",
        )
        prefix, once, pieces, lstrip, rstrip, normalizer = (metadata.get(f"{KEYS}.{name}") for name in names)
        if not any(value is not None for value in (prefix, lstrip, rstrip, normalizer)):
            return None
        if prefix not in (None, *PREFIXES) or normalizer not in (None, "nfc"):
            raise UserError(
                f"{where}: `{KEYS}` has space_prefix `{prefix}` and normalizer `{normalizer}`, "
                f"expected one of {', '.join(PREFIXES)}, and nfc",
                "the file was written by another version: convert the checkpoint again",
            )
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]

        def named(ids: Iterable[int] | None) -> frozenset[str]:
            return frozenset(tokens[i] for i in (() if ids is None else ids) if 0 <= i < len(tokens))

        def typed(*kinds: int) -> frozenset[str]:
            return frozenset(text for text, kind in zip(tokens, types, strict=True) if kind in kinds)

        return cls(
            typed(_UNKNOWN, _CONTROL),
            typed(_USER_DEFINED) - named(pieces),
            prefix or "",
            bool(once),
            named(lstrip),
            named(rstrip),
            normalizer == "nfc",
        )

    def __post_init__(self) -> None:
        both = _any_of(self.special | self.user_defined)
        object.__setattr__(self, "_patterns", {True: both, False: _any_of(self.user_defined)})

    def rewritten(self, text: str, parse_special: bool) -> str:
        """The text for libllama."""
        pattern: re.Pattern[str] = self._patterns[parse_special]  # type: ignore[attr-defined]
        parts = pattern.split(text)  # plain, token, plain, token, ..., plain
        for i in range(0, len(parts), 2):
            before = parts[i - 1] if i else None
            after = parts[i + 1] if i + 1 < len(parts) else None
            parts[i] = self._plain(parts[i], before, after)
        return "".join(parts)

    def _plain(self, text: str, before: str | None, after: str | None) -> str:
        if before in self.rstrip:
            text = text.lstrip(_SPACE)
        if after in self.lstrip:
            text = text.rstrip(_SPACE)
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        spaced = self.once and text.startswith((" ", "\u2581"))
        return " " + text if text and not spaced and self._has_prefix(before) else text

    def _has_prefix(self, before: str | None) -> bool:
        return self.prefix == "added" or (self.prefix == "first" and before is None)


def _any_of(texts: frozenset[str]) -> re.Pattern[str]:
    """Matches the longest of some texts, as a group; nothing where there are none."""
    longest_first = sorted(texts - {""}, key=lambda text: (-len(text), text))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else "((?!))")
