"""Keys and values: a pool of cells, and the table that says which position of which sequences each cell holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.base.figures import size as size_text
from runtime.bindings import ggml
from runtime.compute.batch import Batch
from runtime.compute.weights import new_context
from runtime.errors import UserError
from runtime.model_file.structure import Structure
from runtime.options import MOST_SEQUENCES, SettledOptions

CELL_STEP = 256  # graphs are built for multiples of this many cells
MAX_SEQUENCES = MOST_SEQUENCES
_BITS = np.uint64(1) << np.arange(MAX_SEQUENCES, dtype=np.uint64)
_NOWHERE = np.iinfo(np.int32).min  # a position minus this is 2^31 or more, as an unsigned number of 32 bits
_MINUS_INFINITY = np.uint16(0xFC00)  # as a float16


def cache_bytes(s: Structure, options: SettledOptions, blocks: range | None = None) -> int:
    """Bytes of all keys and values, and of states, that there is room for, in all blocks or in some."""
    there = range(s.block_count) if blocks is None else blocks
    lengths = sum(a.kv_length for i, a in s.attentions.items() if i in there)
    states = sum(m.held_bytes(options.kept_states, options.logged) for i, m in s.mambas.items() if i in there)
    return 2 * ggml.ggml_row_size(options.kv_type_id, 1) * options.cells * lengths + states


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


class CellTable:
    """Which position of which sequences each cell holds. A cell may belong to several sequences.

    positions: int32 [n]. members: uint64 [n], a bit for each sequence; 0: the cell is free. n: n_cells, padded.
    states: see `GraphInputs`, of the last batch that was taken in.
    """

    can_trim = True  # keys and values stand alone: the end of a sequence can be taken back
    states: tuple[npt.NDArray[np.int32], ...] = ()

    def __init__(self, n_cells: int) -> None:
        self.n_cells, self.n_sequences = n_cells, MAX_SEQUENCES
        self.positions = np.zeros(padded_cells(n_cells), np.int32)
        self.members = np.zeros(padded_cells(n_cells), np.uint64)
        self._lengths = [0] * MAX_SEQUENCES
        self._lasts = [-1] * MAX_SEQUENCES  # of each sequence, the last of its cells
        self._n_used = 0
        self._end = 0  # one more than the last cell that is used

    def length(self, sequence: int) -> int:
        """Tokens of a sequence: the position that its next one has."""
        return self._lengths[sequence]

    @property
    def lengths(self) -> list[int]:
        """Of all sequences, for `trim_to`."""
        return self._lengths.copy()

    @property
    def n_used(self) -> int:
        """Cells that hold something."""
        return self._n_used

    @property
    def n_kv(self) -> int:
        """How many cells attention reads: up to the last used one, padded."""
        return padded_cells(self._end)

    def take(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Cells for the tokens of a batch; they hold these tokens from now on.

        A token gets the first free cell behind the last of its sequence, while there is one: attention adds up by
        cells, so the order of a sequence's cells must not depend on what others hold.
        Raises UserError where there are not enough, and ValueError for tokens that do not continue their sequences.
        """
        n, lengths = len(batch), self._continued(batch)
        if n > self.n_cells - self._n_used:
            raise UserError(
                f"{n} tokens more, expected at most {self.n_cells - self._n_used}: "
                f"the context has {self.n_cells} cells, of which {self._n_used} are used",
                "a larger --n-ctx has more",
            )
        no_holes = self._n_used == self._end
        cells = np.arange(self._end, self._end + n) if no_holes else self._free_cells(batch.sequences)
        self.positions[cells] = batch.positions
        self.members[cells] = _BITS[batch.sequences]
        for sequence, cell in zip(batch.sequences.tolist(), cells.tolist(), strict=True):
            self._lasts[sequence] = max(self._lasts[sequence], cell)
        self._lengths = lengths
        self._n_used += n
        self._end = max(self._end, int(cells.max()) + 1)
        return cells

    def _free_cells(self, sequences: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Free cells for tokens of these sequences, int64 [n], of which there are enough."""
        cells = np.empty(len(sequences), np.int64)
        free = self.members[: self.n_cells] == 0
        for sequence in dict.fromkeys(sequences.tolist()):
            its = np.flatnonzero(sequences == sequence)
            first, n = self._lasts[sequence] + 1, len(its)
            found = np.flatnonzero(free[first : self._end + len(sequences)])[:n] + first
            if len(found) < n:
                found = np.concatenate([found, np.flatnonzero(free[:first])[: n - len(found)]])
            cells[its] = found
            free[found] = False
        return cells

    def fits(self, wanted: Sequence[tuple[int, int]], forgotten: Sequence[int] = ()) -> bool:
        """Whether sequences can go on by so many tokens each, in whatever turns, each in cells behind its own last.

        wanted: (the sequence, tokens). forgotten: sequences that would be forgotten before.
        """
        kept = ~np.bitwise_or.reduce(_BITS[list(forgotten)], initial=np.uint64(0))
        free = (self.members[: self.n_cells] & kept) == 0
        behind = np.append(np.cumsum(free[::-1])[::-1], 0)  # of each cell: free ones from it on
        # What is wanted behind a cell must be there. `take` gives first cells first, which keeps that so.
        total = 0
        for last, n in sorted(((self._lasts[sequence], n) for sequence, n in wanted), reverse=True):
            total += n
            if total > behind[last + 1]:
                return False
        return True

    def _continued(self, batch: Batch) -> list[int]:
        """The sequences' lengths after a batch."""
        if not len(batch):
            raise ValueError("a batch without tokens")
        lengths = self._lengths.copy()
        for sequence, position in zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True):
            if not 0 <= sequence < MAX_SEQUENCES:
                raise ValueError(f"sequence {sequence}, expected 0 to {MAX_SEQUENCES - 1}")
            if position != lengths[sequence]:
                raise ValueError(f"position {position} of sequence {sequence}, expected {lengths[sequence]}")
            lengths[sequence] += 1
        return lengths

    def reachable(self, sequence: int, length: int) -> int:
        """To which length, at most `length`, a sequence can be taken back."""
        return min(length, self._lengths[sequence])

    def save(self, sequence: int) -> None:
        """Make the present length of a sequence one that it can be taken back to: here each is."""

    @contextmanager
    def held(self, sequence: int) -> Iterator[None]:
        """Within a `with` statement, the sequence can be taken back to its present length."""
        self.hold(sequence)
        try:
            yield
        finally:
            self.let_go(sequence)

    def hold(self, sequence: int) -> None:
        """What `held` does first: here nothing, as a sequence can be taken back to any length."""

    def let_go(self, sequence: int) -> None:
        """What `held` does at the end."""

    def logs(self, batch: Batch) -> bool:
        """Whether states of Mamba blocks need something of a batch to be kept."""
        return False

    def trim(self, sequence: int, length: int = 0) -> None:
        """Forget a sequence from position `length` on. Cells that no other sequence holds are free then."""
        if length < self._lengths[sequence]:
            self.members[self._holds(sequence) & (self.positions >= length)] &= ~_BITS[sequence]
            self._lengths[sequence], self._lasts[sequence] = length, self._last(sequence)
            used = np.flatnonzero(self.members[: self._end])
            self._n_used, self._end = len(used), int(used[-1]) + 1 if len(used) else 0

    def trim_to(self, lengths: Sequence[int]) -> None:
        """Forget what came to the sequences since they had these lengths."""
        for sequence, length in enumerate(lengths):
            self.trim(sequence, length)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Let another sequence, which is forgotten, begin as `source` does, with its first `length` tokens (None: all).
        They share cells.
        """
        length = self.length(source) if length is None else min(length, self.length(source))
        if source != target:
            self.trim(target)
            self.members[self._holds(source) & (self.positions < length)] |= _BITS[target]
            self._lengths[target], self._lasts[target] = length, self._last(target)

    def clear(self) -> None:
        """Forget all sequences."""
        self.members[:] = 0
        self._lengths, self._lasts = [0] * MAX_SEQUENCES, [-1] * MAX_SEQUENCES
        self._n_used = self._end = 0

    def masks(self, batch: Batch, windows: Sequence[int]) -> tuple[npt.NDArray[np.float16], ...]:
        """Of each window: float16 [n_tokens, n_kv], 0 where a token sees a cell, else minus infinity. After `take`.

        It sees those of its own sequence that are not later than itself, and of a window of w positions the last w.
        """
        members, positions, numbers = self.members[: self.n_kv], self.positions[: self.n_kv], batch.sequences
        if len(numbers) == 1 or (numbers == numbers[0]).all():
            held = np.where(members & _BITS[numbers[0]], positions, _NOWHERE)
        else:
            distinct, row = np.unique(numbers, return_inverse=True)
            held = np.where(members & _BITS[distinct, None], positions, _NOWHERE)[row]
        behind = (batch.positions[:, None] - held).view(np.uint32)  # of what is later, or not held: 2^31 or more
        return tuple(((behind >= (window or 2**31)) * _MINUS_INFINITY).view(np.float16) for window in windows)

    def _last(self, sequence: int) -> int:
        return int(np.flatnonzero(self._holds(sequence)).max(initial=-1))

    def _holds(self, sequence: int) -> npt.NDArray[np.bool_]:
        holds: npt.NDArray[np.bool_] = (self.members & _BITS[sequence]) != 0
        return holds
