"""How long work reports on itself: one kind of callback for all of it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float, float], None]  # what is being done, how much is done, and of how much


def silent(what: str, done: float, total: float) -> None:
    """A `Progress` that tells nobody."""
