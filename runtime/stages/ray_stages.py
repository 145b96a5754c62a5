"""Stages as actors of a Ray cluster: https://docs.ray.io. Ray is an extra, `cluster`."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import ray

from runtime.base.closing import Closing
from runtime.errors import UserError
from runtime.options import RunOptions
from runtime.stages.local import about
from runtime.stages.stage import About, Stage
from runtime.stages.staged_engine import StageLostError
from runtime.stages.work import Passed, Work

_LOST = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ray.exceptions.RaySystemError)
_STARTING_S = 600.0  # a stage may have to fetch its file first


@ray.remote(max_restarts=0, max_task_retries=0)
class _Actor:
    """A stage, in a process of its own."""

    def __init__(self, source: str, options: RunOptions, blocks: range, threads: int | None) -> None:
        self._error: UserError | None = None
        try:
            self._stage = Stage(source, options, blocks, threads)
        except UserError as error:  # as a value: Ray would print an error's traceback
            self._error = error

    def about(self) -> About | tuple[str, str]:
        """What the stage is; message and hint where it could not be made."""
        return (self._error.message, self._error.hint) if self._error else about(self._stage)

    def step(self, work: Work, passed: Passed | None = None) -> Passed:
        """See `Stage.step`."""
        return self._stage.step(work, passed)


class RayStages(Closing):
    """One actor for each stage. See `staged_engine.Stages`.

    source: a file that is at the same place on all machines, or a name on the Hub. threads: of each stage; None for one
    per physical core of its machine. timeout_s: for a piece of work through all stages; a cluster that takes longer is
    taken to be lost.
    Raises UserError where Ray cannot be reached.
    """

    def __init__(
        self, source: str | Path, options: RunOptions, cuts: list[range], threads: int | None, timeout_s: float
    ) -> None:
        self._given = [(str(source), options, blocks, threads) for blocks in cuts]
        self._threads, self._timeout_s = threads, timeout_s
        connect(len(cuts) * (threads or 1))
        self._actors: list[Any] = [self._new(k) for k in range(len(cuts))]

    def _new(self, k: int) -> Any:
        # Spread: a stage has the memory bandwidth of a machine for itself, where there are as many machines.
        return _Actor.options(num_cpus=self._threads or 1, scheduling_strategy="SPREAD").remote(*self._given[k])  # type: ignore[attr-defined]

    def about(self) -> list[About]:
        """See `Stages`."""
        until = time.monotonic() + _STARTING_S
        found = []
        for k, actor in enumerate(self._actors):
            try:
                one = ray.get(actor.about.remote(), timeout=max(0.1, until - time.monotonic()))
            except _LOST as error:
                raise StageLostError(f"{self._name(k)}: {self._why_not_begun(error)}", "see `ray status`") from None
            if isinstance(one, tuple):
                raise UserError(f"{self._name(k)}: {one[0]}", one[1])
            found.append(one)
        return found

    def _why_not_begun(self, error: Exception) -> str:
        if isinstance(error, ray.exceptions.GetTimeoutError):
            free = ray.available_resources().get("CPU", 0)
            return f"did not begin within {_STARTING_S:.0f} s; it wants {self._threads or 1} CPUs, {free:g} are free"
        return "ended while it began"

    def send(self, work: Work) -> object:
        """See `Stages`: hidden states go from stage to stage, and never come here."""
        packed = ray.put(work) if len(work.batch) > 1024 else work
        passed = None
        for actor in self._actors:
            passed = actor.step.remote(packed, passed)
        return passed

    def receive(self, ticket: object) -> Passed:
        """See `Stages`."""
        try:
            passed = ray.get(ticket, timeout=self._timeout_s)
        except (*_LOST, ray.exceptions.RayTaskError) as error:
            raise StageLostError(self._why_lost(error), "what was computed is lost: ask again") from None
        assert isinstance(passed, Passed)
        return passed

    def _why_lost(self, error: Exception) -> str:
        if isinstance(error, ray.exceptions.GetTimeoutError):
            return f"a stage did not answer within {self._timeout_s:g} s: it is begun anew"
        gone = [k for k in range(len(self._actors)) if not self._answers(k, 2.0)]
        names = ", ".join(self._name(k) for k in gone) or "a stage"
        return f"{names}: its process has ended; it is begun anew"

    def _answers(self, k: int, seconds: float) -> bool:
        try:
            ray.get(self._actors[k].about.remote(), timeout=seconds)
        except Exception:
            return False
        return True

    def restart(self) -> None:
        """See `Stages`."""
        try:
            for k in range(len(self._actors)):
                if not self._answers(k, 2.0):
                    ray.kill(self._actors[k])
                    self._actors[k] = self._new(k)
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise UserError(f"the Ray cluster cannot be reached any more: {_line(error)}", "see `ray status`") from None

    def _name(self, k: int) -> str:
        blocks = self._given[k][2]
        return f"stage {k + 1} (blocks {blocks.start} to {blocks.stop - 1})"

    def close(self) -> None:
        """See `Stages`."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)


def connect(n_cpus: int = 1) -> None:
    """Reach the cluster that RAY_ADDRESS names, or the one that runs on this machine, or begin one of this machine
    alone. Raises UserError where that fails, and for a cluster with fewer CPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not ray.is_initialized():
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if "RAY_ADDRESS" in os.environ:
                hint = "is it right, and `ray start` done there?"
                raise UserError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}: {_line(error)}", hint) from None
            ray.init("local", num_cpus=max(n_cpus, os.cpu_count() or 1), include_dashboard=False, **quiet)
    there = int(ray.cluster_resources().get("CPU", 0))
    if there < n_cpus:
        raise UserError(
            f"the Ray cluster has {there} CPUs, expected at least {n_cpus} for these stages",
            "fewer --stages or --threads, or `ray start` on more machines",
        )


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def n_machines() -> int:
    """Machines of the cluster that are alive."""
    return sum(1 for node in ray.nodes() if node["Alive"])
