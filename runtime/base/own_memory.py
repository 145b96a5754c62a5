"""Memory of this process's own for what it reads again and again: a mapped file lies in pages of 4 kB, memory of one's
own can lie in large ones, of which a processor has the addresses of far more at hand.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.base import worker
from runtime.base.closing import Closing
from runtime.errors import UserError

_LARGE = 1 << 21  # bytes of a large page
_AT_ONCE = 1 << 24  # bytes read before the load can be stopped


@dataclass(frozen=True)
class Reading:
    """Bytes offset .. offset + length - 1 of a file, and where they go in the memory."""

    file: Path
    offset: int
    length: int
    to: int

    def pieces(self) -> list[Reading]:
        """The same, in pieces that can be read at once."""
        steps = range(0, self.length, _AT_ONCE)
        return [Reading(self.file, self.offset + k, min(_AT_ONCE, self.length - k), self.to + k) for k in steps]


class OwnMemory(Closing):
    """`size` bytes at `address`, in large pages where Linux has them free. What nothing is written to takes none.

    Raises UserError where the system refuses so much.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        try:
            self._map = mmap.mmap(-1, size + _LARGE, **private)
        except (OSError, OverflowError) as error:
            raise UserError(f"not enough memory for {size} bytes of weights: {error}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _advise(self._map)
        whole = np.frombuffer(self._map, np.uint8)
        start = -int(whole.ctypes.data) % _LARGE
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] | None = whole[start : start + size]
        self.address = int(self._bytes.ctypes.data)

    def read(self, readings: Sequence[Reading], threads: int) -> None:
        """Fill parts of the memory from files. Raises UserError where a file ends too early, and Stopped."""
        pieces = [piece for reading in readings for piece in reading.pieces()]
        with ThreadPoolExecutor(max(1, threads), "reader") as pool:
            for _ in pool.map(self._read, pieces):
                pass
        worker.stop_if_unwanted()

    def _read(self, piece: Reading) -> None:
        if not worker.is_wanted() or self._bytes is None:
            return
        target, at = memoryview(self._bytes[piece.to : piece.to + piece.length].data), 0
        with piece.file.open("rb", buffering=0) as file:
            file.seek(piece.offset)
            while at < piece.length:
                n = file.readinto(target[at:])
                if not n:
                    raise UserError(
                        f"`{piece.file}`: ends at byte {piece.offset + at}, expected more of its weights there",
                        "it was changed while it was read: download or convert it again",
                    )
                at += n

    def close(self) -> None:
        """Give the memory back."""
        self._bytes = None
        self._map.close()


def _advise(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages: the memory is as good as any other
        return
