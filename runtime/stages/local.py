"""Stages in this process: nothing is gained by them, but that they show what stages do, without a cluster."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from runtime.base.closing import Closing, Handles
from runtime.options import RunOptions
from runtime.stages.stage import About, Stage
from runtime.stages.work import Passed, Work


def about(stage: Stage) -> About:
    """What a stage says of itself, in its own process."""
    engine = stage.engine
    return About(
        stage.identity,
        stage.blocks,
        stage.options.threads,
        engine.held_bytes,
        socket.gethostname(),
        os.getpid(),
        engine.memory_note,
    )


class LocalStages(Closing):
    """All stages, one after the other."""

    def __init__(self, source: Path, options: RunOptions, cuts: list[range]) -> None:
        with Handles() as handles:
            self._stages = [handles.enter_context(Stage(source, options, blocks)) for blocks in cuts]
            self._handles = handles.pop_all()

    def about(self) -> list[About]:
        """See `Stages`."""
        return [about(stage) for stage in self._stages]

    def send(self, work: Work) -> Passed:
        """See `Stages`; the work is done when it returns."""
        passed: Passed | None = None
        for stage in self._stages:
            passed = stage.step(work, passed)
        assert passed
        return passed

    def receive(self, ticket: object) -> Passed:
        """See `Stages`."""
        assert isinstance(ticket, Passed)
        return ticket

    def restart(self) -> None:
        """Never needed: these stages end with the process."""

    def close(self) -> None:
        """See `Stages`."""
        self._handles.close()
