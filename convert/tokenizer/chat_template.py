"""A checkpoint's chat template, and the special tokens that templates name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.config import Config, read_json_if_any
from convert.tokenizer.added_tokens import SpecialTokens
from runtime.errors import UserError
from runtime.text.vocabulary import SPECIAL_TOKENS

_FOLDER = "additional_chat_templates"


def chat_template(
    folder: Path, config: Config, special: SpecialTokens, usual: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The default template and its special tokens as GGUF keys, and notes about others.

    config: tokenizer_config.json; usual: special tokens that it need not name.
    """
    named = _templates(folder, config)
    template = named.pop("default", None)
    if not template:
        others = ", ".join(sorted(named))
        return {}, [f"none of the chat templates ({others}) is the default: the file has none"] if named else []
    values: dict[str, Any] = {**usual, **special.named}
    if special.others:
        values["additional_special_tokens"] = list(special.others)
    return {"tokenizer.chat_template": template, SPECIAL_TOKENS: json.dumps(values, ensure_ascii=False)}, []


def _templates(folder: Path, config: Config) -> dict[str, str]:
    """Templates by name, from the first place that has some: files of their own, tokenizer_config.json, a processor's
    file.
    """
    files = {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _text(path) for name, path in files.items()}
    found = config.values.get("chat_template") or read_json_if_any(folder / "chat_template.json").values.get(
        "chat_template"
    )
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    named = found if isinstance(found, dict) else {"default": found}
    return {str(name): text for name, text in named.items() if isinstance(text, str)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"`{path}`: byte {error.start} is no UTF-8, expected a chat template", "save it as UTF-8"
        ) from None
