"""Which tokens end a text: all that config.json, generation_config.json or the tokenizer names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.config import Config, read_json_if_any
from convert.tokenizer.added_tokens import SpecialTokens
from runtime.errors import UserError
from runtime.text.vocabulary import END_IDS

_FILES = ("config.json", "generation_config.json")
_NAMED = {"eot_token": "eot_token_id", "eom_token": "eom_token_id"}  # beside eos: GGUF's own keys


def end_tokens(folder: Path, special: SpecialTokens, ids: Mapping[str, int], eos: int | None) -> dict[str, Any]:
    """GGUF keys of the tokens that end a text. ids: of every token's text; eos: the one that GGUF's eos_token_id says.

    Ids beyond the vocabulary are left out: no model chooses them. Raises UserError for an id that is no number.
    """
    named = {key: ids[special.named[name]] for name, key in _NAMED.items() if special.named.get(name) in ids}
    found = set() if eos is None else {eos}
    found |= set(named.values())
    for name in _FILES:
        config = read_json_if_any(folder / name)
        for part in (config, Config(f"{config.where}: text_config", _object(config.values.get("text_config")))):
            found |= {i for i in _listed(part) if 0 <= i < len(ids)}
    keys = {f"tokenizer.ggml.{key}": i for key, i in named.items()}
    return keys | ({END_IDS: sorted(found)} if found else {})


def first_id(folder: Path, name: str) -> int | None:
    """The (first) id that config.json or generation_config.json gives for `name`, such as bos_token_id."""
    for file in _FILES:
        value = read_json_if_any(folder / file).values.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            return value
    return None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _listed(config: Config) -> Iterator[int]:
    value = config.values.get("eos_token_id")
    for one in value if isinstance(value, list) else [value]:
        if one is None:
            continue
        if type(one) is not int:
            raise UserError(
                f"{config.where}: `eos_token_id` is {str(value)[:80]}, expected the id of a token, or a list of ids"
            )
        yield one
