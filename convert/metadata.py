"""The `general.*` key-value pairs of a file: what it is, where it came from, under which licence."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml
from gguf import GGML_QUANT_VERSION, LlamaFileType
from yaml import YAMLError

from runtime.errors import UserError
from runtime.hub.names import parse
from runtime.model_file.structure import ARCHITECTURE

Card = dict[str, list[str]]
HUB = "https://huggingface.co"
_CARD = 1 << 17  # bytes of a README.md in which its metadata must end
_FIELDS = ("license", "license_name", "license_link", "language", "base_model")
_NOTHING = ("", "~", "null", "Null", "NULL")  # how YAML writes that there is none
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}


def general_metadata(folder: Path, repo: str, main_type: str) -> dict[str, Any]:
    """The `general.*` pairs of a checkpoint in `folder`, fetched from the Hub's `repo` ("" for a local one)."""
    card, _ = read_card(folder / "README.md")
    base = repo or _repository(_first(card.get("base_model")))
    languages = card.get("language", [])
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": (repo or folder.resolve().name).split("/")[-1],
        "general.type": "model",
        **_licence(card, repo),
        **({"general.languages": languages} if languages else {}),
        **({"general.source.url": f"{HUB}/{repo}", "general.source.repo_url": f"{HUB}/{repo}"} if repo else {}),
        **(_base_model(base) if base else {}),
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": int(_FILE_TYPES[main_type]),
    }


def _licence(card: Card, repo: str) -> dict[str, str]:
    """Licence, and name and address of one that the Hub has no word for."""
    link = _first(card.get("license_link"))
    if link and repo and "://" not in link:
        link = f"{HUB}/{repo}/blob/main/{link}"
    found = {"": _first(card.get("license")), ".name": _first(card.get("license_name")), ".link": link}
    return {f"general.license{key}": value for key, value in found.items() if value}


def _base_model(repo: str) -> dict[str, Any]:
    organization, name = repo.split("/", 1)
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
        "general.base_model.0.organization": organization,
        "general.base_model.0.repo_url": f"{HUB}/{repo}",
    }


def _repository(text: str) -> str:
    """A repository's name on the Hub, "" for anything else, such as a path."""
    try:
        reference = parse(text)
    except UserError:  # such as an address of something else
        return ""
    return reference.repo if reference else ""


def read_card(path: Path) -> tuple[Card, tuple[str, ...]]:
    """The texts in a model card's metadata, by field, and notes where it is damaged: that is no reason to convert
    nothing.

    Every word is taken as it is written: `no` is a language, and no truth value.
    """
    if not path.is_file():
        return {}, ()
    with path.open("rb") as file:
        beginning = file.read(_CARD + 1)
    whole = len(beginning) <= _CARD
    try:
        text = _front_matter(codecs.getincrementaldecoder("utf-8-sig")().decode(beginning, final=whole))
        fields = yaml.load(text, Loader=yaml.BaseLoader) or {}
    except UnicodeDecodeError as error:
        return {}, (_left_out(path, f"byte {error.start} is not UTF-8"),)
    except ValueError as error:
        return {}, (_left_out(path, str(error)),)
    except (YAMLError, RecursionError) as error:
        return {}, (_left_out(path, f"no YAML: {' '.join(str(error).split())[:120]}"),)
    if not isinstance(fields, dict):
        return {}, (_left_out(path, f"a {type(fields).__name__}, expected fields"),)
    return _fields(path, fields)


def _front_matter(text: str) -> str:
    """What stands between the first line, if that is `---`, and the next such line."""
    lines = re.split(r"\r\n|\r|\n", text.lstrip())
    if not lines or lines[0].rstrip() != "---":
        return ""
    for i, line in enumerate(lines[1:], 1):
        if line.rstrip() == "---":
            return "\n".join(lines[1:i])
    raise ValueError(f"it does not end with a line `---` within {_CARD} bytes")


def _fields(path: Path, fields: dict[Any, Any]) -> tuple[Card, tuple[str, ...]]:
    """Of the fields that go into a file their texts, each a list; of others nothing. Notes for those that are none."""
    card: Card = {}
    notes: tuple[str, ...] = ()
    for name in _FIELDS:
        value = fields.get(name, "")
        values = value if isinstance(value, list) else [value]
        texts = [one for one in values if isinstance(one, str) and one.isprintable()]
        if len(texts) < len(values):
            notes += (f"`{path}`: `{name}` is not a text or a list of texts, left out",)
        elif given := [text for text in texts if text not in _NOTHING]:
            card[name] = given
    return card, notes


def _left_out(path: Path, why: str) -> str:
    return f"`{path}`: its metadata is damaged ({why}), so the file says nothing of licence and languages"


def _first(values: list[str] | None) -> str:
    return values[0] if values else ""
