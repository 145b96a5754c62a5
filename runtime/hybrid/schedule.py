"""A batch of tokens through a model, as a schedule: steps over the sides that hold it. The CPU alone is one step.

How a schedule is built is in runtime/hybrid/schedule_builder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml, sparse_ffn
from runtime.compute.batch import GraphInputs
from runtime.compute.builder import GraphSpec
from runtime.compute.operators import Userdata
from runtime.compute.repack import Repacked
from runtime.compute.trace import Trace
from runtime.hybrid.queues import Mark, Queue
from runtime.hybrid.subgraphs import Subgraph


class Step(Protocol):
    """Something to do, or to let a side do."""

    def run(self) -> None:
        """Do it. Raises UserError where ggml fails."""
        ...


@dataclass(frozen=True)
class Compute:
    """Compute a subgraph on a side."""

    queue: Queue
    subgraph: Subgraph

    def run(self) -> None:
        """Queue it; the CPU computes it now."""
        self.queue.compute(self.subgraph.graph, self.subgraph.name)


@dataclass(frozen=True)
class InOneOrder:
    """Let the CPU's attention add up in the same order for any batch and any number of cells, or in the fastest one.

    ggml else divides the cells of a single query among threads, and takes many queries in tiles.
    """

    queue: Queue
    wanted: bool

    def run(self) -> None:
        """Set it, for what is computed from here on."""
        ggml.ggml_backend_cpu_set_use_ref(self.queue.backend, self.wanted)


@dataclass(frozen=True)
class Upload:
    """Copy a tensor from main memory to a device."""

    queue: Queue
    source: ggml.TensorP
    target: ggml.TensorP

    def run(self) -> None:
        """Queue it."""
        self.queue.upload(self.target, self.source)


@dataclass(frozen=True)
class Download:
    """Copy a tensor from a device to main memory."""

    queue: Queue
    source: ggml.TensorP
    target: ggml.TensorP

    def run(self) -> None:
        """Queue it."""
        self.queue.download(self.source, self.target)


@dataclass
class SetMark:
    """Mark what a device has queued so far."""

    queue: Queue
    mark: Mark | None = None

    def run(self) -> None:
        """Set the mark, which the device may begin to work towards."""
        self.mark = self.queue.mark()


@dataclass(frozen=True)
class Wait:
    """Wait for a mark."""

    of: SetMark

    def run(self) -> None:
        """Wait until all before the mark is done."""
        assert self.of.mark
        self.of.mark.wait()


@dataclass
class Schedule(Closing):
    """A built schedule. Call `run` from the thread that owns ggml; `close` frees it.

    inputs: tensors in main memory that `run` fills, the ids or hidden states first. result: where it finds the result,
    None where there is none.
    steps: what it does in between.
    devices: queues that it lets work. ffns: what our own operators count, by block. products: what others of them read.
    taps: inner results in main memory, where the spec asks for them. scratch: see `Builder`. nbytes: of the memory that
    it computes in.
    """

    spec: GraphSpec
    inputs: Sequence[ggml.TensorP]
    result: ggml.TensorP | None
    steps: Sequence[Step]
    devices: Sequence[Queue]
    ffns: Mapping[int, Sequence[sparse_ffn.Ffn]]
    products: Sequence[Userdata]
    taps: Mapping[str, ggml.TensorP]
    scratch: Repacked | None
    trace: Trace | None
    nbytes: int
    handles: Handles = field(repr=False)

    def run(self, inputs: GraphInputs) -> npt.NDArray[np.float32]:
        """Compute a batch and return its logits, float32 [n_outputs, n_vocab]; hidden states where the schedule ends
        before; nothing, [0, 0], where there is no result.

        Raises UserError where ggml fails.
        """
        try:
            return self._run(inputs)
        except BaseException:
            for queue in self.devices:
                queue.settle()  # it may still write to what is about to be freed
            raise

    def _run(self, inputs: GraphInputs) -> npt.NDArray[np.float32]:
        for tensor, array in zip(self.inputs, (inputs.data, *inputs.arrays), strict=True):
            write(tensor, array)
        for step in self.steps:
            step.run()
        for queue in self.devices:
            queue.finish()
        if self.trace:
            self.trace.step += 1
        if self.scratch:
            self.scratch.check()
        return read(self.result) if self.result else np.empty((0, 0), np.float32)

    def close(self) -> None:
        """Free the subgraphs."""
        self.handles.close()


def write(tensor: ggml.TensorP, array: npt.NDArray[np.generic]) -> None:
    """Fill a tensor from an array of the same bytes."""
    ggml.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def read(tensor: ggml.TensorP) -> npt.NDArray[np.float32]:
    """A copy of an F32 matrix, [ne1, ne0]."""
    length, n, *_ = tensor.ne
    array = np.empty((n, length), np.float32)
    ggml.ggml_backend_tensor_get(ggml.ConstTensorP(tensor.value), array.ctypes.data, 0, array.nbytes)
    return array
