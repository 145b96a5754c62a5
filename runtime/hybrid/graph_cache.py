"""The graphs that an engine keeps for the next batch of the same shape, and the memory that only prompts need.

Knows when a graph goes; knows nothing of how it is made.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from runtime.base.closing import Closing
from runtime.compute.builder import GraphSpec
from runtime.compute.graph import Graph
from runtime.compute.repack import Repacked
from runtime.hybrid.schedule import SplitGraph

_KEPT = 4


class GraphCache(Closing):
    """Graphs by what distinguishes them. To be used on the worker."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[GraphSpec, Graph | SplitGraph] = OrderedDict()
        self._scratch: Repacked | None = None

    def get(self, spec: GraphSpec, make: Callable[[], Graph | SplitGraph]) -> Graph | SplitGraph:
        """The graph of `spec`, made where it is not kept."""
        if spec.n_tokens == 1:
            # Prompts seldom have the same length twice, and what their graphs hold is large.
            self._drop(lambda kept: kept.n_tokens > 1)
        if spec in self._graphs:
            self._graphs.move_to_end(spec)
        else:
            if len(self._graphs) >= _KEPT:
                self._drop(next(iter(self._graphs)).__eq__)
            self._graphs[spec] = make()
        return self._graphs[spec]

    def scratch(self, make: Callable[[], Repacked]) -> Repacked:
        """Where a block's matrices are repacked for a batch: one for all graphs, and no longer than any of them uses it."""
        if self._scratch is None:
            self._scratch = make()
        return self._scratch

    def lost(self) -> None:
        """Free all graphs, since they have lost their memory. The scratch memory stays: the graph that is being made may use it."""
        self._free(lambda _: True)

    def close(self) -> None:
        """Free all graphs, and the scratch memory."""
        self._drop(lambda _: True)

    def _free(self, which: Callable[[GraphSpec], bool]) -> None:
        for spec in filter(which, list(self._graphs)):
            self._graphs.pop(spec).close()

    def _drop(self, which: Callable[[GraphSpec], bool]) -> None:
        self._free(which)
        if self._scratch and not any(graph.scratch for graph in self._graphs.values()):
            self._scratch.close()
            self._scratch = None
