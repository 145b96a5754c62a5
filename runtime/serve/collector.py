"""Python's collector of what refers to itself, in a process whose every pause is seen.

A full collection looks at each object while no other thread runs. What a server imports and loads is 65,000 objects:
16 ms on an idle machine, and over 100 ms with garbage among them and other programs on the same processors.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def sparing(make: Callable[[], T]) -> Callable[[], T]:
    """`make`, and then let collections leave alone all that there is: it stays until the process ends."""

    def made() -> T:
        found = make()
        gc.collect()
        gc.freeze()
        return found

    return made
