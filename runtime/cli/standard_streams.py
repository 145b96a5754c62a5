"""The standard streams of a command: always there, in UTF-8, and with errors that name the stream.

A service, a shell (`<&-`) or a program without a console starts us without some of them: then they are the null device.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_NAMES = ("stdin", "stdout", "stderr")


class StdoutError(OSError):
    """stdout takes no more: its reader has gone (EPIPE), or its disk is full."""


def prepare() -> None:
    """Make sys.stdin, sys.stdout and sys.stderr usable whatever we were started with. Streams that somebody put in
    their place stay.
    """
    _fill_descriptors()
    # Models write any Unicode, whatever the locale of the terminal; who names an encoding for Python means it.
    encoding = None if os.environ.get("PYTHONIOENCODING") else "utf-8"
    for descriptor, name in enumerate(_NAMES):
        stream = _Descriptor(descriptor, name)
        setattr(sys, name, _replaced(getattr(sys, name), stream, encoding))


def finish() -> None:
    """Write what stdout still holds. Raises StdoutError also where an earlier one was kept quiet on its way, as
    argparse does.
    """
    sys.stdout.flush()
    raw = _raw(sys.stdout)
    if isinstance(raw, _Descriptor) and raw.error:
        raise raw.error


def _raw(stream: TextIO | None) -> object:
    """What is below a text stream and its buffer, if it has one (python -u gives it none)."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _fill_descriptors() -> None:
    """Open the null device for descriptors that are closed: the next file to be opened would take their numbers, and
    what is printed would go into it.
    """
    for descriptor in range(len(_NAMES)):
        if not _is_open(descriptor):
            with contextlib.suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _replaced(old: TextIO | None, new: _Descriptor, encoding: str | None) -> TextIO:
    """`new` as a text stream that buffers like `old`; `old` itself where it is not Python's own."""
    if old is not None and type(_raw(old)) is not io.FileIO:
        if isinstance(old, io.TextIOWrapper):  # a console of Windows
            old.reconfigure(encoding=encoding, errors="replace")
        return old
    if old is not None and new.writable():
        with contextlib.suppress(OSError):
            old.flush()
    encoding = encoding or (old.encoding if old else "utf-8")
    if new.readable():
        return io.TextIOWrapper(io.BufferedReader(new), encoding, "replace")
    line_buffering = getattr(old, "line_buffering", True)
    if old is not None and isinstance(old.buffer, io.FileIO):  # python -u
        return io.TextIOWrapper(new, encoding, "replace", write_through=True)
    return io.TextIOWrapper(io.BufferedWriter(new), encoding, "replace", line_buffering=line_buffering)


class _Descriptor(io.RawIOBase):
    """One of our descriptors. It waits where the descriptor does not; once it has failed, what is written goes
    nowhere.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.error: OSError | None = None
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def readable(self) -> bool:
        return self.name == "stdin"

    def writable(self) -> bool:
        return self.name != "stdin"

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            with contextlib.suppress(BlockingIOError), self._named():
                data = os.read(self._descriptor, len(view))
                view[: len(data)] = data
                return len(data)
            select.select([self], [], [])

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and not self.error:
            with contextlib.suppress(BlockingIOError), self._named():
                done += os.write(self._descriptor, view[done:])
            if done < len(view) and not self.error:
                select.select([], [self], [])
        return len(view)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the stream in an error; there is nowhere to tell one of stderr."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            kind = StdoutError if self.name == "stdout" else OSError
            self.error = kind(error.errno, error.strerror, self.name)
            if self.name != "stderr":
                raise self.error from None
