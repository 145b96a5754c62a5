"""The one exception a user may cause, and how a command line reports it.

Knows nothing of models or files: whoever raises `UserError` says where, what was found and what was expected.
"""

from __future__ import annotations

import contextlib
import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from runtime import streams

# Controls (but newline and tab), line and paragraph separators, embeddings, overrides and isolates of bidirectional text, lone
# surrogates. Joiners, variation selectors and tags stay: emoji and several scripts are spelled with them.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1000  # characters of a message: what it quotes may be a file's, and of any length


def printable(text: str) -> str:
    """`text` with characters that could steer a terminal or turn its writing round made visible; newlines and tabs stay."""
    return _STEERING.sub("\ufffd", text)


def _line(text: str) -> str:
    """`text` as one line of bounded length that is shown as it is, whatever the file says that it quotes."""
    line = printable(" ".join(text.split()))
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


class UserError(Exception):
    """A mistake in what the user gave us: a file, an option, an environment. Never a bug of ours.

    message: one line, "where: what was found, what was expected". hint: what to do about it, or "".
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = _line(message), _line(hint)
        super().__init__(self.message)


def os_error(error: OSError) -> UserError:
    """Turn an operating-system error into one line that names the file."""
    where = f"`{error.filename}`: " if error.filename else ""
    hints = {
        errno.ENOSPC: "free some space or write to another disk",
        errno.EFBIG: "the file size limit of this shell or file system was reached (see `ulimit -f`)",
        errno.ENOENT: "check the path",
        errno.EACCES: "check the permissions",
        errno.EROFS: "write to another place",
        errno.EDQUOT: "free some space, or write where no quota is used up",
        errno.ENAMETOOLONG: "give it a shorter name",
        errno.EIO: "the disk, or the connection to it, is failing",
    }
    return UserError(f"{where}{error.strerror or error}", hints.get(error.errno or 0, ""))


def run_command(command: Callable[[], None]) -> int:
    """Run a command line's body; print a `UserError` as `error:` and `hint:` lines on stderr.

    Returns the exit status: 0, 1 for a user's mistake, 130 after an interrupt, and what a SystemExit says. Bugs keep their traceback.
    Signals that ask to end leave through the same clean-up as an interrupt.
    """
    streams.prepare()
    with _leaving_cleanly():
        status = _run(command)
        if status:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            return status
        return _run(streams.finish)  # before Python does: it would print its own complaint


def _run(step: Callable[[], None]) -> int:
    try:
        step()
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except streams.StdoutError as error:
        # Whoever read our output has gone (`| head`): not an error.
        return 0 if error.errno == errno.EPIPE else _report(os_error(error))
    except OSError as error:
        return _report(os_error(error))
    return 0


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
