"""Finds a checkpoint: a local folder, or a repository on the Hugging Face Hub; chooses the needed files only.

Knows file names, not what is in the files; fetching is `runtime.hub_client`'s work.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError
from runtime.hub import Listing, parse

if TYPE_CHECKING:
    from runtime.hub_client import Choose

_SMALL = (
    "config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "README.md",
)
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")


def fetch(source: str) -> tuple[Path, str]:
    """The folder with the checkpoint `source`, and its Hub id ("" for a local folder).

    Raises UserError when there is neither such a folder nor such a repository, or it cannot be fetched.
    """
    return _fetch(source, _checkpoint_files, "a checkpoint folder")


def fetch_files(source: str, patterns: Sequence[str], expected: str) -> tuple[Path, str]:
    """A local folder, or the files of a Hub repository that match `patterns`; otherwise as `fetch`. expected: for the error."""

    def choose(listing: Listing) -> list[str]:
        names = _matching(listing, patterns)
        if not names:
            raise UserError(f"{listing}: no {' or '.join(patterns)} in it, expected {expected}", "check the name")
        return names

    return _fetch(source, choose, expected)


def _fetch(source: str, choose: Choose, expected: str) -> tuple[Path, str]:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, ""
    reference = None if folder.exists() else parse(source)
    if reference is None or reference.file:
        found = "a file" if folder.exists() else "no such folder"
        raise UserError(
            f"`{source}`: {found}, expected {expected} or a Hub id",
            "such as path/to/folder, user/repo or hf://user/repo@revision",
        )
    from runtime import hub_client  # noqa: PLC0415  (slow to import, and needless for local folders)

    return hub_client.fetch(reference, choose)[0], reference.repo


def _checkpoint_files(listing: Listing) -> list[str]:
    """Config, tokenizer, and the weights in one format: safetensors where there are some."""
    if "config.json" not in listing.files:
        ours = any(name.endswith(".gguf") for name in listing.files)
        hint = (
            f"it may be converted already: python -m runtime inspect {listing.reference}" if ours else "check the name"
        )
        raise UserError(f"{listing}: no config.json in it, expected a checkpoint", hint)
    weights = _matching(listing, _SAFETENSORS) or _matching(listing, _PICKLES)
    return _matching(listing, _SMALL) + weights


def _matching(listing: Listing, patterns: Sequence[str]) -> list[str]:
    return [name for name in listing.files if any(fnmatch(name, pattern) for pattern in patterns)]
