"""Runs token ids through a model, or through some of its blocks, in this process: owns the weights, the KV cache and
the executor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from runtime.base import worker
from runtime.base.closing import Handles
from runtime.base.memory_left import memory_left
from runtime.base_engine import BaseEngine, Counted, Done, Floats
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.batch import Batch, GraphInputs, Ints
from runtime.compute.builder import GraphSpec
from runtime.compute.counters import LayerCount
from runtime.compute.dense_threshold import dense_from, expected
from runtime.compute.kv_cache import CellTable, cache_bytes, padded_cells
from runtime.compute.paging import PagedStats, Paging
from runtime.compute.recurrent_cells import RecurrentCells
from runtime.compute.threadpool import new_pool
from runtime.compute.trace import Trace
from runtime.compute.weights import Weights
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.executor import Executor
from runtime.hybrid.held_weights import choose_held
from runtime.hybrid.schedule import Schedule
from runtime.hybrid.tensor_map import cpu_alone
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import tensors_of
from runtime.options import SettledOptions


class Engine(BaseEngine):
    """A model ready to compute, or some blocks of it.

    arrangement: what is on devices; None, or nothing: all is computed on the CPU. trace: collects when what was
    computed, and is written at the end. blocks: which, None for all; with the first one there are the embeddings, with
    the last one the head.
    The file's mapping belongs to the engine. All is freed behind what the worker does: by `close`, or when nothing
    refers to the engine any more.
    Raises UserError where memory does not suffice, and after `close`.
    """

    def __init__(
        self,
        file: GgufFile,
        options: SettledOptions,
        arrangement: Arrangement | None = None,
        trace: Trace | None = None,
        blocks: range | None = None,
    ) -> None:
        super().__init__(f"`{file.path}`: the model", file.structure, options, table_for(file.structure, options))
        self._trace, self.blocks = trace, blocks or range(self.structure.block_count)
        self.asked, self.arrangement = arrangement, arrangement if arrangement and arrangement.used else None
        self.map = self.arrangement.tensor_map if self.arrangement else cpu_alone(self.structure, options.predicts)
        activity = expected(file, self._run.ffn, options.predictor_bias)
        self._dense_from = dense_from(self.structure, file.tensors, activity)
        self._paged: PagedStats | None = None
        self._open(lambda handles: self._collect(file, handles))

    def _collect(self, file: GgufFile, handles: Handles) -> None:
        if self.options.by_rows:
            sparse_ffn.library()
        self._backend = self._open_backend(handles)
        names, threads = tensors_of(self.structure, self.blocks), self.options.threads
        self._cache_bytes = cache_bytes(self.structure, self.options, self.blocks)
        choice = choose_held(file, self.map, self.options, self._cache_bytes, memory_left(), names)
        self.memory_note = choice.note
        self._paging = None if self.options.ram_budget is None else handles.enter_context(Paging(file))
        self.weights = handles.enter_context(Weights(file, names, choice.held, threads, self._paging))
        where = (self.arrangement, self.map, self._trace, self.blocks)
        self._executor = handles.enter_context(Executor(self.weights, self._backend, self.options, *where))
        n = min(self.options.n_batch, self.options.n_ctx)
        runs = (n,) if self.structure.mambas else ()
        largest = self._spec(n, padded_cells(self.options.cells), 1, self._run, runs)
        self._executor.reserve(largest)
        if self._paging:
            self._allow(self._paging, self._executor.needed(largest))
            self._paging.load()
            self._paged = self._paging.stats()
        if self._trace:
            handles.enter_context(self._trace)

    def _allow(self, paging: Paging, computing: int) -> None:
        """Leave to rows what the budget has beside all else. computing: bytes of the schedules."""
        paging.allow((self.options.ram_budget or 0) - self.weights.held_bytes - self._cache_bytes - computing)

    @property
    def held_bytes(self) -> int:
        """See `BaseEngine.held_bytes`."""
        return self.weights.held_bytes

    def paged(self) -> PagedStats | None:
        """See `BaseEngine.paged`; up to the last batch that has ended. Does not wait for the worker."""
        return self._paged

    def _note_paged(self, now: PagedStats) -> None:
        if self._trace and self._paged:
            read, seconds = now.read - self._paged.read, now.seconds - self._paged.seconds
            self._trace.count("from the disk", {"MB": read / 1e6, "ms waited": seconds * 1e3})
        self._paged = now

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

    def _computed(self, pieces: Sequence[Batch], run: SettledOptions) -> Iterator[Done]:
        for piece in pieces:
            worker.stop_if_unwanted()
            yield self._through(piece, piece.tokens, run)

    def pass_on(self, batch: Batch, data: Ints | Floats, run: SettledOptions) -> Done:
        """A piece of a batch through the engine's blocks. data: its tokens, or hidden states, float32 [n_tokens,
        n_embd], where the blocks are not the first ones.
        """
        return self._do(lambda: self._through(batch, data, run))

    def _through(self, batch: Batch, data: Ints | Floats, run: SettledOptions) -> Done:
        runs = batch.runs()[0] if self.structure.mambas else ()
        cells = self.cells.take(batch)
        self._move_states()
        # A schedule has a result: where none is wanted, the last token's is not looked at.
        outputs = batch.outputs if len(batch.outputs) else np.array([len(batch) - 1], np.int32)
        spec = self._spec(len(batch), self.cells.n_kv, len(outputs), run, runs, self.cells.logs(batch))
        schedule = self._executor.schedule(spec)
        masks = self.cells.masks(batch, self.structure.windows)
        if self._paging:
            self._allow(self._paging, self._executor.main_bytes)
        result = schedule.run(GraphInputs(data, batch.positions, cells, outputs, masks, self.cells.states))
        if self._paging:
            self._paging.check()
            self._note_paged(self._paging.stats())
        found = result[: len(batch.outputs)] if self._is_last else result
        return Done(found, self._counted(schedule, batch.sequences.tolist(), batch.outputs))

    def _move_states(self) -> None:
        if isinstance(self.cells, RecurrentCells):
            while self.cells.moves:
                self._executor.move_states(self.cells.moves[0])
                self.cells.moves.popleft()  # not before: after an error it is done again

    def _spec(
        self,
        n_tokens: int,
        n_kv: int,
        n_outputs: int,
        run: SettledOptions,
        runs: tuple[int, ...] = (),
        logged: bool = False,
    ) -> GraphSpec:
        return GraphSpec(
            n_tokens,
            n_kv,
            n_outputs,
            run,
            # Whoever wants every position's logits wants to know what this mode computes.
            self._dense_from if n_outputs < n_tokens else (),
            first=self.blocks.start or None,
            end=None if self._is_last else self.blocks.stop,
            runs=runs,
            logged=logged,
        )

    @property
    def _is_last(self) -> bool:
        return self.blocks.stop == self.structure.block_count

    def expert_shares(self) -> list[list[float]]:
        """See `BaseEngine.expert_shares`."""
        used = [b.ffn.experts.used if b.ffn and b.ffn.experts else 0 for b in self.structure.blocks]
        found: list[list[float]] = [[] for _ in used]
        for i, counts in self._executor.choices.items():
            if total := int(counts.sum()):
                found[i] = (counts * (used[i] / total)).tolist()
        return found

    def device_bytes(self) -> tuple[int, ...]:
        """See `BaseEngine.device_bytes`."""
        return self._executor.device_bytes

    def _counted(self, schedule: Schedule, sequences: list[int], outputs: Ints) -> Counted:
        """What each FFN did in the schedule's last run, for the tokens of each sequence. sequences: of each token."""
        counted: Counted = {sequence: {} for sequence in sequences}
        for i in filter(self.blocks.__contains__, self.structure.ffns):
            # A device computes every neuron that it has.
            hot, cold = self.map.on_devices[i], schedule.ffns.get(i, ())
            if not cold and hot < self.structure.blocks[i].n_reached:
                continue  # all neurons, as whole matrices
            seen = sequences
            if cold and len(cold[0].fired) < len(sequences):  # the last block: tokens whose logits are wanted
                seen = [sequences[k] for k in outputs.tolist()]
            if len(seen) == 1 and len(cold) == 1:  # a token that is decoded: the same as below, in less time
                (ffn,), (one,) = cold, seen
                n = self._on_devices(i, schedule, 1, ffn.gates.item(0))
                counted[one][i] = LayerCount(ffn.fired.item(0) + n, ffn.gates.item(0) + n, 1)
                continue
            # Lists: for the few numbers of a token, numpy's sum takes longer.
            fired, gates = ([ffn.fired.tolist() for ffn in cold], [ffn.gates.tolist() for ffn in cold])
            for sequence, layers in counted.items():
                rows = range(len(seen)) if len(counted) == 1 else [k for k, s in enumerate(seen) if s == sequence]
                scanned = sum(one[k] for one in gates for k in rows)
                n = self._on_devices(i, schedule, len(rows), scanned)
                layers[i] = LayerCount(sum(one[k] for one in fired for k in rows) + n, scanned + n, len(rows))
        return counted

    def _on_devices(self, i: int, schedule: Schedule, n_tokens: int, scanned: int) -> int:
        """Neurons of layer `i` that devices computed for so many tokens. scanned: gate rows that the CPU read."""
        hot = self.map.on_devices[i] * n_tokens
        if not self.map.blocks[i].of_some_experts:
            return hot
        # More for one token than for another: all that the CPU has not read, and where a predictor chose, at most so
        # many as there are on average.
        rest = self.structure.blocks[i].n_reached * n_tokens - scanned
        return min(hot, rest) if schedule.spec.run.chooses and self.structure.rank(i) else rest


def table_for(s: Structure, options: SettledOptions) -> CellTable:
    """A table of the cells of a model, all free."""
    kept = (options.kept_sequences, options.kept_states, options.logged)
    return RecurrentCells(options.cells, *kept) if s.mambas else CellTable(options.cells)
