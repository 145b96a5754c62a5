"""What every owner of native handles, files or threads has: `close`, and a `with` statement that calls it.

An owner keeps what it holds in one `Handles`, which frees it in the opposite order.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from runtime.errors import UserError

_Owner = TypeVar("_Owner", bound="Closing")
_Handle = TypeVar("_Handle")


class Closing:
    """Base class of owners. Each says in its `close` what goes; calling it again does no harm."""

    def close(self) -> None:
        """Free what is owned."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Handles(ExitStack):
    """What one owner holds. Whatever goes wrong while it is collected, all of it is freed:

    with Handles() as handles:
        self.buffer = handles.add(allocate(size), free)
        ...
        self._handles = handles.pop_all()  # nothing went wrong: `close` frees it
    """

    def add(self, handle: _Handle, free: Callable[[_Handle], Any]) -> _Handle:
        """Keep a handle until `free(handle)`, unless it is null; returns it."""
        if handle:
            self.callback(free, handle)
        return handle


def closed(what: str) -> UserError:
    """The error of using something that is closed already."""
    return UserError(f"{what} is closed", "use it inside its `with` statement, before `close`")
