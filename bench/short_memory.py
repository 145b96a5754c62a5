"""Contenders in less memory than they need: ours with a budget, llama.cpp with its file mapped and no more of it in
memory from one token to the next than the same budget leaves.

llama.cpp reads the same weights for every token, in the same order. What of them a system drops meanwhile is up to the
system; the least that any can drop is what does not fit, always the same part. That is what happens here: behind each
token, all but the file's end (as much as the budget leaves) is unmapped and dropped from the page cache. So this is the
best that llama.cpp could do in that memory, and needs neither privileges nor the memory of others.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.contenders import LLAMA_CPP, Contender, LlamaCpp, Ours, Spec
from bench.resident_memory import resident
from runtime.errors import UserError

TRIMMED = "trimmed"  # of llama.cpp's `Spec.pressure`: see above; otherwise whoever runs it sees to the memory
_MADV_DONTNEED = 4  # Linux
_PAGE = 4096
_BESIDE = 1 << 28  # bytes of llama.cpp's keys, values and buffers, about


def make(spec: Spec) -> Contender:
    """The contender that is described, which has a budget. Raises UserError on other systems than Linux."""
    if not Path("/proc/self/io").exists():
        raise UserError("memory can be made short on Linux only")
    return ShortLlamaCpp(spec) if spec.kind == LLAMA_CPP else Budgeted(spec)


def _read_so_far() -> int:
    """Bytes that this process has read from disks."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class Budgeted(Ours):
    """Our runtime with a budget of main memory. `facts` has what was read, too."""

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        super().start(ids)
        self._before, self._paged = _read_so_far(), self._model.stats().paged

    def facts(self) -> dict[str, Any]:
        """Shares of neurons per block since `start`, bytes from the disk, reads of rows and seconds waited for them."""
        now, before = self._model.stats().paged, self._paged
        assert now and before
        return {
            **super().facts(),
            "disk_bytes": _read_so_far() - self._before,
            "wanted_bytes": now.wanted - before.wanted,
            "paged_bytes": now.read - before.read,
            "reads": now.reads - before.reads,
            "waited_s": now.seconds - before.seconds,
            "resident_bytes": now.resident,
        }


class ShortLlamaCpp(LlamaCpp):
    """llama.cpp. Where all weights fit, they are repacked, and its file need not be in memory; elsewhere they are not:
    that would be a copy which no system can drop.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.repacks = Path(spec.path).stat().st_size + _BESIDE <= spec.ram_budget

    def open(self) -> None:
        """Load the model."""
        before = resident()["anonymous_bytes"]
        super().open()
        self._own, self._aside = resident()["anonymous_bytes"] - before, 0.0  # _own: keys, values, buffers

    def start(self, ids: Sequence[int]) -> None:
        """Forget the context and compute `ids` as a prompt."""
        super().start(ids)
        self._trim()
        self._before, self._aside = _read_so_far(), 0.0

    def step(self, token: int) -> None:
        """Compute one more token."""
        super().step(token)
        self._trim()

    def facts(self) -> dict[str, Any]:
        """Bytes from the disk since `start`, and the seconds of steps that were not computing."""
        return {"disk_bytes": _read_so_far() - self._before, "aside_s": self._aside}

    def _trim(self) -> None:
        """Drop what the budget has no room for."""
        if self._spec.pressure != TRIMMED or self.repacks:
            return
        began, path = time.perf_counter(), Path(self._spec.path)
        size = path.stat().st_size
        end = max(0, size - max(0, self._spec.ram_budget - self._own)) // _PAGE * _PAGE
        for address, offset, length in _mapped(path):
            dropped = min(length, end - offset)
            if dropped > 0 and _libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(dropped), _MADV_DONTNEED):
                raise UserError(f"`{path}`: its pages cannot be dropped: {os.strerror(ctypes.get_errno())}")
        if end:  # 0 would be all of it
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)
        self._aside += time.perf_counter() - began


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _mapped(path: Path) -> Iterator[tuple[int, int, int]]:
    """Where this process has a file mapped: address, offset in the file, and bytes."""
    name = str(path.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5] == name:
            first, end = (int(part, 16) for part in words[0].split("-"))
            yield first, int(words[2], 16), end - first
