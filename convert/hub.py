"""Finds a checkpoint: a local folder, or a repository on the Hugging Face Hub; fetches the needed files only.

Knows file names, not what is in the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils.tqdm import disable_progress_bars

from runtime.errors import UserError

# The HTTP library's own base class; which library that is depends on huggingface_hub's version.
_TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL = [
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
]
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


def fetch(source: str) -> tuple[Path, str]:
    """The folder with the checkpoint `source`, and its Hub id ("" for a local folder).

    Raises UserError when there is neither such a folder nor such a repository, or the Hub cannot be reached.
    """
    folder, repo = fetch_files(source, _SMALL + _SAFETENSORS, "a checkpoint folder")
    if repo and not any(folder.glob("*.safetensors")):
        folder, _ = fetch_files(source, _SMALL + _PICKLES, "a checkpoint folder")
    return folder, repo


def fetch_files(source: str, patterns: list[str], expected: str) -> tuple[Path, str]:
    """A local folder, or the files of a Hub repository that match `patterns`; otherwise as `fetch`. expected: for the error."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, ""
    if folder.exists() or not _REPO.fullmatch(source):
        found = "a file" if folder.exists() else "no such folder"
        raise UserError(f"`{source}`: {found}, expected {expected} or a Hub id such as user/repo")
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _hub_errors(source):
        return Path(snapshot_download(source, allow_patterns=patterns)), source


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"`{repo}`: access to it must be granted first",
            f"ask for it on https://huggingface.co/{repo}, then `hf auth login`",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"`{repo}`: no such folder, and no such repository on the Hub (or a private one)",
            "check the spelling; for a private one, `hf auth login` first",
        ) from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"`{repo}`: the Hub answered {error.response.status_code}", "try again later") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, _TRANSPORT):
        raise UserError(
            f"`{repo}`: not a local folder, and the Hub cannot be reached", "check the network, or give a folder"
        ) from None
