"""How a program of ours begins and ends: its errors are one line each, and signals leave through the same clean-up as
an interrupt.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from runtime.cli import standard_streams
from runtime.errors import UserError, os_error


def run_command(command: Callable[[], None]) -> int:
    """Run a command line's body; print a `UserError` as `error:` and `hint:` lines on stderr.

    Returns the exit status: 0, 1 for a user's mistake, 130 after an interrupt, and what a SystemExit says. Bugs keep
    their traceback.
    Signals that ask to end leave through the same clean-up as an interrupt.
    """
    standard_streams.prepare()
    with _leaving_cleanly():
        status = _run(command)
        if status:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            return status
        return _run(standard_streams.finish)  # before Python does: it would print its own complaint


def _run(step: Callable[[], None]) -> int:
    try:
        _unwrapped(step)
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except standard_streams.StdoutError as error:
        # Whoever read our output has gone (`| head`): not an error.
        return 0 if error.errno == errno.EPIPE else _report(os_error(error))
    except OSError as error:
        return _report(os_error(error))
    return 0


def _unwrapped(step: Callable[[], None]) -> None:
    try:
        step()
    except RuntimeError as error:
        # Python 3.11 and older wrap what is raised while a class is made, as an import does.
        if isinstance(error.__cause__, KeyboardInterrupt | SystemExit):
            raise error.__cause__ from None
        raise


class _Leave(SystemExit):
    """A signal asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextlib.contextmanager
def _leaving_cleanly() -> Iterator[None]:
    """Let signals that ask to end raise, as an interrupt does, wherever the program is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are another's
        return
    numbers = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]  # not under nohup
    for number in ours:
        signal.signal(number, _leave)
    usual, sys.unraisablehook = sys.unraisablehook, _raised_again
    try:
        yield
    finally:
        sys.unraisablehook = usual
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise _Leave(number)


def _send(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # which also ends what the main thread waits for
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


def _raised_again(lost: sys.UnraisableHookArgs) -> None:
    """What a signal raised while a finaliser ran goes no further than that: send the signal again, a moment later."""
    error = lost.exc_value
    number = error.number if isinstance(error, _Leave) else signal.SIGINT
    if isinstance(error, _Leave | KeyboardInterrupt):
        threading.Timer(0.01, _send, (number,)).start()
    else:
        sys.__unraisablehook__(lost)


def _report(error: UserError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    return 1
