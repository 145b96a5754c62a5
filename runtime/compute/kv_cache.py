"""Keys and values: a pool of cells, and the table that says which position of which sequences each cell holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.base.figures import size as size_text
from runtime.bindings import ggml
from runtime.compute.batch import Batch
from runtime.compute.weights import new_context
from runtime.errors import UserError

CELL_STEP = 256  # graphs are built for multiples of this many cells
MAX_SEQUENCES = 64
_UNSEEN = np.iinfo(np.int32).max  # later than any position


def padded_cells(n: int) -> int:
    """The number of cells that a graph for `n` of them reads."""
    return -(-n // CELL_STEP) * CELL_STEP


class KvCache(Closing):
    """Keys and values of some blocks, [kv_length, n_cells] each; zeroed, since masked cells are multiplied too.

    lengths: by block, elements of one token's keys, and of its values. Blocks without attention have none.
    """

    def __init__(self, backend: ggml.BackendP, type_id: int, lengths: Mapping[int, int], n_cells: int) -> None:
        self._buffer, n = ggml.BufferP(), len(lengths)
        with Handles() as handles:
            context = handles.add(new_context(2 * n), ggml.ggml_free)
            self._keys, self._values = (
                {i: ggml.ggml_new_tensor_2d(context, type_id, length, n_cells) for i, length in lengths.items()}
                for _ in range(2)
            )
            if n:
                self._buffer = ggml.ggml_backend_alloc_ctx_tensors(context, backend)
                handles.add(self._buffer, ggml.ggml_backend_buffer_free)
                if not self._buffer:
                    size = 2 * n_cells * sum(ggml.ggml_row_size(type_id, length) for length in lengths.values())
                    raise UserError(
                        f"not enough memory for {size_text(size)} of keys and values", "use a smaller --n-ctx"
                    )
                ggml.ggml_backend_buffer_clear(self._buffer, 0)
            self._handles = handles.pop_all()

    def of(self, i: int) -> tuple[ggml.TensorP, ggml.TensorP]:
        """Keys and values of block `i`."""
        return self._keys[i], self._values[i]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return ggml.ggml_backend_buffer_get_size(self._buffer) if self._buffer else 0

    def close(self) -> None:
        """Release the memory."""
        self._handles.close()


class Snapshot(NamedTuple):
    """A table as it was: see `CellTable.snapshot`."""

    positions: npt.NDArray[np.int32]
    members: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.int32]


class CellTable:
    """Which position of which sequences each of `n_cells` cells holds. A cell may belong to several sequences.

    positions: int32 [n_cells]. members: uint64 [n_cells], a bit for each sequence; 0: the cell is free.
    """

    can_trim = True  # keys and values stand alone: the end of a sequence can be taken back

    def __init__(self, n_cells: int) -> None:
        self.positions = np.zeros(n_cells, np.int32)
        self.members = np.zeros(n_cells, np.uint64)
        self._lengths = np.zeros(MAX_SEQUENCES, np.int32)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence: the position that its next one has."""
        return int(self._lengths[sequence])

    @property
    def end(self) -> int:
        """One more than the last cell that is used; 0 where none is."""
        used = self.members != 0
        return len(used) - int(used[::-1].argmax()) if used.any() else 0

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Cells for the tokens of a batch, the first free ones; they hold these tokens from now on.

        Raises UserError where there are not enough, and ValueError for tokens that do not continue their sequences.
        """
        self._check(batch)
        cells = np.flatnonzero(self.members == 0)[: len(batch)]
        if len(cells) < len(batch):
            held = len(self.members) - len(cells)
            raise UserError(
                f"{len(batch)} tokens more, expected at most {len(cells)}: the context has {len(self.members)} cells, of which {held} are used",
                "a larger --n-ctx has more",
            )
        self.positions[cells] = batch.positions
        self.members[cells] = np.uint64(1) << batch.sequences.astype(np.uint64)
        np.maximum.at(self._lengths, batch.sequences, batch.positions + 1)
        return cells

    def _check(self, batch: Batch) -> None:
        numbers = batch.sequences
        if len(batch) == 0 or not 0 <= int(numbers.min()) <= int(numbers.max()) < MAX_SEQUENCES:
            raise ValueError(f"sequences {numbers}, expected tokens of sequences 0 to {MAX_SEQUENCES - 1}")
        for sequence in np.unique(numbers):
            positions, length = batch.positions[numbers == sequence], self.length(sequence)
            if not np.array_equal(positions, np.arange(length, length + len(positions))):
                raise ValueError(f"positions {positions} of sequence {sequence}, expected those from {length} on")

    def trim(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence from position `length` on. Cells that no other sequence holds are free then."""
        if length < self._lengths[sequence]:
            self.members[self._holds(sequence) & (self.positions >= length)] &= ~_bit(sequence)
            self._lengths[sequence] = length

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Let another sequence, which is forgotten, begin as `source` does, with its first `length` tokens (None: all). They share cells."""
        length = self.length(source) if length is None else min(length, self.length(source))
        if source != target:
            self.trim(target)
            self.members[self._holds(source) & (self.positions < length)] |= _bit(target)
            self._lengths[target] = length

    def clear(self) -> None:
        """Forget all sequences."""
        self.members[:] = 0
        self._lengths[:] = 0

    def snapshot(self) -> Snapshot:
        """The table as it is now, for `restore`."""
        return Snapshot(self.positions.copy(), self.members.copy(), self._lengths.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Make the table what it was. What was written since then lies in cells that were free."""
        self.positions, self.members, self._lengths = snapshot

    def masks(self, batch: Batch, n_kv: int, windows: Sequence[int]) -> tuple[npt.NDArray[np.float16], ...]:
        """Of each window: float16 [n_tokens, n_kv], 0 where a token sees one of the first n_kv cells, else minus infinity.

        It sees those of its own sequence that are not later than itself, and of a window of w positions the last w.
        """
        behind = np.empty((len(batch), n_kv), np.int32)
        for sequence in np.unique(batch.sequences):
            rows = batch.sequences == sequence
            held = np.full(n_kv, _UNSEEN, np.int32)
            seen = self._holds(sequence)[:n_kv]
            held[: len(seen)][seen] = self.positions[:n_kv][seen]
            behind[rows] = batch.positions[rows, None] - held[None, :]
        return tuple(_mask(behind, window) for window in windows)

    def _holds(self, sequence: int) -> npt.NDArray[np.bool_]:
        holds: npt.NDArray[np.bool_] = (self.members & _bit(sequence)) != 0
        return holds


def _bit(sequence: int) -> np.uint64:
    return np.uint64(1) << np.uint64(sequence)


def _mask(behind: npt.NDArray[np.int32], window: int) -> npt.NDArray[np.float16]:
    mask = np.zeros(behind.shape, np.float16)
    mask[behind < 0] = -np.inf
    if window:
        mask[behind >= window] = -np.inf
    return mask
