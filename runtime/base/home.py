"""The user's home folder, which a service or a container may not have: no HOME, and a user whom the system does not
know.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path | None:
    """The home folder, if there is one to be named; it may not exist."""
    if os.environ.get("HOME") == "":
        return None
    try:
        found = Path.home()
    except RuntimeError:
        return None
    return found if found.is_absolute() else None


def expanded(path: str | Path) -> Path:
    """`path` with a home folder for `~` or `~user` at its beginning; as it is where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
