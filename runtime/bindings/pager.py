"""The native pager: a window of memory as large as some files, of which those pages are there that were asked for.

The layouts of `Fetch` and `PagerStats` are those of runtime/native/lazyneuron.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.base.closing import Closing
from runtime.bindings import sparse_ffn
from runtime.errors import UserError

PAGE = 4096  # bytes, lzn::PAGE
ALL, CANDIDATES, FIRED, WHOLE = range(4)  # enum lzn_fetched
_MOST_MATRICES = 3
_SHORTER, _CHANGED, _FULL = -1, -2, -3  # what `lzn_pager_error` gives beside numbers of the system


class PagerStats(ctypes.Structure):
    """`struct lzn_pager_stats`: what was done since the last `load`, in pages. nanoseconds: waited for the disk."""

    wanted: int
    read: int
    reads: int
    dropped: int
    resident: int
    nanoseconds: int

    _fields_ = [(name, ctypes.c_int64) for name in ("wanted", "read", "reads", "dropped", "resident", "nanoseconds")]


class Fetch(ctypes.Structure):
    """`struct lzn_fetch`: what is to be there before the next operator."""

    ffn_kept: sparse_ffn.Ffn | None  # what `ffn` points to

    _fields_ = [
        ("pager", ctypes.c_void_p),
        ("ffn", ctypes.c_void_p),
        ("what", ctypes.c_int32),
        ("n_matrices", ctypes.c_int32),
        ("first", ctypes.c_void_p * _MOST_MATRICES),
        ("size", ctypes.c_size_t * _MOST_MATRICES),
        ("stride", ctypes.c_size_t * _MOST_MATRICES),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    lib = sparse_ffn.library()
    for name, kind in (("fetch", Fetch), ("pager_stats", PagerStats)):
        size = getattr(lib, f"lzn_sizeof_{name}")
        size.restype = ctypes.c_size_t
        assert size() == ctypes.sizeof(kind), name
    lib.lzn_pager_new.restype = lib.lzn_pager_address.restype = ctypes.c_void_p
    lib.lzn_pager_new.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
    lib.lzn_pager_free.argtypes = lib.lzn_pager_error.argtypes = [ctypes.c_void_p]
    lib.lzn_pager_address.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.lzn_pager_limit.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    lib.lzn_pager_load.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    lib.lzn_pager_stats_of.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return lib


class Pager(Closing):
    """Pages of files, read when they are asked for, by up to `readers` threads at once. To be used by one thread.

    Raises UserError where a file cannot be read, or the system has no pager (all but Linux).
    """

    def __init__(self, paths: Sequence[Path], readers: int) -> None:
        self.paths = tuple(paths)
        names = (ctypes.c_char_p * len(paths))(*(os.fsencode(path) for path in paths))
        error = ctypes.c_int32(0)
        self.handle: int | None = _library().lzn_pager_new(names, len(paths), readers, ctypes.byref(error))
        if not self.handle:
            if error.value == errno.ENOSYS:
                raise UserError("--ram-budget needs Linux: elsewhere weights stay in the mapped file", "leave it out")
            raise UserError(f"`{paths[0]}`: cannot be read in pages: {_reason(error.value)}")

    def address(self, file: int) -> int:
        """Where the first byte of a file lies, were it there."""
        return int(_library().lzn_pager_address(self.handle, file))

    def limit(self, n_bytes: int) -> None:
        """Let so many bytes be there, rounded down to pages: when something is read next, others are dropped."""
        _library().lzn_pager_limit(self.handle, n_bytes // PAGE)

    def load(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Read ranges of the window now (address, bytes). `check` says whether it worked."""
        table = np.array(ranges, np.int64).reshape(-1, 2)
        _library().lzn_pager_load(self.handle, table.ctypes.data, len(table))

    def check(self) -> None:
        """Raise UserError where anything went wrong since the last call: what was computed since is worth nothing."""
        code = int(_library().lzn_pager_error(self.handle))
        if not code:
            return
        what = ", ".join(f"`{path}`" for path in self.paths[:1])
        if code == _FULL:
            raise UserError(f"{what}: more rows are wanted at once than the memory budget holds", "raise --ram-budget")
        if code in (_SHORTER, _CHANGED):
            how = "became shorter" if code == _SHORTER else "was changed"
            raise UserError(f"{what}: {how} while it was read", "leave files alone while models run from them")
        raise UserError(f"{what}: reading rows failed: {_reason(code)}", "is the disk still there?")

    def stats(self) -> PagerStats:
        """What was done so far."""
        found = PagerStats()
        _library().lzn_pager_stats_of(self.handle, ctypes.byref(found))
        return found

    def close(self) -> None:
        """End the threads and give the memory back."""
        if self.handle:
            _library().lzn_pager_free(self.handle)
            self.handle = None


def fetch(pager: Pager, what: int, matrices: Sequence[tuple[int, int, int]], ffn: sparse_ffn.Ffn | None) -> Fetch:
    """What an operator `fetch_rows` asks for: of each matrix its address, the bytes of a row (WHOLE: of all), and those
    from one row to the next.
    """
    made = Fetch(pager=pager.handle, what=what, n_matrices=len(matrices))
    for k, (first, size, stride) in enumerate(matrices):
        made.first[k], made.size[k], made.stride[k] = first, size, stride
    made.ffn_kept = ffn
    made.ffn = sparse_ffn.address_of(ffn) if ffn is not None else None
    return made


def address_of(made: Fetch) -> int:
    """Where it lies; valid while `made` lives."""
    return ctypes.addressof(made)


def _reason(code: int) -> str:
    return os.strerror(code) if code > 0 else "the file is damaged"
