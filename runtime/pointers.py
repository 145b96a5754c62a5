"""Pointers of git-lfs: small texts that stand in a clone where a large file was never fetched.

Knows no other format.
"""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError

_BEGINNING = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise UserError where the file is a pointer of git-lfs instead of what its name says."""
    with path.open("rb") as file:
        found = file.read(len(_BEGINNING))
    if found == _BEGINNING:
        raise UserError(
            f"`{path}`: a pointer of git-lfs, not the file itself",
            "run `git lfs pull` in the clone, or give the repository's name on the Hub: it is fetched whole",
        )
