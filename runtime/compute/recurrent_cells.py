"""The table of cells of a model with Mamba blocks, whose sequences cannot be taken back token by token."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from runtime.compute.batch import Batch
from runtime.compute.kv_cache import CellTable
from runtime.compute.states import Move


class RecurrentCells(CellTable):
    """A table of cells that knows what must happen to the states of Mamba blocks, too.

    moves: what is to be done to states, in this order, before the next batch is computed. States change only when a
    batch is computed, so nothing is lost by doing it then.
    """

    can_trim = False

    def __init__(self, n_cells: int, n_sequences: int) -> None:
        super().__init__(n_cells)
        self.n_sequences = n_sequences
        self.moves: deque[Move] = deque()
        self._saved: dict[int, int] = {}  # by sequence: the length at which its states were copied

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """As for other models; and a sequence that begins gets new states."""
        if len(batch) and int(batch.sequences.max()) >= self.n_sequences:
            raise ValueError(f"sequence {int(batch.sequences.max())}, expected 0 to {self.n_sequences - 1}")
        cells = super().take(batch)
        self.moves += [Move("begin", sequence) for sequence in batch.sequences[batch.positions == 0].tolist()]
        return cells

    def reachable(self, sequence: int, length: int) -> int:
        """All of the sequence, or as much as there was when its states were saved, or nothing."""
        saved = self._saved.get(sequence, 0)
        if length >= self.length(sequence):
            return self.length(sequence)
        return saved if saved <= length else 0

    def save(self, sequence: int) -> None:
        """Keep a copy of a sequence's states, in place of an earlier one: it can be taken back to here."""
        self._saved[sequence] = self.length(sequence)
        self.moves.append(Move("save", sequence))

    def trim(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence from position `length` on, or from an earlier one that is reachable."""
        if length >= self.length(sequence):
            return
        reached = self.reachable(sequence, length)
        super().trim(sequence, reached)
        if reached:
            self.moves.append(Move("restore", sequence, sequence))
        else:
            self._forget(sequence)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """As for other models, where the length is reachable; ValueError where it is not."""
        whole = self.length(source)
        length = whole if length is None else min(length, whole)
        if self.reachable(source, length) != length:
            raise ValueError(f"{length} tokens of sequence {source}, expected a length that it can be taken back to")
        super().copy(source, target, length)
        if source != target and length:
            self.moves.append(Move("copy" if length == whole else "restore", target, source))

    def clear(self) -> None:
        """Forget all sequences."""
        super().clear()
        for sequence in list(self._saved):
            self._forget(sequence)

    def _forget(self, sequence: int) -> None:
        if self._saved.pop(sequence, None) is not None:
            self.moves.append(Move("forget", sequence))
