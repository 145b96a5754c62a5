"""Rows of FFNs that are read from the file when tokens ask for them, so that a model may be larger than memory.

The rows have addresses in a window as large as the file, of which so many pages are in memory as a budget leaves; what
computes with them is the same as without. See docs/disk.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.base import worker
from runtime.base.closing import Closing
from runtime.base.figures import memory
from runtime.bindings import ggml, pager, sparse_ffn
from runtime.bindings.ffn_shape import FfnShape
from runtime.bindings.pager import PAGE, Fetch, Pager
from runtime.errors import UserError
from runtime.model_file import tensor_names as n
from runtime.model_file.frequencies import frequencies
from runtime.model_file.reader import GgufFile

_READERS = 16  # threads that wait for the disk at the same time; more gained nothing (docs/log.md)
_LOADED = 0.95  # of what may be there is read when a model is loaded; the rest is for what comes first
_AT_ONCE = 4096  # pages read before the load can be stopped


@dataclass(frozen=True)
class PagedStats:
    """What was read from the file while computing. Bytes: `wanted` by operators, of them `read` from the disk,
    `dropped` again; `resident`: in memory now, of `limit` that may be. reads: of some pages each; seconds: waited.
    """

    wanted: int
    read: int
    dropped: int
    resident: int
    limit: int
    reads: int
    seconds: float


class Paging(Closing):
    """The rows of all FFNs of a file, a part of them in memory. To be used by one thread.

    Raises UserError where the file cannot be read so.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file, self.names = file, frozenset(paged_names(file))
        paths = list(dict.fromkeys(part.path for part in file.parts))
        self._numbers = {path: k for k, path in enumerate(paths)}
        self.limit = 0
        self._pager = Pager(paths, _READERS)

    def place(self, name: str) -> tuple[int, int, int]:
        """Where a tensor lies: address and size of its file's window, and its own address."""
        part = self._file.path_of(name)
        start = self._pager.address(self._numbers[part])
        size = next(p.size for p in self._file.parts if p.path == part)
        return start, size, start + self._file.tensors[name].offset

    @functools.cached_property  # asked before each batch
    def least(self) -> int:
        """Bytes that must be allowed: what one operator may want at once."""
        return max((self._together(i, ffn) for i, ffn in self._file.structure.ffns.items()), default=0)

    def _together(self, i: int, ffn: FfnShape) -> int:
        rows, stems = n.row_matrices(ffn), n.stems(ffn)
        whole = [n.weight_of(i, stem) for stem in stems.matrices]
        names = [n.weight_of(i, stem) for stem in rows]
        if self._file.tensors[names[0]].stride:
            return self._pages_of(names[:1]) * PAGE  # all rows lie between the first one's
        return max(self._pages_of(names), self._pages_of(name for name in whole if name in self.names)) * PAGE

    def _pages_of(self, names: Iterable[str]) -> int:
        found = [self._file.tensors[name] for name in names]
        return sum(max(info.nbytes, info.rows * info.stride) // PAGE + 2 for info in found)

    def allow(self, n_bytes: int) -> None:
        """Let so many bytes be in memory. Raises UserError for less than `least`."""
        if n_bytes < self.least:
            raise UserError(
                f"`{self._file.path}`: {memory(max(0, n_bytes))} of the memory budget are left for neurons, expected "
                f"at least {memory(self.least)}: those of one layer",
                "raise --ram-budget, or use a smaller --n-ctx",
            )
        self.limit = n_bytes
        self._pager.limit(n_bytes)

    def load(self) -> None:
        """Read the rows that fire most often, as many as are allowed. Raises UserError where that fails."""
        room, found = int(_LOADED * self.limit) // PAGE, self._by_frequency()
        chosen = np.sort(found[:room])
        for at in range(0, len(chosen), _AT_ONCE):
            worker.stop_if_unwanted()
            self._pager.load(_runs(chosen[at : at + _AT_ONCE]))
            self._pager.check()

    def _by_frequency(self) -> npt.NDArray[np.int64]:
        """The pages of all rows by their numbers (address / PAGE), those that are wanted most often first."""
        pages, shares = [], []
        for i, ffn in self._file.structure.ffns.items():
            fires = frequencies(self._file, i)
            for stem in n.row_matrices(ffn):
                first, last = self._rows(n.weight_of(i, stem), len(fires))
                for k in range(int((last - first).max()) + 1):
                    inside = first + k <= last
                    pages.append((first + k)[inside])
                    shares.append(fires[inside])
        numbers, rates = np.concatenate(pages), np.concatenate(shares)
        order = np.argsort(-rates, kind="stable")
        _, firsts = np.unique(numbers[order], return_index=True)
        kept: npt.NDArray[np.int64] = numbers[order][np.sort(firsts)]
        return kept

    def _rows(self, name: str, n_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """First and last page of each row of a matrix."""
        info = self._file.tensors[name]
        size = info.nbytes // n_rows
        starts = self.place(name)[2] + (info.stride or size) * np.arange(n_rows, dtype=np.int64)
        return starts // PAGE, (starts + size - 1) // PAGE

    def check(self) -> None:
        """After something was computed: raise UserError where rows could not be read, or the file has changed."""
        self._pager.check()

    def stats(self) -> PagedStats:
        """What was read since `load`."""
        s = self._pager.stats()
        return PagedStats(
            wanted=s.wanted * PAGE,
            read=s.read * PAGE,
            dropped=s.dropped * PAGE,
            resident=s.resident * PAGE,
            limit=self.limit,
            reads=s.reads,
            seconds=s.nanoseconds / 1e9,
        )

    def close(self) -> None:
        """Give the memory back."""
        self._pager.close()

    # --- in graphs ---------------------------------------------------------------------------------------------------

    def rows(self, what: int, matrices: Sequence[ggml.TensorP | None], ffn: sparse_ffn.Ffn) -> Fetch:
        """What makes the rows of some matrices be there, of neurons as one of pager.ALL, CANDIDATES, FIRED names
        them.
        """
        found = [(t.data, ggml.ggml_row_size(t.type, t.ne[0]), t.nb[1]) for t in matrices if t is not None]
        return pager.fetch(self._pager, what, found, ffn)

    def whole(self, matrices: Sequence[ggml.TensorP]) -> Fetch:
        """What makes whole matrices be there."""
        sizes = (ggml.ggml_nbytes(ggml.ConstTensorP(t.value)) for t in matrices)
        found = [(t.data, size, size) for t, size in zip(matrices, sizes, strict=True)]
        return pager.fetch(self._pager, pager.WHOLE, found, None)


def paged_names(file: GgufFile) -> list[str]:
    """The matrices over the neurons of all FFNs, also that which only whole products read."""
    found = []
    for i, ffn in file.structure.ffns.items():
        stems = dict.fromkeys((*n.row_matrices(ffn), *n.stems(ffn).matrices))
        found += [name for stem in stems if (name := n.weight_of(i, stem)) in file.tensors]
    return found


def _runs(pages: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Address and bytes of each run of pages that follow each other."""
    cuts = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(run[0]) * PAGE, len(run) * PAGE) for run in np.split(pages, cuts)]
