"""Known checkpoints, from `models.toml`: what their config.json leaves out, and short names of repositories."""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.base.home import expanded
from runtime.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FILE = "models.toml"
_CACHED = re.compile(r"models--(.+?)--(.+)")  # the Hub's cache: models--ORGANISATION--NAME/snapshots/REVISION


@dataclass(frozen=True)
class Known:
    """A row of the catalogue; the fields are explained at the top of `models.toml`."""

    repo: str
    family: str
    ffn: dict[str, Any]
    status: str
    aliases: tuple[str, ...] = ()
    sparsity: float | None = None
    sparsity_source: str = ""
    predictor: str = ""
    licence: str = ""
    note: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The short name: the repository's, without its organisation, in lower case."""
        return _name(self.repo)

    @property
    def ffn_type(self) -> str:
        """The activation as `--ffn-type` takes it."""
        threshold = self.ffn.get("threshold")
        return f"{self.ffn['activation']}:{threshold}" if threshold is not None else str(self.ffn["activation"])

    @property
    def ffn_kind(self) -> str:
        """The activation, and whether there is a gate, for people."""
        return self.ffn_type + (", gated" if self.ffn["gate"] == "gated" else "")


def _name(repo: str) -> str:
    return repo.rsplit("/", 1)[-1].lower()


def _path() -> Path:
    """In an installed package the file lies beside this module, in a checkout at the root."""
    beside = Path(__file__).parent / _FILE
    return beside if beside.exists() else Path(__file__).parent.parent / _FILE


@functools.cache
def catalogue() -> tuple[Known, ...]:
    """Every row, in the file's order."""
    rows = tomllib.loads(_path().read_text(encoding="utf-8"))["model"]
    return tuple(Known(**{**row, "aliases": tuple(row.get("aliases", ()))}) for row in rows)


def named(source: str) -> str:
    """What to fetch for `source`: itself, or the repository (or folder) that a short name stands for.

    Raises UserError for a name that is no folder, no Hub id and not in the catalogue, with those most like it.
    """
    if "/" in source or expanded(source).exists():
        return source
    for known in catalogue():
        if source.lower() in (known.name, *map(_name, known.aliases)):
            bundled = _path().parent / known.repo
            return str(bundled) if bundled.is_dir() else known.repo
    near = difflib.get_close_matches(source.lower(), [known.name for known in catalogue()], 3, 0.7)
    raise UserError(
        f"`{source}`: no such folder, expected a checkpoint folder or a Hub id such as user/repo, or a known "
        "model's name",
        (f"the nearest names are {', '.join(near)}; " if near else "") + "python -m convert --list shows all",
    )


def recognise(repo: str, folder: Path) -> Known | None:
    """The row of a checkpoint that was fetched from the Hub's `repo`, or ("") found in `folder`: then its name has to
    tell.
    """
    candidates = {candidate.lower() for candidate in ([repo] if repo else _names(folder))}
    for known in catalogue():
        spellings = {spelling.lower() for spelling in (known.repo, *known.aliases)}
        names = spellings if repo else spellings | {_name(spelling) for spelling in spellings}
        if candidates & names:
            return known
    return None


def _names(folder: Path) -> Iterator[str]:
    """What a local folder says of its origin: its own name, or the repository whose cache it lies in."""
    path = folder.resolve()
    yield path.name
    for parent in path.parents:
        if cached := _CACHED.fullmatch(parent.name):
            yield "/".join(cached.groups())
