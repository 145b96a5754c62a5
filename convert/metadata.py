"""The `general.*` key-value pairs of a file: what it is, where it came from, under which licence.

Knows nothing of structures or tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, LlamaFileType

from runtime.structure import ARCHITECTURE

_HUB = "https://huggingface.co"
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
    base = repo or card.get("base_model", "")
    return {
        "general.architecture": ARCHITECTURE,
        "general.name": (repo or folder.resolve().name).split("/")[-1],
        "general.type": "model",
        **({"general.license": card["license"]} if "license" in card else {}),
        **({"general.source.url": f"{_HUB}/{repo}", "general.source.repo_url": f"{_HUB}/{repo}"} if repo else {}),
        **(_base_model(base) if "/" in base else {}),
        "general.quantization_version": GGML_QUANT_VERSION,
        "general.file_type": int(_FILE_TYPES[main_type]),
    }


def _base_model(repo: str) -> dict[str, Any]:
    organization, name = repo.split("/", 1)
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
        "general.base_model.0.organization": organization,
        "general.base_model.0.repo_url": f"{_HUB}/{repo}",
    }


def read_card(path: Path) -> dict[str, str]:
    """The one-line entries of a model card's front matter; lists and nested entries are left out."""
    if not path.is_file():
        return {}
    front = re.match(r"---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    pairs = re.findall(r"^(\w+):[ \t]*(\S.*?)[ \t]*$", front.group(1), re.MULTILINE) if front else []
    return {key: value.strip("'\"") for key, value in pairs if value[0] not in "[{|>"}
