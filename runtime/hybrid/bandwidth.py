"""How fast this machine's memories and crossings are: measured once for each device, and remembered.

The file is $LAZYNEURON_CACHE/bandwidths.json (default ~/.cache/lazyneuron).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.base.closing import Handles
from runtime.base.worker import on_worker
from runtime.bindings import ggml
from runtime.hybrid.devices import DeviceInfo, devices
from runtime.hybrid.memory import SMALLER, Memory, device_kinds, host_kinds
from runtime.hybrid.queues import Queue, open_queue
from runtime.hybrid.remembered import remembered
from runtime.hybrid.subgraphs import Subgraphs

_BYTES = 64 << 20  # of one matrix, in F16
_WIDTH = 4096
_MATRICES = {"CPU": 4, "GPU": 8}  # together beyond any cache
_REPEATS = 5
_STEPS = 200  # crossings that are timed
_measuring = threading.Lock()  # two threads that measure at once would measure each other


@dataclass(frozen=True)
class Speed:
    """bandwidth: bytes/s of products with whole matrices. sync: seconds for hidden states to come from the device and
    go back.
    """

    bandwidth: float
    sync: float


def speed_of(device: DeviceInfo, threads: int, anew: bool = False) -> Speed:
    """A device's speed; the CPU's is that of a backend with so many threads. Measures where nothing is remembered, or
    `anew` (a second or two).
    """
    with _measuring:
        return _speed_of(device, threads, anew)


def _speed_of(device: DeviceInfo, threads: int, anew: bool) -> Speed:
    team = f"{threads} threads, " if device.is_stand_in else ""
    version = ggml.ggml_version().decode()
    key = f"{device.backend} {device.name} {device.description}, {team}ggml {version}"

    def measured() -> list[float]:
        speed = on_worker(lambda: measure(device, threads))
        return [speed.bandwidth, speed.sync]

    return Speed(*remembered("bandwidths.json", key, 2, measured, anew))


def cpu() -> DeviceInfo:
    """The CPU as a device."""
    return next(d for d in devices() if d.is_stand_in)


def measure(device: DeviceInfo, threads: int) -> Speed:
    """Time products with matrices of some hundred MB, and hidden states that go there and back."""
    with Handles() as handles:
        queue = handles.enter_context(open_queue(device, threads, "measurement"))
        memory = handles.enter_context(Memory(f"device {device.name}", device_kinds(device.handle), SMALLER))
        main = handles.enter_context(Memory("main memory", host_kinds(device.handle), SMALLER))
        there, here = handles.enter_context(Subgraphs(memory, 16)), handles.enter_context(Subgraphs(main, 4))
        handles.callback(queue.settle)
        return _measured(queue, memory, there, here, _MATRICES["CPU" if device.is_stand_in else "GPU"])


def _measured(queue: Queue, memory: Memory, there: Subgraphs, here: Subgraphs, n: int) -> Speed:
    rows = _BYTES // _WIDTH // 2
    x, host_x = there.at("x", _WIDTH), here.at("x", _WIDTH)
    products, step = there.new(), there.new()
    for i in range(n):
        matrix = there.at(f"matrix {i}", _WIDTH, rows, ggml.F16)
        ggml.ggml_build_forward_expand(products.graph, ggml.ggml_mul_mat(products.ctx, matrix, x))
    y = there.keep(step, ggml.ggml_add(step.ctx, x, x), "y")
    there.allocate()
    memory.fill(0x3C)  # numbers near 1; memory that was never written may not be there
    here.allocate()

    def read_all() -> None:
        queue.compute(products.graph, "products")
        queue.finish()

    def cross() -> None:
        for _ in range(_STEPS):
            queue.upload(x, host_x)
            queue.compute(step.graph, "step")
            queue.download(y, host_x)
            queue.mark().wait()

    return Speed(n * _BYTES / _fastest(read_all), _fastest(cross) / _STEPS)


def _fastest(call: Callable[[], None]) -> float:
    call()  # first touch of memory, shaders that are compiled
    return min(_timed(call) for _ in range(_REPEATS))


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
