"""Where lazyneuron keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$LAZYNEURON_CACHE, or ~/.cache/lazyneuron; it may not exist yet."""
    return Path(os.environ.get("LAZYNEURON_CACHE") or Path.home() / ".cache/lazyneuron")
