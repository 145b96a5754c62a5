"""The `general.*` key-value pairs of a file: what it is, where it came from, under which licence.

Knows nothing of structures or tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, LlamaFileType
from yaml import YAMLError

from runtime.errors import UserError
from runtime.structure import ARCHITECTURE

HUB = "https://huggingface.co"
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
    card = read_card(folder / "README.md")
    base = repo or _first(card.get("base_model"))
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": (repo or folder.resolve().name).split("/")[-1],
        "general.type": "model",
        **_licence(card, repo),
        **({"general.languages": _texts(card["language"])} if _texts(card.get("language")) else {}),
        **({"general.source.url": f"{HUB}/{repo}", "general.source.repo_url": f"{HUB}/{repo}"} if repo else {}),
        **(_base_model(base) if "/" in base else {}),
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": int(_FILE_TYPES[main_type]),
    }


def _licence(card: dict[str, Any], repo: str) -> dict[str, str]:
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


def read_card(path: Path) -> dict[str, Any]:
    """The metadata of a model card, empty where there is none. Raises UserError when it is not YAML."""
    if not path.is_file():
        return {}
    from huggingface_hub import metadata_load  # noqa: PLC0415  (slow to import, and needed here only)

    try:
        return metadata_load(path) or {}
    except (ValueError, YAMLError) as error:
        raise UserError(f"`{path}`: its metadata is no YAML ({error})", "correct or remove the file") from None


def _texts(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]


def _first(value: Any) -> str:
    return (_texts(value) or [""])[0]
