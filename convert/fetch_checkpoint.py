"""Finds a checkpoint: a local folder, or a repository on the Hugging Face Hub; chooses the needed files only.

Knows file names, not what is in the files; fetching is `runtime.hub.download`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from convert.checkpoint import FORMATS, refuse_adapter, weight_files
from runtime.base.home import expanded
from runtime.base.stand_ins import refuse_stand_in
from runtime.errors import UserError
from runtime.hub.names import Listing, parse

if TYPE_CHECKING:
    from runtime.hub.download import Choose, More

_CARD = "README.md"
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    _CARD,
)
_INDEXES = tuple(f"{weights.file_name}.index.json" for weights in FORMATS)


def fetch(source: str, check: Callable[[Path, str], object] = lambda *_: None) -> tuple[Path, str]:
    """The folder with the checkpoint `source`, and its Hub id ("" for a local folder).

    check: called with these two before weights are fetched: what it raises saves their transfer.
    Raises UserError when there is neither such a folder nor such a repository, or it cannot be fetched.
    """

    def weights(listing: Listing, folder: Path) -> list[str]:
        check(folder, listing.reference.repo)
        top = [name for name in listing.files if "/" not in name]
        return weight_files(str(listing), folder, top, listing.files.__contains__)[1]

    folder, repo = _fetch(source, _small_files, "a checkpoint folder", weights)
    if not repo:
        for path in (folder / name for name in _SMALL if name != _CARD):
            if path.is_file():
                refuse_stand_in(path)
        check(folder, repo)
    return folder, repo


def fetch_files(source: str, patterns: Sequence[str], expected: str) -> tuple[Path, str]:
    """A local folder, or the files of a Hub repository that match `patterns`; otherwise as `fetch`.

    expected: for the error.
    """

    def choose(listing: Listing) -> list[str]:
        names = _matching(listing, patterns)
        if not names:
            raise UserError(f"{listing}: no {' or '.join(patterns)} in it, expected {expected}", "check the name")
        return names

    return _fetch(source, choose, expected)


def _fetch(source: str, choose: Choose, expected: str, more: More | None = None) -> tuple[Path, str]:
    folder = expanded(source)
    if folder.is_dir():
        return folder, ""
    reference = None if folder.exists() else parse(source)
    if reference is None or reference.file:
        found = "a file" if folder.exists() else "no such folder"
        example = (
            f"{reference} for the repository" if reference else "path/to/folder, user/repo or hf://user/repo@revision"
        )
        raise UserError(f"`{source}`: {found}, expected {expected} or a Hub id", f"such as {example}")
    from runtime.hub import download  # noqa: PLC0415  (slow to import, and needless for local folders)

    return download.fetch(reference, choose, more)[0], reference.repo


def _small_files(listing: Listing) -> list[str]:
    """Config, tokenizer, and the indexes that say which files have the weights."""
    refuse_adapter(str(listing), listing.files)
    if "config.json" not in listing.files:
        ours = any(name.endswith(".gguf") for name in listing.files)
        hint = (
            f"it may be converted already: python -m runtime inspect {listing.reference}" if ours else "check the name"
        )
        raise UserError(f"{listing}: no config.json in it, expected a checkpoint", hint)
    return _matching(listing, (*_SMALL, *_INDEXES))


def _matching(listing: Listing, patterns: Sequence[str]) -> list[str]:
    return [name for name in listing.files if any(fnmatch(name, pattern) for pattern in patterns)]
