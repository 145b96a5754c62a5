"""Some blocks of a model, in the process that computes them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.base.closing import Closing, Handles
from runtime.engine import Engine
from runtime.errors import UserError
from runtime.hub.locate import locate
from runtime.model_file.reader import GgufFile
from runtime.options import RunOptions
from runtime.stages.work import Identity, Passed, Work, change

_NOTHING = np.empty((0, 0), np.float32)


class OutOfOrderError(RuntimeError):
    """A work that is not the next one: what the stage has in its cache is not what the others have."""


@dataclass(frozen=True)
class About:
    """What a stage says of itself. held_bytes: of weights in memory. note: why weights are not there that should be."""

    identity: Identity
    blocks: range
    threads: int
    held_bytes: int
    host: str
    pid: int
    note: str = ""


class Stage(Closing):
    """An engine of some blocks, which does one work after the other. `close` frees it.

    source: a file, or a name on the Hub; options: settled for the whole model; blocks: consecutive ones; threads: of
    this stage, None for one per physical core. Raises UserError as `runtime.load` does.
    """

    def __init__(self, source: str | Path, options: RunOptions, blocks: range, threads: int | None = None) -> None:
        with Handles() as handles:
            file = GgufFile(locate(source))
            self.identity, self.blocks = Identity.of(file), blocks
            self.options = replace(options, threads=threads).for_file(file)
            self.engine = handles.enter_context(Engine(file, self.options, blocks=blocks))
            self._handles = handles.pop_all()
        self._epoch, self._next = -1, 0

    def step(self, work: Work, passed: Passed | None) -> Passed:
        """Do a work. passed: what the stage before has made of it, None in the first one.

        An error of computing is in what is returned, so that all stages do the same to their cells. Raises
        OutOfOrderError for a work that does not follow the one before.
        """
        return self.engine.exclusively(lambda: self._step(work, passed))

    def _step(self, work: Work, passed: Passed | None) -> Passed:
        self._check_turn(work)
        started = time.perf_counter()
        change(self.engine.cells, work.changes)
        before = passed or Passed(work.batch.tokens)  # type: ignore[arg-type]
        if before.error:
            self.engine.cells.take(work.batch)
            return before
        run = self.options.deciding if work.mode is None else self.options.as_mode(*work.mode)
        try:
            done = self.engine.pass_on(work.batch, before.data, run)
        except UserError as error:
            return Passed(_NOTHING, error=(error.message, error.hint))
        counted = {sequence: dict(before.counted.get(sequence, {})) for sequence in done.counted}
        for sequence, layers in done.counted.items():
            counted[sequence] |= layers
        return Passed(done.data, counted, (*before.seconds, time.perf_counter() - started))

    def _check_turn(self, work: Work) -> None:
        if work.epoch > self._epoch and work.number == 0:
            self.engine.cells.clear()
            self._epoch, self._next = work.epoch, 0
        if (work.epoch, work.number) != (self._epoch, self._next):
            raise OutOfOrderError(
                f"work {work.number} of epoch {work.epoch}, expected {self._next} of epoch {self._epoch}"
            )
        self._next += 1

    def close(self) -> None:
        """Free the engine."""
        self._handles.close()
