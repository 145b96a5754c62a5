"""What is computed at once: tokens of one sequence or of several, and what a graph reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Tokens, int32 [n] each: their ids, the position of each in its sequence, and the number of that sequence.

    outputs: int32 [n_outputs], which of the tokens' logits are wanted, by index; any of them, or none.
    Tokens of one sequence stand in the order of their positions.
    """

    tokens: Ints
    positions: Ints
    sequences: Ints
    outputs: Ints

    @classmethod
    def of(
        cls, tokens: Sequence[int], start: int = 0, sequence: int = 0, outputs: Sequence[int] | None = None
    ) -> Batch:
        """Tokens of one sequence from position `start` on. outputs: None for the last token alone."""
        n = len(tokens)
        wanted = [n - 1] if outputs is None else outputs
        return cls(
            np.asarray(tokens, np.int32),
            np.arange(start, start + n, dtype=np.int32),
            np.full(n, sequence, np.int32),
            np.asarray(wanted, np.int32),
        )

    @classmethod
    def together(cls, batches: Sequence[Batch]) -> Batch:
        """Several batches as one, one behind the other."""
        firsts = np.cumsum([0, *(len(b) for b in batches)])[:-1]
        outputs = [b.outputs + first for b, first in zip(batches, firsts, strict=True)]
        return cls(
            np.concatenate([b.tokens for b in batches]),
            np.concatenate([b.positions for b in batches]),
            np.concatenate([b.sequences for b in batches]),
            np.concatenate(outputs).astype(np.int32),
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def runs(self) -> tuple[tuple[int, ...], Ints]:
        """How many tokens of each sequence stand one behind the other, and the numbers of these sequences.

        Raises ValueError where those of one do not stand together.
        """
        starts = np.flatnonzero(np.diff(self.sequences, prepend=-1))
        numbers = self.sequences[starts]
        if len(set(numbers.tolist())) < len(numbers):
            raise ValueError("tokens of a sequence among those of others, expected them one behind the other")
        return tuple(np.diff(starts, append=len(self)).tolist()), numbers

    def part(self, first: int, end: int) -> Batch:
        """The tokens from `first` to `end` - 1; the batch itself where that is all."""
        if first == 0 and end >= len(self):
            return self
        inside = (self.outputs >= first) & (self.outputs < end)
        return Batch(
            self.tokens[first:end],
            self.positions[first:end],
            self.sequences[first:end],
            self.outputs[inside] - np.int32(first),
        )


@dataclass(frozen=True)
class GraphInputs:
    """What a graph reads of a batch.

    data: ids, int32 [n_tokens]; or hidden states, float32 [n_tokens, n_embd], where the graph starts from them.
    positions: int32 [n_tokens]. cells: of the KV cache, int64 [n_tokens]. outputs: int32 [n_outputs].
    masks: of each distinct window, rising: float16 [n_tokens, n_kv], 0 where a token sees a cell, else minus infinity.
    states: where there are Mamba blocks, the rows that each sequence's states are read from, and written to, int32
    [n_sequences] each; else none.
    """

    data: npt.NDArray[np.int32] | npt.NDArray[np.float32]
    positions: Ints
    cells: npt.NDArray[np.int64]
    outputs: Ints
    masks: tuple[npt.NDArray[np.float16], ...]
    states: tuple[Ints, ...] = ()

    @property
    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """All but `data`, in the order of `Inputs.tensors`."""
        return self.positions, self.cells, self.outputs, *self.states, *self.masks
