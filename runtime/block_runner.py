"""A model run block by block: what calibration looks at, in memory that does not grow with the number of blocks.

Each sequence is computed on its own, from position 0.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Handles
from runtime.base.phases import phase
from runtime.base.worker import OfWorker
from runtime.bindings import ggml
from runtime.bindings.rows import to_floats
from runtime.compute.batch import Batch, GraphInputs
from runtime.compute.builder import GraphSpec
from runtime.compute.kv_cache import CellTable, padded_cells
from runtime.compute.products import tiles_of
from runtime.compute.repack import Repacked, repack
from runtime.compute.weights import Weights
from runtime.errors import UserError
from runtime.hybrid.executor import multiplies
from runtime.hybrid.queues import CpuQueue
from runtime.hybrid.schedule import Schedule, read
from runtime.hybrid.schedule_builder import build
from runtime.hybrid.sides import Sides
from runtime.hybrid.tensor_map import TensorMap, cpu_alone
from runtime.model_file import tensor_names as n
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import Structure
from runtime.model_file.tensor_shapes import required_tensors
from runtime.options import SettledOptions

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockResult:
    """One block over one sequence, each float32 [n_tokens, n_embd] where nothing else is said."""

    output: Floats  # hidden states after the block
    ffn_input: Floats  # what gate and up rows are multiplied with
    residual: Floats  # the stream before the norm whose result the FFN reads
    # What the gate and up rows say of each neuron, biases included, float32 [n_tokens, n_ff]; where there are experts,
    # [n_tokens x used, expert_length], of those that each token uses in turn. Overwritten when the next sequence is
    # computed. None where there is no gate, or where only those that fire are computed.
    gate: Floats | None
    up: Floats | None
    # Where there are experts, those that each token uses, and what their results are multiplied with: int32 and
    # float32 [n_tokens, used].
    experts: npt.NDArray[np.int32] | None = None
    expert_weights: Floats | None = None
    # What the rows of a shared expert say that decide whether its neurons fire, float32 [n_tokens, n]; None where there
    # is none, or where only those that fire are computed.
    shared: Floats | None = None


class BlockRunner(OfWorker):
    """Runs single blocks of a model file; use it in a `with` statement.

    max_tokens: the longest sequence. The FFN is computed in `dense` mode where the file allows, else `exact`. A block's
    matrices are repacked when its first sequence comes, and let go of, as its pages of the file, when another block's
    does: so many sequences should be run through a block before the next.
    """

    def __init__(self, file: GgufFile, threads: int, max_tokens: int) -> None:
        super().__init__(f"`{file.path}`: the model")
        self.structure: Structure = file.structure
        if max_tokens > self.structure.context_length:
            raise UserError(
                f"`{file.path}`: sequences of {max_tokens} tokens, expected at most {self.structure.context_length}"
            )
        self._file = file
        self._schedule: Schedule | None = None
        self._held: int | None = None  # the block whose matrices are repacked, or whose pages are read
        self._copies: Repacked | None = None
        self._n_cells = padded_cells(max_tokens)
        ffn = "dense" if self.structure.layout == "both" else "exact"
        self._run = SettledOptions(ffn=ffn, threads=threads, n_ctx=max_tokens, kv_type="f32")
        self._open(self._collect)

    def _collect(self, handles: Handles) -> None:
        s = self.structure
        self._backend = handles.add(ggml.ggml_backend_cpu_init(), ggml.ggml_backend_free)
        ggml.ggml_backend_cpu_set_n_threads(self._backend, self._run.threads)
        self._weights = handles.enter_context(Weights(self._file, required_tensors(s)))

    def embed(self, ids: npt.NDArray[np.int32]) -> Floats:
        """Hidden states before block 0: float32 [len(ids), n_embd]."""
        return self._do(lambda: self._part(len(ids), None, 0).run(self._inputs(ids)))

    def block(self, i: int, hidden: Floats) -> BlockResult:
        """Block `i`, which has an FFN, over one whole sequence of hidden states [n_tokens, n_embd]."""

        def compute() -> BlockResult:
            output, schedule = self._computed(i, hidden)
            taps = schedule.taps
            gate, up = (_viewed(taps[role]) if role in taps else None for role in ("gate", "up"))
            found = BlockResult(output, read(taps["ffn_input"]), read(taps["residual"]), gate, up)
            if "experts" not in taps:
                return found
            ids, weights = read(taps["experts"]).view(np.int32), read(taps["weights of experts"])
            shared = read(taps["shared"]) if "shared" in taps else None
            return replace(found, experts=ids, expert_weights=weights, shared=shared)

        return self._do(compute)

    def output(self, i: int, hidden: Floats) -> Floats:
        """The hidden states after block `i`, of any kind."""
        return self._do(lambda: self._computed(i, hidden)[0])

    def _computed(self, i: int, hidden: Floats) -> tuple[Floats, Schedule]:
        with phase("blocks"):
            schedule = self._part(len(hidden), i, i + 1)
            self._sides.begin(0)
            return schedule.run(self._inputs(np.ascontiguousarray(hidden, np.float32))), schedule

    def _inputs(self, data: npt.NDArray[np.int32] | Floats) -> GraphInputs:
        """A whole sequence, by its ids or its hidden states, in a cache that held nothing."""
        n, table = len(data), CellTable(len(data))
        batch = Batch.of([0] * n, outputs=range(n))
        cells = table.take(batch)
        masks = table.masks(batch, self.structure.windows)
        row = np.zeros(1, np.int32)
        states = (row, row) if self.structure.mambas else ()
        return GraphInputs(data, batch.positions, cells, batch.outputs, masks, states)

    def _part(self, n_tokens: int, first: int | None, end: int) -> Schedule:
        """The schedule of blocks `first` .. end - 1, or of the embeddings."""
        shape = (n_tokens, padded_cells(n_tokens), n_tokens)
        runs = (n_tokens,) if self.structure.mambas else ()
        spec = GraphSpec(*shape, self._run, first=first, end=end, tapped=True, tiled=True, runs=runs)
        if self._schedule is None or self._schedule.spec != spec:
            self._close_schedule()
            whole, cpu = cpu_alone(self.structure, False), CpuQueue(self._backend, None)
            self._hold(first, whole)
            with Handles() as handles:
                # Keys and values of these blocks alone.
                sides = Sides(
                    self._weights, whole, cpu, [], self._n_cells, self._run.kv_type_id, range(first or 0, end)
                )
                self._sides = handles.enter_context(sides)
                self._schedule = handles.enter_context(build(spec, sides))
                self._schedule_handles = handles.pop_all()
        return self._schedule

    def _close_schedule(self) -> None:
        if self._schedule is not None:
            self._schedule_handles.close()
            self._schedule = None

    def _hold(self, i: int | None, tensor_map: TensorMap) -> None:
        """Let block `i` be the one whose matrices are repacked, None for no block."""
        if i == self._held:
            return
        self._let_go()
        if i is None:
            return
        if self._run.ffn == "dense":
            every = (name for name in self._of_block(i) if multiplies(tensor_map, name))
            self._copies = repack(
                self._weights, self._backend, [name for name in every if tiles_of(self._weights[name]) is None]
            )
        self._held = i

    def _of_block(self, i: int) -> list[str]:
        return [name for name in self._weights.tensors if (block := n.parsed(name)) and block[0] == i]

    def _let_go(self) -> None:
        """Free the repacked matrices, and the pages of the block's file that were read."""
        if self._held is None:
            return
        self._weights.copies = {}
        if self._copies:
            self._copies.close()
            self._copies = None
        for name in self._of_block(self._held):
            self._weights.release(name)
        self._held = None

    def rows(self, name: str, first: int, end: int) -> Floats:
        """Rows first .. end - 1 of a matrix, e.g. "blk.3.ffn_gate.weight", or of those of all experts, as float32
        [end - first, ne0].
        """
        n_rows = math.prod(self._file.tensors[name].ne[1:])
        return self._do(lambda: dequantize(self._weights[name], first, min(end, n_rows)))

    def vector(self, name: str) -> Floats | None:
        """A bias or norm, float32, or None where the file has none of that name."""
        if name not in self._file.tensors:
            return None
        return self._file.read(name).view(np.float32)

    def _free(self) -> None:
        self._close_schedule()
        self._let_go()
        super()._free()


def _viewed(tensor: ggml.TensorP) -> Floats:
    """An F32 matrix in host memory where it lies, [ne1, ne0]."""
    n_rows, n_columns = tensor.ne[1], tensor.ne[0]
    numbers = (ctypes.c_float * (n_rows * n_columns)).from_address(tensor.data)
    floats: Floats = np.ctypeslib.as_array(numbers).reshape(n_rows, n_columns)
    return floats


def dequantize(tensor: ggml.TensorP, first: int, end: int) -> Floats:
    """Rows first .. end - 1 of a matrix of any type in host memory, as float32 [end - first, ne0]."""
    out = np.empty((end - first, tensor.ne[0]), np.float32)
    row, step = ggml.ggml_row_size(tensor.type, tensor.ne[0]), tensor.nb[1]
    address = tensor.data + first * step
    if step != row:  # rows of others lie between them
        stored = np.ctypeslib.as_array((ctypes.c_uint8 * ((end - first - 1) * step + row)).from_address(address))
        rows = np.lib.stride_tricks.as_strided(stored, (end - first, row), (step, 1)).copy()
        address = rows.ctypes.data
    to_floats(address, tensor.type, out)
    return out
