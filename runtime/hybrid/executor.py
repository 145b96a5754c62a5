"""What computes a loaded model: its sides, and the schedules over them."""

from __future__ import annotations

import math
import re

from runtime.base import worker
from runtime.base.closing import Closing, Handles
from runtime.base.figures import memory
from runtime.bindings import ggml
from runtime.compute.builder import GraphSpec
from runtime.compute.ffns.neurons import staged_as
from runtime.compute.kv_cache import padded_cells
from runtime.compute.repack import Repacked, repack
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

# By mode: matrices of a block that every token is multiplied with as a whole.
_ALWAYS = r"attn_(q|k|v|output)"
_EVERY_TOKEN_MULTIPLIES = {
    "exact": re.compile(rf"({_ALWAYS})\.weight"),
    "predicted": re.compile(rf"({_ALWAYS}|predictor_in)\.weight"),
    "dense": re.compile(rf"({_ALWAYS}|ffn_(gate|up|down))\.weight"),
}


class Executor(Closing):
    """The sides of one model, and schedules for batches, kept for the next batch of the same shape. To be used on the
    worker.

    weights, backend: the model's own tensors and the CPU's backend; both must outlive it. arrangement: what is on
    devices, None for nothing. Raises UserError where a side's memory, or a device's budget, does not suffice.
    """

    def __init__(
        self,
        weights: Weights,
        backend: ggml.BackendP,
        options: SettledOptions,
        arrangement: Arrangement | None,
        tensor_map: TensorMap,
        trace: Trace | None,
    ) -> None:
        self.map, self.cache = tensor_map, ScheduleCache()
        self._weights, self._backend, self._arrangement = weights, backend, arrangement
        self.device_bytes: tuple[int, ...] = ()  # of all buffers on each device
        with Handles() as handles:
            devices = open_queues(handles, arrangement.devices, options.threads, trace) if arrangement else []
            multiplied = [name for name in weights.tensors if multiplies(tensor_map, name, options.ffn)]
            handles.enter_context(repack(weights, backend, multiplied))
            worker.stop_if_unwanted()
            cells, kv_type = padded_cells(options.n_ctx), options.kv_type_id
            self.sides = Sides(weights, tensor_map, CpuQueue(backend, trace), devices, cells, kv_type)
            handles.enter_context(self.sides)
            worker.stop_if_unwanted()
            handles.enter_context(self.cache)
            self._handles = handles.pop_all()

    def schedule(self, spec: GraphSpec) -> Schedule:
        """The schedule of a spec, made where it is not kept; it stays the executor's, until the next call."""
        return self.cache.get(spec, lambda: self._new(spec, self._scratch_for(spec)))

    def reserve(self, spec: GraphSpec) -> None:
        """Ask devices for the memory of the largest prompt at once, so that nothing has to grow later, and a budget
        that is too small is told now.
        """
        if self.sides.devices:
            self._new(spec, None).close()

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
        whole = self.map.whole_on_cpu
        limits = {i: spec.dense_from[i] for i in whole} if spec.dense_from else {}
        if not any(spec.n_tokens >= limit for limit in limits.values()):
            return None
        dense = [i for i, limit in limits.items() if limit < math.inf]
        names = [(stem, n.weight_of(i, stem)) for i in dense for stem in n.FFN_MATRICES]
        held = {staged_as(stem, t.type): name for stem, name in names if (t := self._weights.get(name))}
        return self.cache.scratch(lambda: Repacked(self._weights, self._backend, held))

    def close(self) -> None:
        """Free everything but the mapped weights, when the devices have ended what they do."""
        self._handles.close()


def multiplies(tensor_map: TensorMap, name: str, ffn: str) -> bool:
    """Whether the CPU multiplies with all of a matrix for every token, in a mode of the FFN."""
    block = n.parsed(name)
    if block is None:
        if name == n.weight(n.TOKEN_EMBD_PROJ):
            return True
        return tensor_map.head == CPU and name in (n.weight(tensor_map.head_stem), n.weight(n.OUTPUT_PROJ))
    i, short = block
    if tensor_map.blocks[i].home != CPU or (short.startswith("ffn") and i not in tensor_map.whole_on_cpu):
        return False
    return _EVERY_TOKEN_MULTIPLIES[ffn].fullmatch(short) is not None
