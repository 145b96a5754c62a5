"""What every owner of a native handle, a file or a process has: `close`, and a `with` statement that calls it."""

from __future__ import annotations

from typing import TypeVar

_Owner = TypeVar("_Owner", bound="Closing")


class Closing:
    """Base class of owners. Each says in its `close` what goes."""

    def close(self) -> None:
        """Free what is owned."""
        raise NotImplementedError

    def __enter__(self: _Owner) -> _Owner:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
