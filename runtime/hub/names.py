"""Names of models on the Hugging Face Hub, and which files of a repository make one up. No talk with the Hub: see
`runtime.hub.download`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

from runtime.base.figures import size
from runtime.errors import UserError
from runtime.model_file import shards
from runtime.model_file.structure import ARCHITECTURE

_SCHEME = re.compile(r"hf:/+")  # pathlib makes one slash of two
_REPO = r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)"
_REVISION = r"(?:@(?P<revision>refs/pr/\d+|[^/:@]+))?"
_NAME = re.compile(_REPO + _REVISION + r"(?::(?P<file>.+))?")
_URL = re.compile(_REPO + _REVISION + r"(?:[:/](?P<file>.+))?")
_SITE = r"(?i:(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/|(?:ssh:/{1,2})?git@hf\.co[:/])"
_PAGE = re.compile(  # as a browser or git shows it
    _SITE + r"(?:api/models/)?(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+?)(?:\.git)?"
    r"(?:/(?:tree|blob|resolve|raw|commits?)/(?P<revision>refs/pr/\d+|[^/?#]+)(?:/(?P<file>[^?#]+?))?|/discussions.*)?/?(?:[?#].*)?"
)
_OTHER_PAGE = re.compile(_SITE + r"(?:datasets|spaces|collections|docs|papers|blog|buckets)/.*")
_TYPE = re.compile(r"(?<![a-z0-9])(i?q\d\w*|b?f16|f32)(?![a-z0-9])", re.IGNORECASE)
_LISTED = 20  # files per complaint
HUB_PAGE = "https://huggingface.co/"
FORMS = "user/repo, user/repo:q4_0, user/repo:file.gguf or hf://user/repo@revision/file.gguf"


@dataclass(frozen=True)
class Reference:
    """A repository on the Hub. revision: branch, tag or commit, None for the main branch; file: what is wanted of it,
    "" if not said.
    """

    repo: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True)
class RemoteFile:
    """A file in a repository. sha256: of a large (LFS) file, where the Hub says it; else ""."""

    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of one commit. architecture: of a GGUF file in it, "" if unknown.

    cached: why these are only the files in the cache, "" where they are all.
    """

    reference: Reference
    commit: str
    files: Mapping[str, RemoteFile]
    architecture: str = ""
    cached: str = ""

    def __str__(self) -> str:
        return f"`{self.reference}`" + (f" (its copy in the cache: {self.cached})" if self.cached else "")


def parse(source: str) -> Reference | None:
    """What `source` names on the Hub: None where it cannot be a name there, as `folder/model.gguf` cannot.

    Raises UserError for a malformed hf:// address, and for that of a page which shows no model.
    """
    if _OTHER_PAGE.fullmatch(source):
        raise UserError(
            f"`{source}`: no address of a model, expected {HUB_PAGE}USER/REPO", f"names on the Hub: {FORMS}"
        )
    if page := _PAGE.fullmatch(source):
        revision = unquote(page["revision"]) if page["revision"] else None
        return Reference(page["repo"], None if revision == "main" else revision, unquote(page["file"] or ""))
    scheme = _SCHEME.match(source)
    if scheme is None and source.endswith(".gguf") and ":" not in source:
        return None  # a mistyped path; a repository of such a name needs hf://
    found = _URL.fullmatch(source, scheme.end()) if scheme else _NAME.fullmatch(source)
    if found is None and scheme:
        raise UserError(f"`{source}`: expected hf://user/repo@revision/file", f"names on the Hub: {FORMS}")
    if found is None:
        return None
    revision = found["revision"]
    return Reference(found["repo"], unquote(revision) if revision else None, found["file"] or "")


def choose_model(listing: Listing) -> list[str]:
    """The GGUF file that is wanted, or all its shards in order. Raises UserError when it is none, several, or not
    ours.
    """
    models = _models(listing)
    # Of several models the Hub tells the architecture of one only.
    if len(models) == 1 and listing.architecture not in ("", ARCHITECTURE):
        raise UserError(
            f"{listing}: its GGUF file is for `{listing.architecture}`, expected `{ARCHITECTURE}`",
            "convert the original checkpoint: python -m convert REPO OUT.gguf",
        )
    wanted = listing.reference.file
    fitting = [name for name in models if _fits(name, models[name], wanted)] if wanted else list(models)
    if len(fitting) == 1:
        return _whole(listing, models[fitting[0]])
    listed = ", ".join(f"{name} ({_size(listing, models[name])})" for name in (fitting or list(models))[:_LISTED])
    if not fitting:
        raise UserError(f"{listing}: no GGUF file fits `{wanted}`; it has {listed}", _example(listing, models))
    which = f"that fit `{wanted}`" if wanted else "to choose from"
    raise UserError(f"{listing}: {len(fitting)} GGUF models {which}: {listed}", _example(listing, fitting))


def _models(listing: Listing) -> dict[str, list[str]]:
    """First file of each model -> all its files, in order."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in sorted(listing.files):
        path = PurePosixPath(name)
        stem, _, count = shards.parse_name(path.name) or (path.name, 0, 1)
        if path.suffix == ".gguf":
            sets.setdefault((str(path.with_name(stem)), count), []).append(name)
    if not sets:
        converted = any(name.endswith((".safetensors", ".bin")) for name in listing.files)
        hint = f"it is a checkpoint: python -m convert {listing.reference} OUT.gguf" if converted else "check the name"
        raise UserError(f"{listing}: no GGUF file in it", hint)
    return {names[0]: names for names in sets.values()}


def _fits(first: str, names: list[str], wanted: str) -> bool:
    """Whether a model is called so: a file name, with or without its folder, or a word of it such as q4_0."""
    if wanted.endswith(".gguf"):
        return any(wanted in (name, PurePosixPath(name).name) for name in names)
    return re.search(rf"(?<![a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9_])", first.lower()) is not None


def _whole(listing: Listing, names: list[str]) -> list[str]:
    found = shards.parse_name(PurePosixPath(names[0]).name)
    if found and len(names) != found[2]:
        raise UserError(
            f"{listing}: {len(names)} of the {found[2]} shards of `{names[0]}`",
            "the rest was never fetched" if listing.cached else "the upload was not finished",
        )
    return names


def _size(listing: Listing, names: list[str]) -> str:
    return size(sum(listing.files[name].size for name in names))


def _example(listing: Listing, firsts: Iterable[str]) -> str:
    """The shortest spelling that names the first of some models, and only that one."""
    models = _models(listing)
    first = next(iter(firsts))
    kind = _TYPE.search(first)
    word = kind[1].lower() if kind else ""
    alone = word and [name for name in models if _fits(name, models[name], word)] == [first]
    return f"choose one, for example {listing.reference}:{word if alone else first}"
