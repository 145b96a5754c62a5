"""The one thread that makes ggml's calls, one after the other, whichever threads ask for them.

ggml's CPU backend is an OpenMP build: the team of threads belongs to whoever calls it, so all calls come from here.
What a call may read is freed here, too: behind that call, which may still run when the thread that asked for it was
interrupted (Ctrl-C) and has gone on.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from runtime.base.closing import Closing, Handles, closed
from runtime.errors import UserError

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  (no error, as KeyboardInterrupt is none)
    """A call has stopped half-way, because nobody wants its result any more."""


class _Call(Future[T]):
    """A function to be called by the worker. kept: whether it is called even if nobody waits for it any more."""

    def __init__(self, function: Callable[[], T], kept: bool) -> None:
        super().__init__()
        self._function, self.kept, self.given_up = function, kept, False

    def run(self) -> None:
        """Call the function, unless it was given up before it began. Whoever waits for one that stopped half-way goes
        on waiting.
        """
        if not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(self._function())
        except Stopped:
            pass
        except BaseException as error:
            # Without this frame, through which the error would refer to itself.
            outer = error.__traceback__
            self.set_exception(error.with_traceback(outer and outer.tb_next))

    def give_up(self) -> None:
        """Do not begin, or stop where that is possible."""
        if not self.kept:
            self.cancel()
            self.given_up = True


class Worker:
    """A thread and its calls. It belongs to the process that began it: after a fork, the child has another one."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()
        self._present: _Call[Any] | None = None
        self._process = os.getpid()
        self._ending = False
        # A daemon: when the main thread has ended, others may go on computing and are waited for. Then `end` waits for
        # this one.
        self._thread = threading.Thread(target=self._work, name="ggml", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while call := self._calls.get():
            if call.kept or not self._ending:
                self._present = call
                call.run()
            self._present = call = None

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` on the worker, and wait for it.

        Where the wait is interrupted, the function is not begun, or goes on until it asks `is_wanted`. Raises UserError
        in a child of the worker's process.
        """
        return self._wait(function, kept=False)

    def finish(self, function: Callable[[], T]) -> T:
        """As `run`, but the function is called to its end even where the wait for it is interrupted."""
        return self._wait(function, kept=True)

    def _wait(self, function: Callable[[], T], kept: bool) -> T:
        if threading.current_thread() is self._thread:
            return function()
        if not self.is_ours:
            raise UserError(
                "the model was loaded before this process was forked",
                "load it in the child, or spawn instead of forking",
            )
        if self._ending and threading.current_thread() is threading.main_thread():
            return self._after_the_end(function)
        call = _Call(function, kept)
        self._calls.put(call)
        try:
            return call.result()
        except BaseException:
            call.give_up()
            raise
        finally:
            del call  # which an error of the function's refers to

    def post(self, function: Callable[[], object]) -> None:
        """Let the worker call `function` behind all else, without waiting: also for finalisers, on whichever thread
        they run. Errors are printed.
        """
        self._calls.put(_Call(lambda: _reported(function), kept=True))

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that began the worker, and not a child of it."""
        return self._process == os.getpid()

    def is_wanted(self) -> bool:
        """Whether anybody still waits for what the worker does now: to be asked by what takes long and can stop
        half-way.
        """
        call = self._present
        return call is None or call.kept or not (call.given_up or self._ending)

    def _after_the_end(self, function: Callable[[], T]) -> T:
        # For functions that `atexit` calls behind ours.
        if self._thread.is_alive():
            raise UserError("the interpreter is ending")
        return function()

    def end(self) -> None:
        """Finish or stop what is being done, so that no native code runs while the process ends. Threads that wait for
        something else go on waiting.
        """
        if self.is_ours:
            self._ending = True
            self._calls.put(None)
            with contextlib.suppress(KeyboardInterrupt):
                self._thread.join()


def _reported(function: Callable[[], object]) -> None:
    try:
        function()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)


_worker: Worker | None = None
_lock = threading.Lock()


def current() -> Worker:
    """The worker of this process, begun by the first call."""
    global _worker  # noqa: PLW0603  (one for the whole process, as the computing threads are)
    with _lock:
        if _worker is None:
            _worker = Worker()
            atexit.register(_worker.end)
        return _worker


def on_worker(function: Callable[[], T]) -> T:
    """Call `function` on this process's worker and wait for it: see `Worker.run`."""
    return current().run(function)


def is_wanted() -> bool:
    """See `Worker.is_wanted`."""
    return _worker is None or _worker.is_wanted()


def stop_if_unwanted() -> None:
    """Raise Stopped where nobody waits any more for what the worker does now. For the worker itself."""
    if not is_wanted():
        raise Stopped


class OfWorker(Closing):
    """Base class of owners whose handles are made, used and freed on the worker.

    They are freed behind whatever the worker does: by `close`, or when nothing refers to the owner any more. what: its
    name in errors.
    """

    def __init__(self, what: str) -> None:
        self._what, self._worker = what, current()
        self._handles: Handles | None = None  # while it is open; the worker's

    def _open(self, collect: Callable[[Handles], None]) -> None:
        """Collect what is owned. Where that fails, or is interrupted, it is freed again."""

        def collect_all() -> None:
            with Handles() as handles:
                collect(handles)
                self._handles = handles.pop_all()

        try:
            self._worker.run(collect_all)
        except BaseException:
            self._worker.post(self._free)  # an interrupt may have come when all was there
            raise

    def _do(self, work: Callable[[], T]) -> T:
        """Let the worker do something with what is owned. Raises UserError after `close`."""

        def unless_closed() -> T:
            if not self._handles:
                raise closed(self._what)
            return work()

        return self._worker.run(unless_closed)

    def close(self) -> None:
        """Free everything; it is freed also where the wait for it is interrupted."""
        if self._worker.is_ours:
            self._worker.finish(self._free)

    def _free(self) -> None:
        handles, self._handles = self._handles, None
        if handles:
            handles.close()

    def __del__(self) -> None:
        if getattr(self, "_handles", None):
            self._worker.post(self._free)


def _forget() -> None:
    global _worker, _lock
    _worker, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
