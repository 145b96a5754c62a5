"""Runs token ids through a model: owns the weights, the KV cache and the graphs, and does all work with them on the worker.

Knows ids and logits; knows nothing of text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from runtime.base import worker
from runtime.base.closing import Handles
from runtime.base.worker import OfWorker
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.batch import Batch, GraphInputs
from runtime.compute.builder import GraphSpec
from runtime.compute.counters import Counters, LayerCount
from runtime.compute.dense_threshold import dense_from, expected
from runtime.compute.ffns.neurons import staged_as
from runtime.compute.graph import Graph
from runtime.compute.kv_cache import CellTable, KvCache, padded_cells
from runtime.compute.repack import Repacked, gains, repack
from runtime.compute.threadpool import new_pool
from runtime.compute.trace import Trace
from runtime.compute.traffic import kv_bytes
from runtime.compute.weights import Weights
from runtime.errors import UserError
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.costs import LOGITS
from runtime.hybrid.device_memory import Hybrid
from runtime.hybrid.device_queue import open_streams
from runtime.hybrid.graph_cache import GraphCache
from runtime.hybrid.schedule import SplitGraph
from runtime.model_file.reader import GgufFile
from runtime.model_file.tensor_names import FFN_MATRICES, weight_of
from runtime.model_file.tensor_shapes import required_tensors
from runtime.options import SettledOptions

T = TypeVar("T")

# By mode: matrices that every token is multiplied with as a whole, beside the head.
_BLOCK = re.compile(r"blk\.(\d+)\.")
_ALWAYS = r"attn_(q|k|v|output)|token_embd_proj"
_EVERY_TOKEN_MULTIPLIES = {
    "exact": re.compile(rf"\b({_ALWAYS})\.weight$"),
    "predicted": re.compile(rf"\b({_ALWAYS}|predictor_in)\.weight$"),
    "dense": re.compile(rf"\b({_ALWAYS}|ffn_(gate|up|down))\.weight$"),
}


class Engine(OfWorker):
    """A model ready to compute. Its methods do their work on the worker, one after the other, whichever threads call them.

    arrangement: what is on devices; None, or nothing: all is computed on the CPU. trace: collects when what was computed, and is written at the end.
    The file's mapping belongs to the engine. All is freed behind what the worker does: by `close`, or when nothing refers to the engine any more.
    Raises UserError where memory does not suffice, and after `close`.
    """

    def __init__(
        self,
        file: GgufFile,
        options: SettledOptions,
        arrangement: Arrangement | None = None,
        trace: Trace | None = None,
    ) -> None:
        super().__init__(f"`{file.path}`: the model")
        self.structure, self.options, self._trace = file.structure, options, trace
        self.asked, self.arrangement = arrangement, arrangement if arrangement and arrangement.used else None
        self.resident_from = self.arrangement.residence.first if self.arrangement else self.structure.block_count
        self._graphs = GraphCache()
        self._hybrid: Hybrid | None = None
        self._device_bytes: tuple[int, ...] = ()
        self.cells = CellTable(options.n_ctx)
        self.counters = Counters(self.structure, options.ffn)  # of all that is computed
        activity = expected(file, options.ffn, options.predictor_bias)
        self._dense_from = dense_from(self.structure, file.tensors, activity, gains)
        self._open(lambda handles: self._collect(file, handles))

    def _collect(self, file: GgufFile, handles: Handles) -> None:
        if self.options.ffn != "dense":
            sparse_ffn.library()
        self._backend = self._open_backend(handles)
        self.weights = handles.enter_context(Weights(file, required_tensors(self.structure)))
        self._allocate(handles)
        handles.enter_context(self._graphs)
        if self._hybrid:
            self._reserve(self._hybrid)
        if self._trace:
            handles.enter_context(self._trace)

    def _open_backend(self, handles: Handles) -> ggml.BackendP:
        o = self.options
        pool = new_pool(o.team)
        if pool:
            handles.add(pool, ggml.ggml_threadpool_free)
        backend = handles.add(ggml.ggml_backend_cpu_init(), ggml.ggml_backend_free)
        ggml.ggml_backend_cpu_set_n_threads(backend, o.threads)
        if pool:
            ggml.ggml_backend_cpu_set_threadpool(backend, pool)
        return backend

    def _allocate(self, handles: Handles) -> None:
        s = self.structure
        n_cells, kv_type = padded_cells(self.options.n_ctx), self.options.kv_type_id
        if self.arrangement:
            streams = open_streams(handles, self.arrangement.devices, self.options.threads, self._trace)
            hybrid = Hybrid(self.weights, self.arrangement.residence, streams, n_cells, kv_type)
            self._hybrid = handles.enter_context(hybrid)
        worker.stop_if_unwanted()
        multiplied = [name for name in self.weights.tensors if self._every_token_multiplies(name)]
        handles.enter_context(repack(self.weights, self._backend, multiplied))
        worker.stop_if_unwanted()
        lengths = {i: a.kv_length for i, a in s.attentions.items() if i < self.resident_from}
        self.kv = handles.enter_context(KvCache(self._backend, kv_type, lengths, n_cells))

    def _every_token_multiplies(self, name: str) -> bool:
        """Whether the CPU multiplies with all of a matrix for every token."""
        s = self.structure
        if name == ("token_embd.weight" if s.tied_output else "output.weight") or name.startswith("output_proj"):
            return not (self.arrangement and self.arrangement.residence.placement.head)
        block = _BLOCK.match(name)
        if block and int(block[1]) >= self.resident_from:
            return False
        return _EVERY_TOKEN_MULTIPLIES[self.options.ffn].search(name) is not None

    def exclusively(self, work: Callable[[], T]) -> T:
        """Run something on the worker, where nothing else is computed meanwhile, and return what it returns."""
        return self._do(work)

    def compute(self, batch: Batch, counters: Counters | None = None) -> npt.NDArray[np.float32]:
        """Logits of the tokens that `batch.outputs` names: float32 [n_outputs, n_vocab]. All tokens are in the cache afterwards.

        A batch of more than n_batch tokens is computed in pieces. counters: what the FFNs did is added to them.
        After an error the cache holds what it held before. Raises UserError where it is full, and ValueError for tokens
        that do not continue their sequences.
        """
        return self._do(lambda: self._compute(batch, counters))

    def _compute(self, batch: Batch, counters: Counters | None) -> npt.NDArray[np.float32]:
        before = self.cells.snapshot()
        try:
            step = self.options.n_batch
            if self.arrangement and len(batch.outputs) > LOGITS:  # more than a device has room for
                step = min(step, LOGITS)
            parts = []
            for first in range(0, len(batch), step):
                worker.stop_if_unwanted()
                parts.append(self._piece(batch.part(first, first + step), counters))
        except BaseException:
            self.cells.restore(before)
            raise
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _piece(self, batch: Batch, counters: Counters | None) -> npt.NDArray[np.float32]:
        cells = self.cells.take(batch)
        # A graph has an output: where none is wanted, the last token's is not looked at.
        outputs = batch.outputs if len(batch.outputs) else np.array([len(batch) - 1], np.int32)
        graph = self._graph(len(batch), padded_cells(self.cells.end), len(outputs))
        masks = self.cells.masks(batch, graph.spec.n_kv, self.structure.windows)
        logits = graph.run(GraphInputs(batch.tokens, batch.positions, cells, outputs, masks))
        counted = self._counted(graph)
        for each in (self.counters, counters):
            if each:
                each.add(counted)
        return logits[: len(batch.outputs)]

    def _graph(self, n_tokens: int, n_kv: int, n_outputs: int) -> Graph | SplitGraph:
        spec = GraphSpec(
            n_tokens,
            n_kv,
            n_outputs,
            self.options.ffn,
            self.options.threads,
            self.options.flash_attention,
            self.options.predictor_bias,
            # Whoever wants every position's logits wants to know what this mode computes.
            self._dense_from if n_outputs < n_tokens else (),
        )
        return self._graphs.get(spec, lambda: self._new_graph(spec))

    def _new_graph(self, spec: GraphSpec) -> Graph | SplitGraph:
        scratch = self._scratch_for(spec)
        if not self._hybrid:
            return Graph(spec, self.structure, self.weights, self.kv, self._backend, scratch)
        return self._split_graph(self._hybrid, spec, scratch)

    def _split_graph(self, hybrid: Hybrid, spec: GraphSpec, scratch: Repacked | None) -> SplitGraph:
        before = hybrid.growths
        with Handles() as handles:
            try:
                graph = handles.enter_context(SplitGraph(spec, hybrid, self._backend, self.kv, scratch))
            finally:
                self._device_bytes = hybrid.sizes
                if hybrid.growths != before:
                    self._graphs.lost()
            self._check_budget(spec)
            handles.pop_all()
        return graph

    def _reserve(self, hybrid: Hybrid) -> None:
        """Ask for the memory of the largest prompt at once, so that nothing has to grow later, and a budget that is too small is told now."""
        n = min(self.options.n_batch, self.options.n_ctx)
        spec = GraphSpec(
            n, padded_cells(self.options.n_ctx), 1, self.options.ffn, self.options.threads, self.options.flash_attention
        )
        self._split_graph(hybrid, spec, None).close()

    def device_bytes(self) -> tuple[int, ...]:
        """Bytes of all buffers on each device: weights, keys and values, hidden states, compute buffers."""
        return self._device_bytes

    def kv_bytes(self, n_positions: float) -> float:
        """Bytes of keys and values at so many positions, all layers."""
        return kv_bytes(self.structure, n_positions, ggml.ggml_row_size(self.options.kv_type_id, 1))

    def _check_budget(self, spec: GraphSpec) -> None:
        assert self.arrangement
        a = self.arrangement
        for device, budget, used in zip(a.devices, a.budgets, self.device_bytes(), strict=True):
            if used + a.scratch > budget:
                raise UserError(
                    f"device {device.name}: {spec.n_tokens} tokens at once need {(used + a.scratch) / 2**20:.1f} MiB, expected at most {budget / 2**20:.1f}",
                    "allow more with --vram-budget, or shorten --n-ctx",
                )

    def _scratch_for(self, spec: GraphSpec) -> Repacked | None:
        """Where a block's matrices are repacked for a batch; one for all graphs, and None where nothing is computed that way."""
        if not any(spec.n_tokens >= n for n in spec.dense_from[: self.resident_from]):
            return None
        dense = [i for i, n in enumerate(spec.dense_from[: self.resident_from]) if n < math.inf]
        names = [(stem, weight_of(i, stem)) for i in dense for stem in FFN_MATRICES]
        held = {staged_as(stem, t.type): name for stem, name in names if (t := self.weights.get(name))}
        return self._graphs.scratch(lambda: Repacked(self.weights, self._backend, held))

    def _counted(self, graph: Graph | SplitGraph) -> dict[int, LayerCount]:
        """What each FFN did in the graph's last run."""
        counted = {}
        for i, shape in self.structure.ffns.items():
            # A device computes every neuron that it has.
            hot = self.arrangement.residence.hot(i) if self.arrangement else 0
            ffn = graph.ffns.get(i)
            seen = len(ffn.fired) if ffn else (graph.spec.n_tokens if hot == shape.n_ff else 0)
            fired, gates = (int(ffn.fired.sum()), int(ffn.gates.sum())) if ffn else (0, 0)
            counted[i] = LayerCount(fired + hot * seen, gates + hot * seen, seen)
        return counted
