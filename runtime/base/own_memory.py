"""Memory of this process's own for what it reads again and again: a mapped file lies in pages of 4 kB, memory of one's
own can lie in large ones, of which a processor has the addresses of far more at hand.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
    """Bytes offset .. offset + length - 1 of a file, and where they go in the memory. row, stride: where it is rows of
    `row` bytes, `length` bytes of them together, from one to the next of which are `stride` in the file; else 0.
    """

    file: Path
    offset: int
    length: int
    to: int
    row: int = 0
    stride: int = 0

    def pieces(self) -> list[Reading]:
        """The same, in pieces that can be read at once."""
        step = max(1, _AT_ONCE // self.stride) * self.row if self.stride else _AT_ONCE
        return [
            replace(self, offset=self.offset + self.stored(k), length=min(step, self.length - k), to=self.to + k)
            for k in range(0, self.length, step)
        ]

    def stored(self, length: int) -> int:
        """Where in the file, from the beginning, what comes behind the first `length` bytes lies."""
        return length // self.row * self.stride if self.stride else length


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
        wanted = self._bytes[piece.to : piece.to + piece.length]
        if piece.stride:
            found = np.empty(piece.stored(piece.length), np.uint8)
            _fill(piece, found[: len(found) - piece.stride + piece.row])
            wanted.reshape(-1, piece.row)[:] = found.reshape(-1, piece.stride)[:, : piece.row]
        else:
            _fill(piece, wanted)

    def close(self) -> None:
        """Give the memory back."""
        self._bytes = None
        self._map.close()


def _fill(piece: Reading, wanted: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """Read what lies at the piece's offset."""
    target, at = memoryview(wanted.data), 0
    with piece.file.open("rb", buffering=0) as file:
        file.seek(piece.offset)
        while at < len(target):
            n = file.readinto(target[at:])
            if not n:
                raise UserError(
                    f"`{piece.file}`: ends at byte {piece.offset + at}, expected more of its weights there",
                    "it was changed while it was read: download or convert it again",
                )
            at += n


def _advise(memory: mmap.mmap) -> None:
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without large pages: the memory is as good as any other
        return
