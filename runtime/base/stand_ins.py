"""What stands where a file should be: the pointer of git-lfs that a clone has, or the web page that a download brought.

Knows no other format.
"""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError


def refuse_stand_in(path: Path) -> None:
    """Raise UserError where the file is something else instead of what its name says."""
    with path.open("rb") as file:
        found = file.read(64).lstrip().lower()
    if found.startswith(b"version https://git-lfs"):
        raise UserError(
            f"`{path}`: a pointer of git-lfs, not the file itself",
            "run `git lfs pull` in the clone, or give the repository's name on the Hub: it is fetched whole",
        )
    if found.startswith(b"<!doctype html"):
        raise UserError(
            f"`{path}`: a web page, not the file itself",
            "the download brought a page, perhaps of a log-in: fetch the file again, "
            "or give the repository's name on the Hub",
        )
