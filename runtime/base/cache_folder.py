"""Where lazyneuron keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.base.home import home


def cache_folder() -> Path | None:
    """$LAZYNEURON_CACHE, or ~/.cache/lazyneuron, which may not exist yet; None where there is no home folder."""
    named, at_home = os.environ.get("LAZYNEURON_CACHE"), home()
    return Path(named) if named else at_home and at_home / ".cache/lazyneuron"
