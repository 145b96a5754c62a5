"""The schedules that are kept for the next batch of the same shape, and the memory that only prompts need."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from runtime.base.closing import Closing
from runtime.bindings.sparse_ffn import FEW_TOKENS
from runtime.compute.builder import GraphSpec
from runtime.compute.repack import Repacked
from runtime.hybrid.schedule import Schedule

_KEPT = {"few": 24, "prompt": 6, "replay": FEW_TOKENS}  # of up to FEW_TOKENS tokens; of more; of states alone
_KEEPABLE = 128  # tokens: what a schedule of more holds is large, and prompts seldom have the same length twice


class ScheduleCache(Closing):
    """Schedules by what distinguishes them. To be used on the worker."""

    def __init__(self) -> None:
        self._schedules: OrderedDict[GraphSpec, Schedule] = OrderedDict()
        self._scratch: Repacked | None = None

    def get(self, spec: GraphSpec, make: Callable[[], Schedule]) -> Schedule:
        """The schedule of `spec`, made where it is not kept."""
        if not _is_large(spec):
            self._drop(lambda other: other.n_tokens > _KEEPABLE or self._schedules[other].scratch is not None)
        kept = self._schedules.get(spec)
        if kept:
            self._schedules.move_to_end(spec)
            return kept
        like = [other for other in self._schedules if _kind(other) == _kind(spec)]
        if len(like) >= _KEPT[_kind(spec)]:
            self._drop(like[0].__eq__)
        made = self._schedules[spec] = make()
        return made

    def scratch(self, make: Callable[[], Repacked]) -> Repacked:
        """Where a block's matrices are repacked for a batch: one for all schedules, and no longer than any of them uses
        it.
        """
        if self._scratch is None:
            self._scratch = make()
        return self._scratch

    @property
    def nbytes(self) -> int:
        """Bytes of memory, where no schedules share theirs."""
        return sum(s.nbytes for s in self._schedules.values()) + (self._scratch.nbytes if self._scratch else 0)

    def lost(self) -> None:
        """Free all schedules, since they have lost their memory. The scratch memory stays: the one that is being made
        may use it.
        """
        self._free(lambda _: True)

    def close(self) -> None:
        """Free all schedules, and the scratch memory."""
        self._drop(lambda _: True)

    def _free(self, which: Callable[[GraphSpec], bool]) -> None:
        for spec in filter(which, list(self._schedules)):
            self._schedules.pop(spec).close()

    def _drop(self, which: Callable[[GraphSpec], bool]) -> None:
        self._free(which)
        if self._scratch and not any(schedule.scratch for schedule in self._schedules.values()):
            self._scratch.close()
            self._scratch = None


def _is_large(spec: GraphSpec) -> bool:
    return spec.n_tokens > FEW_TOKENS


def _kind(spec: GraphSpec) -> str:
    return "replay" if spec.replays else "prompt" if _is_large(spec) else "few"
