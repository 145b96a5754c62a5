"""A tokenizer's added and named special tokens, from each of the places where Hugging Face keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.config import Config, read_json_if_any

_FIRST = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before the rest of a text is split.

    lstrip, rstrip: it takes the white space before or after it; single_word: not inside a word; normalized: looked for
    in the normalised text.
    """

    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> AddedToken:
        """One as the tokenizers library writes it; it is normalised by default where it is not special."""
        special = bool(entry.get("special"))
        flags = {name: bool(entry.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        return cls(entry["content"], special, **flags, normalized=bool(entry.get("normalized", not special)))

    def to_json(self, token_id: int) -> dict[str, Any]:
        """The token as the tokenizers library writes it."""
        return {"id": token_id, "content": self.text} | {k: v for k, v in self.__dict__.items() if k != "text"}


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that a tokenizer names: `named` such as bos_token -> text, the usual ones first, and further ones
    (`others`). flags: how they are matched, by text, where the files say.
    """

    named: dict[str, str]
    others: tuple[str, ...]
    flags: dict[str, AddedToken]


def read_added(folder: Path, config: Config, special: SpecialTokens) -> dict[int, AddedToken]:
    """Added tokens by id, those that are named being special; config: tokenizer_config.json, which is the most
    specific.

    Raises KeyError, TypeError or ValueError for malformed files.
    """
    named = {*special.named.values(), *special.others}
    found: dict[int, AddedToken] = {}
    for i, token in _added(folder, config):
        if found.get(i, token).text != token.text:
            raise ValueError(f"token {i} is {found[i].text!r} and {token.text!r}")
        found[i] = token
    return {i: replace(token, special=True) if token.text in named else token for i, token in found.items()}


def _added(folder: Path, config: Config) -> Iterator[tuple[int, AddedToken]]:
    for text, token_id in read_json_if_any(folder / "added_tokens.json").values.items():
        yield _id(token_id), AddedToken(text, special=False)
    for entry in read_json_if_any(folder / "tokenizer.json").get("added_tokens", list, []):
        yield _id(entry["id"]), AddedToken.from_json(entry)
    for key, entry in config.get("added_tokens_decoder", dict, {}).items():
        yield int(key), AddedToken.from_json(entry)


def _id(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"the id of an added token is {value!r}")
    return value


def read_special(folder: Path, config: Config) -> SpecialTokens:
    """The special tokens that tokenizer_config.json (`config`) or special_tokens_map.json name."""
    told = {name: value for name, value in config.values.items() if value is not None}
    values = {**read_json_if_any(folder / "special_tokens_map.json").values, **told}
    found = [(name, entry) for name, entry in values.items() if name.endswith("_token")]
    for key in _LISTS:
        entries = values.get(key) or ()
        # Of an object, the keys are names that templates may use as well.
        found += list(entries.items()) if isinstance(entries, dict) else [("", entry) for entry in entries]
    named: dict[str, str] = {}
    others: list[str] = []
    flags: dict[str, AddedToken] = {}
    for name, entry in found:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not isinstance(text, str) or not text:
            continue
        if isinstance(entry, dict):
            flags[text] = AddedToken.from_json({**entry, "special": True})
        if name:
            named[name] = text
        else:
            others.append(text)
    in_order = {name: named[name] for name in (*_FIRST, *named) if name in named}
    return SpecialTokens(in_order, tuple(others), flags)
