"""The prompts of requests that are no chats: texts, token ids, and both in one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.base.arguments import shown, token_ids
from runtime.model import Model
from runtime.serve.errors import wrong

_MOST = 128  # prompts of a request


@dataclass(frozen=True)
class Prompt:
    """A prompt as ids, and as the text that `echo` repeats."""

    ids: tuple[int, ...]
    text: str


def prompts_of(value: Any, model: Model) -> list[Prompt]:
    """The prompts that a request's `prompt` holds: one, or a list of them. Each is a text, a list of ids and texts, or
    an object with `prompt_string`; a list with a number in it is one prompt. Raises ApiError or UserError.
    """
    if is_one(value):
        return [_prompt(value, "prompt", model)]
    if not isinstance(value, list) or not value:
        raise wrong("prompt", f"{shown(value)}, expected a text, token ids, or a list of either")
    if len(value) > _MOST:
        raise wrong("prompt", f"{len(value)} prompts, expected at most {_MOST}")
    return [_prompt(one, f"prompt[{i}]", model) for i, one in enumerate(value)]


def is_one(value: Any) -> bool:
    """Whether this is one prompt, not a list of prompts."""
    if isinstance(value, list):
        return any(isinstance(one, int | float) for one in value)
    return isinstance(value, str) or _keyed(value) is not None


def _keyed(value: Any) -> str | None:
    """The text of an object, as llama.cpp's server takes them."""
    text = value.get("prompt_string") if isinstance(value, dict) and not value.get("multimodal_data") else None
    return text if isinstance(text, str) else None


def _prompt(value: Any, where: str, model: Model) -> Prompt:
    value = value if (text := _keyed(value)) is None else text
    if isinstance(value, str):
        prompt = Prompt(tuple(model.tokenize(value)), value)
    elif isinstance(value, list):
        ids = _mixed(value, where, model)
        prompt = Prompt(ids, model.detokenize(ids))
    else:
        raise wrong(where, f"{shown(value)}, expected a text or a list of token ids")
    if not prompt.ids:
        raise wrong(where, "has no tokens, expected at least one")
    return prompt


def _mixed(parts: list[Any], where: str, model: Model) -> tuple[int, ...]:
    """Ids, and texts between them: only one that begins the prompt gets a start token."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            ids += model.tokenize(part, add_special=i == 0)
        elif isinstance(part, int) and not isinstance(part, bool):
            ids.append(part)
        else:
            raise wrong(where, f"{shown(part)} at {i}, expected token ids and texts")
    return tuple(token_ids(where, ids, model.structure.vocab_size))
