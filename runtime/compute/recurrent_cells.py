"""The table of cells of a model with Mamba blocks, whose sequences cannot be taken back token by token.

It says, too, in which row of the states each sequence is. Going back copies nothing: a row that is still needed as it
is (for another sequence, or to go back to it) is read, and the next batch writes to another row.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.compute.batch import Batch
from runtime.compute.kv_cache import CellTable
from runtime.compute.states import Move


@dataclass(frozen=True)
class _Point:
    """States of a sequence when it had so many tokens, and where they are."""

    length: int
    row: int


class RecurrentCells(CellTable):
    """A table of cells that knows where states of Mamba blocks are.

    n_states: rows of states, at least one more than sequences; two more than that where batches are logged. logged: so
    many tokens of one sequence are logged, at most: the sequence can be taken back to each length within the last
    batch, while nothing else was computed.
    moves: what is to be done to states, in this order, before the next batch is computed. States change only when a
    batch is computed, so nothing is lost by doing it then.
    """

    can_trim = False

    def __init__(self, n_cells: int, n_sequences: int, n_states: int, logged: int = 0) -> None:
        super().__init__(n_cells)
        self.n_sequences, self._n_states, self._logged = n_sequences, n_states, logged
        self.moves: deque[Move] = deque()
        self._rows: dict[int, int] = {}  # by sequence: where its states are
        self._saved: dict[int, _Point] = {}  # by sequence, the one that was saved first first
        self._held: dict[int, _Point] = {}
        self._before: tuple[int, _Point] | None = None  # the sequence of the log, and its states before

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """As for other models; and each sequence gets the rows that its states are read from, and written to."""
        if len(batch) and int(batch.sequences.max()) >= self.n_sequences:
            raise ValueError(f"sequence {int(batch.sequences.max())}, expected 0 to {self.n_sequences - 1}")
        numbers, lengths = batch.runs()[1].tolist(), self.lengths
        cells = super().take(batch)
        self._before = None
        for sequence in numbers:
            if not lengths[sequence]:
                self._rows[sequence] = self._new_row()
                self.moves.append(Move("begin", self._rows[sequence]))
        read = self._apart(numbers)
        if self.logs(batch):
            self._before = numbers[0], _Point(lengths[numbers[0]], read[0])
        # First where it cannot be helped: a point to go back to may be let go of.
        for sequence in sorted(numbers, key=self._shares, reverse=True):
            self._rows[sequence] = self._for_writing(self._rows[sequence], read)
        written = [self._rows[sequence] for sequence in numbers]
        self.states = np.array(read, np.int32), np.array(written, np.int32)
        return cells

    def logs(self, batch: Batch) -> bool:
        """Whether it is kept of a batch what states follow from."""
        return len(batch) <= self._logged and int(batch.sequences[0]) == int(batch.sequences[-1])

    def reachable(self, sequence: int, length: int) -> int:
        """All of the sequence, or as much as there was when its states were saved, or nothing; after a logged batch any
        length from its beginning on.
        """
        if length >= self.length(sequence):
            return self.length(sequence)
        if self._in_log(sequence, length):
            return length
        return max((point.length for point in self._points(sequence) if point.length <= length), default=0)

    def save(self, sequence: int) -> None:
        """Keep a sequence's states, in place of earlier ones: it can be taken back to here.

        They are let go of where there are no other states for a batch.
        """
        self._saved.pop(sequence, None)
        self._saved[sequence] = self._present(sequence)

    def hold(self, sequence: int) -> None:
        """Keep a sequence's states as they are now, beside saved ones."""
        if sequence in self._rows:
            self._held[sequence] = self._present(sequence)

    def let_go(self, sequence: int) -> None:
        """Keep them no longer."""
        self._held.pop(sequence, None)

    def trim(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence from position `length` on, or from an earlier one that is reachable."""
        if length >= self.length(sequence):
            return
        reached = self.reachable(sequence, length)
        if reached:
            self._rows[sequence] = self._row_of(sequence, reached, at_home=True)
        else:
            self._rows.pop(sequence, None)
        super().trim(sequence, reached)
        for points in (self._saved, self._held):
            if sequence in points and (points[sequence].length > reached or not reached):
                del points[sequence]
        if self._before and self._before[0] == sequence:
            self._before = None

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """As for other models, where the length is reachable; ValueError where it is not."""
        whole = self.length(source)
        length = whole if length is None else min(length, whole)
        if self.reachable(source, length) != length:
            raise ValueError(f"{length} tokens of sequence {source}, expected a length that it can be taken back to")
        super().copy(source, target, length)
        if source != target and length:
            self._rows[target] = self._row_of(source, length)

    def clear(self) -> None:
        """Forget all sequences."""
        super().clear()
        self._before = None
        for kept in (self._rows, self._saved, self._held, self.moves):
            kept.clear()

    def _present(self, sequence: int) -> _Point:
        return _Point(self.length(sequence), self._rows[sequence])

    def _points(self, sequence: int) -> list[_Point]:
        return [points[sequence] for points in (self._saved, self._held) if sequence in points]

    def _in_log(self, sequence: int, length: int) -> bool:
        return bool(self._before and self._before[0] == sequence and self._before[1].length <= length)

    def _row_of(self, sequence: int, length: int, at_home: bool = False) -> int:
        """Where a sequence's states at a reachable length are, or will be. at_home: what it has now is not needed."""
        if length == self.length(sequence):
            return self._rows[sequence]
        for point in self._points(sequence):
            if point.length == length:
                return point.row
        assert self._before
        before = self._before[1]
        if before.length == length:
            return before.row
        row = self._rows[sequence]
        if not at_home or Counter(self._held_rows())[row] > 1:
            row = self._new_row()
        self.moves.append(Move("replay", row, before.row, length - before.length))
        return row

    def _held_rows(self) -> list[int]:
        """All rows that are needed as they are, once for each that needs it."""
        points = [*self._saved.values(), *self._held.values(), *([self._before[1]] if self._before else [])]
        return [*self._rows.values(), *(point.row for point in points)]

    def _apart(self, numbers: list[int]) -> list[int]:
        """What sequences of a batch read, each another row: copied where some began alike and both go on now."""
        read: list[int] = []
        for sequence in numbers:
            row = self._rows[sequence]
            if row in read:
                self._rows[sequence] = self._new_row()
                self.moves.append(Move("copy", self._rows[sequence], row))
            read.append(self._rows[sequence])
        return read

    def _shares(self, sequence: int) -> bool:
        """Whether another sequence has the same states."""
        return list(self._rows.values()).count(self._rows[sequence]) > 1

    def _for_writing(self, row: int, read: list[int]) -> int:
        """Where a sequence's states are written whose row is this one; `read`: what the batch reads. The same row where
        nobody else needs it: what one sequence reads no other may write.
        """
        while Counter(self._held_rows())[row] > 1:
            free = self._free_row(read)
            if free is not None:
                return free
            self._forget_first()
        return row

    def _new_row(self) -> int:
        """A row that nobody needs."""
        while (row := self._free_row()) is None:
            self._forget_first()
        return row

    def _free_row(self, read: Collection[int] = ()) -> int | None:
        taken = {*self._held_rows(), *read}
        return next((row for row in range(self._n_states) if row not in taken), None)

    def _forget_first(self) -> None:
        """Forget where the sequence can be taken back to that was saved first."""
        del self._saved[next(iter(self._saved))]
