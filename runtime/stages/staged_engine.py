"""An engine whose blocks are computed by stages: it has the table of cells and the counters, they have the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from runtime.base import worker
from runtime.base.closing import Handles
from runtime.base_engine import BaseEngine, Done
from runtime.bindings.sparse_ffn import FEW_TOKENS
from runtime.compute.batch import Batch
from runtime.compute.paging import PagedStats
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions
from runtime.stages.groups import Groups
from runtime.stages.stage import About
from runtime.stages.work import Identity, Passed, Work, WrittenCells, WrittenRecurrentCells, mode_of


class StageLostError(UserError):
    """A stage has ended, cannot be reached, or does not answer: what the stages have in their caches is lost."""


class Stages(Protocol):
    """All stages of a model, wherever they are, in order."""

    def about(self) -> list[About]:
        """What each says of itself, when all are ready. Raises UserError, or StageLostError."""
        ...

    def send(self, work: Work) -> object:
        """Let all stages do a work, one after the other, without waiting: a ticket for `receive`."""
        ...

    def receive(self, ticket: object) -> Passed:
        """Wait for a work, and take what the last stage made of it. Raises StageLostError."""
        ...

    def restart(self) -> None:
        """Begin anew the stages that have ended or do not answer; `about` waits for them."""
        ...

    def close(self) -> None:
        """End all stages."""
        ...


class StagedEngine(BaseEngine):
    """A model whose blocks are computed by `stages`, which it closes.

    When a stage is lost, what is being computed ends with StageLostError, all sequences are forgotten (see `losses`),
    and the stage is begun anew; what is computed after that waits for it.
    on_work: called with the seconds of each work in each stage. groups_wanted: into how many groups sequences are
    divided that are decoded together, None to choose it by what was measured.
    Raises UserError where stages do not run the same software and the same file as this process, or do not hold
    together all blocks.
    """

    def __init__(self, file: GgufFile, options: SettledOptions, stages: Stages) -> None:
        s = file.structure
        kept = (options.kept_sequences, options.kept_states, options.logged)
        self._table = WrittenRecurrentCells(options.cells, *kept) if s.mambas else WrittenCells(options.cells)
        super().__init__(f"`{file.path}`: the model", s, options, self._table)
        self._file, self._stages, self.identity = file, stages, Identity.of(file)
        self.on_work: Callable[[tuple[float, ...]], object] = lambda _: None
        self.groups_wanted: int | None = None
        self._epoch = self._number = 0
        self._about: list[About] = []
        self._open(self._collect)
        self._groups = Groups(len(self._about))

    def _collect(self, handles: Handles) -> None:
        handles.callback(self._file.close)
        handles.callback(self._stages.close)
        self._join()

    def _join(self) -> None:
        """Wait until all stages are there, and look at what they are."""
        self._about = self._stages.about()
        for k, about in enumerate(self._about, start=1):
            if what := self.identity.difference(about.identity):
                raise UserError(
                    f"stage {k} on {about.host}: {what}", "all machines need the same version and the same file"
                )
        ends = [0, *(about.blocks.stop for about in self._about)]
        if [about.blocks.start for about in self._about] != ends[:-1] or ends[-1] != self.structure.block_count:
            raise UserError(f"stages of blocks {[about.blocks for about in self._about]}, expected each block once")
        self.memory_note = next((about.note for about in self._about if about.note), "")

    @property
    def stages(self) -> list[About]:
        """What each stage is."""
        return list(self._about)

    # --- computing ---------------------------------------------------------------------------------------------------

    def _cut(self, batch: Batch) -> list[Batch]:
        """Tokens that are decoded together in groups, so that no stage waits for all of them."""
        n = len(batch)
        if n > FEW_TOKENS or not self.options.by_rows or len(np.unique(batch.sequences)) < n:
            return super()._cut(batch)
        m = min(n, self.groups_wanted) if self.groups_wanted else self._groups.number(n)
        ends = [round(k * n / m) for k in range(m + 1)]
        return [batch.part(first, end) for first, end in pairwise(ends)]

    def _computed(self, pieces: Sequence[Batch], run: SettledOptions) -> Iterator[Done]:
        if not self._about:
            self._join()
        try:
            tickets = []
            for piece in pieces:
                worker.stop_if_unwanted()
                tickets.append(self._send(piece, run))
            passed = [self._stages.receive(ticket) for ticket in tickets]
        except StageLostError:
            self._lose()
            raise
        for piece, one in zip(pieces, passed, strict=True):
            if one.error:
                raise UserError(*one.error)
            self.on_work(one.seconds)
            if len(piece) <= FEW_TOKENS:
                self._groups.took(len(piece), one.seconds)
            yield Done(one.data, one.counted)

    def _send(self, batch: Batch, run: SettledOptions) -> object:
        changes = tuple(self._table.changes)
        self._table.take(batch)
        self._table.changes.clear()
        work = Work(self._epoch, self._number, changes, batch, mode_of(run, self._run))
        self._number += 1
        return self._stages.send(work)

    def _lose(self) -> None:
        self._table.clear()
        self._table.changes.clear()
        self._epoch, self._number = self._epoch + 1, 0
        self.losses += 1
        self._about = []
        self._stages.restart()

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """See `BaseEngine.held_bytes`; of all stages."""
        return sum(about.held_bytes for about in self._about)

    def paged(self) -> PagedStats | None:
        """See `BaseEngine.paged`: stages have no budgets."""
        return None

    def expert_shares(self) -> list[list[float]]:
        """See `BaseEngine.expert_shares`: stages do not tell."""
        return [[] for _ in self.structure.blocks]

    def device_bytes(self) -> tuple[int, ...]:
        """See `BaseEngine.device_bytes`: stages compute on the CPU."""
        return ()
