"""What computes a model's tokens, wherever that happens: the table of cells, the counters, batches in pieces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from runtime.base.worker import OfWorker
from runtime.bindings import ggml
from runtime.compute.batch import Batch
from runtime.compute.counters import Counters, LayerCount
from runtime.compute.kv_cache import CellTable, cache_bytes
from runtime.compute.paging import PagedStats
from runtime.compute.traffic import kv_bytes
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.costs import LOGITS
from runtime.model_file.structure import Structure
from runtime.options import SettledOptions

T = TypeVar("T")
Floats = npt.NDArray[np.float32]
Counted = dict[int, dict[int, LayerCount]]  # what FFNs did, by sequence and block


@dataclass(frozen=True)
class Done:
    """A piece of a batch that was computed. data: logits, float32 [n_outputs, n_vocab], or hidden states; counted: what
    its FFNs did.
    """

    data: Floats
    counted: Counted


class BaseEngine(OfWorker):
    """A model ready to compute; what computes a piece of a batch, and where, is its subclass's.

    Its methods do their work on the worker, one after the other, whichever threads call them. asked: what was to be on
    devices, None for nothing; arrangement: what is. memory_note: why weights are not in memory that should be; "".
    losses: how often all sequences were forgotten, because what computes was lost.
    """

    asked: Arrangement | None = None
    arrangement: Arrangement | None = None
    memory_note = ""
    losses = 0

    def __init__(self, what: str, structure: Structure, options: SettledOptions, cells: CellTable) -> None:
        super().__init__(what)
        self.structure, self.options, self.cells = structure, options, cells
        self._run = options.deciding
        self.counters = Counters(structure, options.ffn)  # of all that is computed

    def exclusively(self, work: Callable[[], T]) -> T:
        """Run something on the worker, where nothing else is computed meanwhile, and return what it returns."""
        return self._do(work)

    def compute(
        self, batch: Batch, counters: Mapping[int, Counters] | None = None, run: SettledOptions | None = None
    ) -> Floats:
        """Logits of the tokens that `batch.outputs` names: float32 [n_outputs, n_vocab]. All tokens are in the cache
        afterwards.

        A batch of more than n_batch tokens is computed in pieces. counters: of sequences, by their numbers; what the
        FFNs did for a sequence's tokens is added to its own. run: for drafts, which are computed in another way; the
        engine's own counters leave them out. After an error cache and counters are as before; in a model with Mamba
        blocks, sequences of the batch may be shorter than before.
        Raises UserError where the cache is full, and ValueError for tokens that do not continue their sequences or are
        not in the vocabulary.
        """
        return self._do(lambda: self._compute(batch, counters or {}, run))

    def _compute(self, batch: Batch, counters: Mapping[int, Counters], run: SettledOptions | None) -> Floats:
        n_vocab = self.structure.vocab_size
        if len(batch) and not 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < n_vocab:
            raise ValueError(f"tokens {batch.tokens}, expected 0 to {n_vocab - 1}")
        before = self.cells.lengths
        try:
            done = list(self._computed(self._cut(batch), run or self._run))
        except BaseException:
            self.cells.trim_to(before)
            raise
        for one in done:
            for sequence, layers in one.counted.items():
                if run is None:
                    self.counters.add(layers)
                if sequence in counters:
                    counters[sequence].add(layers)
        return done[0].data if len(done) == 1 else np.concatenate([one.data for one in done])

    def _cut(self, batch: Batch) -> list[Batch]:
        """The pieces of a batch that are computed one after the other."""
        step = self.options.n_batch
        if self.arrangement and len(batch.outputs) > LOGITS:  # more than a device has room for
            step = min(step, LOGITS)
        return [batch.part(first, first + step) for first in range(0, len(batch), step)]

    @abstractmethod
    def _computed(self, pieces: Sequence[Batch], run: SettledOptions) -> Iterator[Done]:
        """Take cells for each piece, and compute it, behind the one before it."""
        raise NotImplementedError

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of weights that were read into memory."""
        raise NotImplementedError

    @abstractmethod
    def paged(self) -> PagedStats | None:
        """What was read from the file while computing; None without a budget of main memory."""
        raise NotImplementedError

    @abstractmethod
    def expert_shares(self) -> list[list[float]]:
        """By layer, the share of tokens that chose each expert since the model was loaded; empty for layers without
        experts, and while nothing was computed but whole matrices.
        """
        raise NotImplementedError

    @abstractmethod
    def device_bytes(self) -> tuple[int, ...]:
        """Bytes of all buffers on each device: weights, keys and values, hidden states, compute buffers."""
        raise NotImplementedError

    @property
    def kv_held(self) -> int:
        """Bytes of all keys and values, and of states, that there is room for, all layers."""
        return cache_bytes(self.structure, self.options)

    def kv_bytes(self, n_positions: float) -> float:
        """Bytes of keys and values that one token reads at so many positions, all layers."""
        return kv_bytes(self.structure, n_positions, ggml.ggml_row_size(self.options.kv_type_id, 1))
