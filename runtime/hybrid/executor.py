"""What computes a loaded model: its sides, and the schedules over them."""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from runtime.base import worker
from runtime.base.closing import Closing, Handles
from runtime.base.figures import memory
from runtime.bindings import ggml
from runtime.compute.batch import GraphInputs
from runtime.compute.builder import GraphSpec, place_of
from runtime.compute.kv_cache import padded_cells
from runtime.compute.products import repacked_from, tiles_of
from runtime.compute.repack import Repacked, repack
from runtime.compute.states import Move
from runtime.compute.trace import Trace
from runtime.compute.weights import Weights
from runtime.errors import UserError
from runtime.hybrid.choose import Arrangement
from runtime.hybrid.queues import CpuQueue, open_queues
from runtime.hybrid.schedule import Schedule
from runtime.hybrid.schedule_builder import build
from runtime.hybrid.schedule_cache import ScheduleCache
from runtime.hybrid.sides import Sides
from runtime.hybrid.tensor_map import CPU, TensorMap
from runtime.model_file import tensor_names as n
from runtime.options import SettledOptions

# Matrices of a block that every token is multiplied with as a whole.
_MULTIPLIED = re.compile(r"(attn_(q|k|v|output)|ssm_(in|out)|ffn_(gate|up|down)(_shexp)?|ffn_latent_(down|up))\.weight")
_AT_HOME = (*n.SHARED_MATRICES, *n.LATENTS)  # of an FFN, what is computed where the block is at home


class Executor(Closing):
    """The sides of one model, and schedules for batches, kept for the next batch of the same shape. To be used on the
    worker.

    weights, backend: the model's own tensors and the CPU's backend; both must outlive it. arrangement: what is on
    devices, None for nothing. blocks: those that are computed, None for all. Raises UserError where a side's memory, or
    a device's budget, does not suffice.
    """

    def __init__(
        self,
        weights: Weights,
        backend: ggml.BackendP,
        options: SettledOptions,
        arrangement: Arrangement | None,
        tensor_map: TensorMap,
        trace: Trace | None,
        blocks: range | None = None,
    ) -> None:
        self.map, self.cache, self._options = tensor_map, ScheduleCache(), options
        self._weights, self._backend, self._arrangement = weights, backend, arrangement
        self.device_bytes: tuple[int, ...] = ()  # of all buffers on each device
        with Handles() as handles:
            devices = open_queues(handles, arrangement.devices, options.threads, trace) if arrangement else []
            if not options.by_rows:
                multiplied = [name for name in weights.tensors if multiplies(tensor_map, name)]
                handles.enter_context(repack(weights, backend, multiplied))
            worker.stop_if_unwanted()
            cells, kv_type = padded_cells(options.cells), options.kv_type_id
            cpu, kept = CpuQueue(backend, trace), (blocks, options.kept_states, options.logged)
            self.sides = Sides(weights, tensor_map, cpu, devices, cells, kv_type, *kept)
            handles.enter_context(self.sides)
            worker.stop_if_unwanted()
            handles.enter_context(self.cache)
            self._handles = handles.pop_all()

    @property
    def choices(self) -> dict[int, npt.NDArray[np.int64]]:
        """By block with experts, how many tokens chose each: see `Sides.choices`."""
        return self.sides.choices

    def schedule(self, spec: GraphSpec) -> Schedule:
        """The schedule of a spec, made where it is not kept; it stays the executor's, until the next call."""
        return self.cache.get(spec, lambda: self._new(spec, self._scratch_for(spec)))

    def move_states(self, move: Move) -> None:
        """Do to the states of Mamba blocks what was asked for, on all sides."""
        if move.kind == "begin":
            self.sides.begin(move.row)
        elif move.kind == "copy":
            self.sides.copy_states(move.source, move.row)
        else:
            self._replay(move)

    def _replay(self, move: Move) -> None:
        n = move.length
        spec = GraphSpec(n, padded_cells(1), n, self._options, runs=(n,), replays=True)
        schedule = self.schedule(spec)
        zeros, rows = np.zeros(n, np.int32), tuple(np.array([row], np.int32) for row in (move.source, move.row))
        masks = tuple(np.zeros((n, spec.n_kv), np.float16) for _ in self.map.structure.windows)
        schedule.run(GraphInputs(zeros, zeros, zeros.astype(np.int64), zeros, masks, rows))

    def reserve(self, spec: GraphSpec) -> None:
        """Ask devices for the memory of the largest prompt at once, so that nothing has to grow later, and a budget
        that is too small is told now.
        """
        if self.sides.devices:
            self._new(spec, None).close()

    def needed(self, spec: GraphSpec) -> int:
        """Bytes of main memory that a schedule computes in, with what is repacked for it; on the CPU alone."""
        scratch = self._scratch_for(spec)
        with self._new(spec, scratch) as schedule:
            return schedule.nbytes + (scratch.nbytes if scratch else 0)

    @property
    def main_bytes(self) -> int:
        """Bytes of main memory that the schedules of now compute in; on the CPU alone."""
        return self.cache.nbytes

    def _new(self, spec: GraphSpec, scratch: Repacked | None) -> Schedule:
        before = self.sides.growths
        with Handles() as handles:
            try:
                schedule = handles.enter_context(build(spec, self.sides, scratch))
            finally:
                self.device_bytes = self.sides.device_bytes
                if self.sides.growths != before:
                    self.cache.lost()
            self._check_budget(spec)
            handles.pop_all()
        return schedule

    def _check_budget(self, spec: GraphSpec) -> None:
        a = self._arrangement
        if a is None:
            return
        for device, budget, used in zip(a.devices, a.budgets, self.device_bytes, strict=True):
            if used + a.scratch > budget:
                raise UserError(
                    f"device {device.name}: {spec.n_tokens} tokens at once need {memory(used + a.scratch)}, "
                    f"expected at most {memory(budget)}",
                    "allow more with --vram-budget, or shorten --n-ctx",
                )

    def _scratch_for(self, spec: GraphSpec) -> Repacked | None:
        """Where a block's matrices are repacked for a batch; one for all schedules, and None where nothing is computed
        that way.
        """
        if spec.run.ffn == "dense":
            return None
        limits = self._attention_limits()
        if spec.dense_from:
            matrices = n.Stems().matrices
            for i in self.map.whole_on_cpu:
                limits |= dict.fromkeys((n.weight_of(i, stem) for stem in matrices), spec.dense_from[i])
        if not any(spec.n_tokens >= limit for limit in limits.values()):
            return None
        found = {name: t for name, limit in limits.items() if limit < math.inf and (t := self._weights.get(name))}
        places = {place_of(name, tensor): name for name, tensor in found.items() if tiles_of(tensor) is None}
        return self.cache.scratch(lambda: Repacked(self._weights, self._backend, places))

    def _attention_limits(self) -> dict[str, float]:
        """From how many tokens at once on each of the attention's matrices on the CPU is repacked for a batch."""
        names = (
            n.weight_of(i, stem) for i in self.map.homes(CPU) for stem in (*n.ATTENTION_MATRICES, *n.MAMBA_MATRICES)
        )
        return {name: repacked_from(tensor) for name in names if (tensor := self._weights.get(name))}

    def close(self) -> None:
        """Free everything but the mapped weights, when the devices have ended what they do."""
        self._handles.close()


def multiplies(tensor_map: TensorMap, name: str) -> bool:
    """Whether the CPU multiplies with all of a matrix for every token, in `dense` mode."""
    block = n.parsed(name)
    if block is None:
        if name == n.weight(n.TOKEN_EMBD_PROJ):
            return True
        return tensor_map.head == CPU and name in (n.weight(tensor_map.head_stem), n.weight(n.OUTPUT_PROJ))
    i, short = block
    divided = short.startswith("ffn") and short not in _AT_HOME and i not in tensor_map.whole_on_cpu
    if tensor_map.blocks[i].home != CPU or divided:
        return False
    return _MULTIPLIED.fullmatch(short) is not None
