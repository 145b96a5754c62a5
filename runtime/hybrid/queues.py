"""A side's queue of work: uploads, graphs and downloads, done in order, on a device while the caller does something
else.

Three kinds with one interface: devices whose ggml backend is asynchronous and has events queue by themselves; all other
devices (the CPU as a stand-in among them) are driven by a thread of their own, which makes their calls one after the
other; the CPU computes at once, on the caller's thread.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from runtime.base.closing import Closing, Handles
from runtime.bindings import ggml
from runtime.bindings import ggml_devices as gd
from runtime.compute.trace import Trace
from runtime.compute.weights import check_status
from runtime.errors import UserError
from runtime.hybrid.devices import DeviceInfo


class Mark(ABC):
    """A point in a queue."""

    @abstractmethod
    def wait(self) -> None:
        """Block until everything queued before the mark is done. Raises UserError if some of it failed."""


class Queue(Closing, ABC):
    """One side's queue. Not for use by several threads at once.

    Host memory that is uploaded from or downloaded to must stay as it is until a later mark has been waited for.
    """

    device: ggml.DeviceP
    backend: ggml.BackendP

    def __init__(self, where: str, track: str, trace: Trace | None) -> None:
        self.where, self.track, self.trace = where, track, trace

    @abstractmethod
    def upload(self, tensor: ggml.TensorP, source: ggml.TensorP) -> None:
        """Copy a whole tensor from one of the same bytes in host memory."""

    @abstractmethod
    def download(self, tensor: ggml.TensorP, target: ggml.TensorP) -> None:
        """Copy a whole tensor to one of the same bytes in host memory."""

    @abstractmethod
    def compute(self, graph: ggml.GraphP, name: str) -> None:
        """Run a graph; name: for the trace."""

    @abstractmethod
    def mark(self) -> Mark:
        """Mark the end of what is queued now; the device may begin with all of it."""

    @abstractmethod
    def finish(self) -> None:
        """Block until everything is done. Raises UserError if some of it failed."""

    @abstractmethod
    def settle(self) -> None:
        """Block until nothing is queued any more, and forget what failed and which marks were set: after an error,
        before memory is freed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the backend."""


def open_queues(
    handles: Handles, devices: Sequence[DeviceInfo], threads: int, trace: Trace | None = None
) -> list[Queue]:
    """A queue for each device, to be closed with `handles`; a device may be there more than once."""
    queues = []
    for i, device in enumerate(devices):
        track = f"device {device.name} {i}" if device in devices[:i] else f"device {device.name}"
        queues.append(handles.enter_context(open_queue(device, threads, track, trace)))
    return queues


def open_queue(info: DeviceInfo, threads: int, track: str, trace: Trace | None = None) -> Queue:
    """A queue for a device. threads: of a stand-in. Raises UserError where the device cannot be initialised."""
    if info.asynchronous and info.events:
        return _AsyncQueue(info, track, trace)
    return _ThreadQueue(info, track, trace, threads)


def _open_backend(handles: Handles, info: DeviceInfo) -> ggml.BackendP:
    backend = gd.ggml_backend_dev_init(info.handle, None)
    if not backend:
        raise UserError(f"device {info.name}: ggml could not initialise it", "LAZYNEURON_LOG=1 shows what ggml says")
    return handles.add(backend, ggml.ggml_backend_free)


class _AsyncQueue(Queue):
    """Lets ggml's backend queue. What it computes is seen to end when a later mark has passed."""

    def __init__(self, info: DeviceInfo, track: str, trace: Trace | None) -> None:
        super().__init__(f"device {info.name}", track, trace)
        self.device = info.handle
        self._handles = Handles()
        self.backend = _open_backend(self._handles, info)
        self._events: list[gd.EventP] = []
        self._free_events: list[gd.EventP] = []
        self._running: list[tuple[str, float]] = []  # traced graphs whose end was not seen yet

    def upload(self, tensor: ggml.TensorP, source: ggml.TensorP) -> None:
        size = ggml.ggml_nbytes(ggml.ConstTensorP(source.value))
        gd.ggml_backend_tensor_set_async(self.backend, tensor, source.data, 0, size)

    def download(self, tensor: ggml.TensorP, target: ggml.TensorP) -> None:
        size = ggml.ggml_nbytes(ggml.ConstTensorP(target.value))
        gd.ggml_backend_tensor_get_async(self.backend, ggml.ConstTensorP(tensor.value), target.data, 0, size)

    def compute(self, graph: ggml.GraphP, name: str) -> None:
        if self.trace:
            self._running.append((name, self.trace.now()))
        check_status(gd.ggml_backend_graph_compute_async(self.backend, graph), self.where)

    def mark(self) -> Mark:
        event = self._free_events.pop() if self._free_events else self._new_event()
        gd.ggml_backend_event_record(event, self.backend)
        return _Event(self, event, len(self._running))

    def _new_event(self) -> gd.EventP:
        event = self._handles.add(gd.ggml_backend_event_new(self.device), gd.ggml_backend_event_free)
        self._events.append(event)
        return event

    def passed(self, event: gd.EventP, n_running: int) -> None:
        """An event was waited for, before which `n_running` of the traced graphs were queued."""
        self._free_events.append(event)
        self._ended(n_running)

    def _ended(self, n: int) -> None:
        for name, start in self._running[:n]:
            assert self.trace
            self.trace.add(self.track, name, start)
        del self._running[:n]

    def finish(self) -> None:
        gd.ggml_backend_synchronize(self.backend)
        self._ended(len(self._running))

    def settle(self) -> None:
        gd.ggml_backend_synchronize(self.backend)
        self._running.clear()
        self._free_events = list(self._events)

    def close(self) -> None:
        self._handles.close()


class _Event(Mark):
    def __init__(self, of: _AsyncQueue, event: gd.EventP, n_running: int) -> None:
        self._queue, self._event, self._n = of, event, n_running

    def wait(self) -> None:
        gd.ggml_backend_event_synchronize(self._event)
        self._queue.passed(self._event, self._n)


class _ThreadQueue(Queue):
    """A thread makes the calls of a backend that cannot queue by itself; OpenMP's threads belong to it, too."""

    def __init__(self, info: DeviceInfo, track: str, trace: Trace | None, threads: int) -> None:
        super().__init__(f"device {info.name}", track, trace)
        self.device = info.handle
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._work, name=f"ggml {track}", daemon=True)
        with Handles() as handles:
            self.backend = _open_backend(handles, info)
            if info.is_stand_in:
                ggml.ggml_backend_cpu_set_n_threads(self.backend, threads)
            self._thread.start()
            handles.callback(self._thread.join)
            handles.callback(self._queue.put, None)
            self._handles = handles.pop_all()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            call()

    def _do(self, call: Callable[[], None]) -> None:
        def unless_failed() -> None:
            # After a failure nothing is computed any more, but marks still pass.
            try:
                if not self._failed:
                    call()
            except Exception as error:  # whatever it is belongs to whoever waits
                self._failed = error

        self._queue.put(unless_failed)

    def upload(self, tensor: ggml.TensorP, source: ggml.TensorP) -> None:
        size = ggml.ggml_nbytes(ggml.ConstTensorP(source.value))
        self._do(lambda: ggml.ggml_backend_tensor_set(tensor, source.data, 0, size))

    def download(self, tensor: ggml.TensorP, target: ggml.TensorP) -> None:
        size = ggml.ggml_nbytes(ggml.ConstTensorP(target.value))
        self._do(lambda: ggml.ggml_backend_tensor_get(ggml.ConstTensorP(tensor.value), target.data, 0, size))

    def compute(self, graph: ggml.GraphP, name: str) -> None:
        def run() -> None:
            start = self.trace.now() if self.trace else 0.0
            status = ggml.ggml_backend_graph_compute(self.backend, graph)
            if self.trace:
                self.trace.add(self.track, name, start)
            check_status(status, self.where)

        self._do(run)

    def mark(self) -> Mark:
        mark = _Reached(self)
        self._queue.put(mark.reached.set)
        return mark

    def raise_failure(self) -> None:
        """Raise what went wrong, once."""
        error, self._failed = self._failed, None
        if error:
            raise error

    def finish(self) -> None:
        self.mark().wait()

    def settle(self) -> None:
        mark = _Reached(self)
        self._queue.put(mark.reached.set)
        mark.reached.wait()
        self._failed = None

    def close(self) -> None:
        self._handles.close()


class _Reached(Mark):
    def __init__(self, of: _ThreadQueue) -> None:
        self.reached = threading.Event()
        self._queue = of

    def wait(self) -> None:
        self.reached.wait()
        self._queue.raise_failure()


class CpuQueue(Queue):
    """The CPU as a side: each call returns when its work is done. Tensors of other sides are copied by their own
    queues.

    backend: the model's own, which stays its owner's.
    """

    def __init__(self, backend: ggml.BackendP, trace: Trace | None) -> None:
        super().__init__("the CPU", "CPU", trace)
        self.backend, self.device = backend, ggml.ggml_backend_get_device(backend)

    def upload(self, tensor: ggml.TensorP, source: ggml.TensorP) -> None:
        """Copy a whole tensor."""
        ggml.ggml_backend_tensor_set(tensor, source.data, 0, ggml.ggml_nbytes(ggml.ConstTensorP(source.value)))

    def download(self, tensor: ggml.TensorP, target: ggml.TensorP) -> None:
        """Copy a whole tensor."""
        self.upload(target, tensor)

    def compute(self, graph: ggml.GraphP, name: str) -> None:
        """Run a graph; name: for the trace."""
        start = self.trace.now() if self.trace else 0.0
        status = ggml.ggml_backend_graph_compute(self.backend, graph)
        if self.trace:
            self.trace.add(self.track, name, start)
        check_status(status, self.where)

    def mark(self) -> Mark:
        """A mark that has passed."""
        return _Passed()

    def finish(self) -> None:
        """Nothing is ever queued."""

    def settle(self) -> None:
        """Nothing is ever queued."""

    def close(self) -> None:
        """Nothing is owned."""


class _Passed(Mark):
    def wait(self) -> None:
        pass
