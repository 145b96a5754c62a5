"""Measured figures that are remembered between runs: a file of $LAZYNEURON_CACHE (default ~/.cache/lazyneuron)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

from runtime.base.atomic import replacing
from runtime.base.cache_folder import cache_folder
from runtime.errors import UserError

_VERSION = 1  # of the files

Figures = list[float]


def remembered(name: str, key: str, n: int, measure: Callable[[], Figures], anew: bool = False) -> Figures:
    """The `n` figures that file `name` has of `key`; measured where it has none, or `anew`, and then remembered."""
    folder = cache_folder()
    path = folder and folder / name
    known: dict[str, Figures] = {}
    # A damaged file, or one of another version, is only a reason to measure again.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(path.read_text(encoding="utf-8")) if path else {}
        if stored["version"] == _VERSION:
            known = {str(of): [float(figure) for figure in figures] for of, figures in stored["speeds"].items()}
    if not anew and len(known.get(key, ())) == n:
        return known[key]
    known[key] = measure()
    # Where the folder cannot be written, it is measured each time.
    with contextlib.suppress(OSError, UserError):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as made:
                made.write_text(json.dumps({"version": _VERSION, "speeds": known}, indent=1), encoding="utf-8")
    return known[key]
