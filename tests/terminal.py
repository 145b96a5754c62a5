"""A command at a real pseudo-terminal (pexpect), and the screen that its user sees (pyte)."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from types import TracebackType

import pexpect
import pyte
import pyte.screens
from wcwidth import wcwidth

ROOT = Path(__file__).parent.parent
CTRL_C, CTRL_D, CTRL_Z, TAB, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\x1a", "\t", "\r", "\x1b\r", "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"


class Screen(pyte.Screen):
    """pyte's, with the lines that left it at the top, and with characters joined to the one before."""

    def __init__(self, columns: int, lines: int) -> None:
        self.scrolled: list[str] = []
        self.answers: list[str] = []
        super().__init__(columns, lines)

    def write_process_input(self, data: str) -> None:
        self.answers.append(data)

    def draw(self, data: str) -> None:
        for char in data:
            if wcwidth(char) == 0 and self.cursor.x:  # pyte drops joiners and variation selectors, and what follows
                self._join(char)
            else:
                super().draw(char)

    def _join(self, char: str) -> None:
        line, x = self.buffer[self.cursor.y], self.cursor.x - 1
        x -= line[x].data == "" and x > 0  # the right half of a wide character
        line[x] = line[x]._replace(data=line[x].data + char)

    def index(self) -> None:
        if self.cursor.y == (self.margins or pyte.screens.Margins(0, self.lines - 1)).bottom:
            self.scrolled.append(self.line(0))
        super().index()

    def line(self, y: int) -> str:
        return "".join(self.buffer[y][x].data for x in range(self.columns)).rstrip()

    def start_of_line(self) -> int:
        """Where in `text` the cursor's line begins."""
        return sum(len(line) + 1 for line in [*self.scrolled, *map(self.line, range(self.cursor.y))])

    def text(self) -> str:
        """All lines, those that left the screen included."""
        return "\n".join([*self.scrolled, *map(self.line, range(self.lines))])


class Terminal:
    """A command in a process of its own whose terminal we are; what it does is awaited, never assumed after some time."""

    def __init__(self, *command: object, columns: int = 160, lines: int = 40, **env: str) -> None:
        self.screen = Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._seen = self._raw_seen = 0  # how much of either was expected already
        self._last = ("", 0)  # what was expected last, and where it began
        program, *arguments = map(str, command)
        unset = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")
        values = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = pexpect.spawn(
            program, arguments, cwd=ROOT, env=values | {"TERM": "xterm-256color"} | env, dimensions=(lines, columns)
        )
        self.process.delaybeforesend = None

    def send(self, keys: str | bytes) -> None:
        self.process.send(keys)

    def expect(self, pattern: str, seconds: float = 200) -> str:
        """Wait until `pattern` is to be read, on the line that is typed or after what was expected before; returns the text up to its end."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen.text()[self._seen :])):
            assert self._read(until), f"no {pattern!r} in\n{self.screen.text()}"
        self._last = (pattern, self._seen + found.start())
        # What is below the line that is typed may go away again.
        self._seen = min(self._seen + found.end(), self.screen.start_of_line())
        return found.string[: found.end()]

    def expect_raw(self, pattern: bytes, seconds: float = 200) -> None:
        """Wait until `pattern` is written, whether it can be seen or not, after what was expected so before."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.raw[self._raw_seen :])):
            assert self._read(until), f"no {pattern!r} in {self.raw[self._raw_seen :]!r}"
        self._raw_seen += found.end()

    def expect_gone(self, text: str, seconds: float = 200) -> None:
        """Wait until `text` is not to be read any more."""
        until = time.monotonic() + seconds
        while text in self.screen.text():
            assert self._read(until), f"still {text!r} in\n{self.screen.text()}"
        if self._last[0] == text:  # what comes in its place begins where it stood
            self._seen = min(self._seen, self._last[1])

    def expect_cursor(self, column: int, seconds: float = 200) -> None:
        """Wait until the cursor stands in a column, counted from 0: it wanders while a line is drawn."""
        until = time.monotonic() + seconds
        while self.screen.cursor.x != column:
            assert self._read(until), f"the cursor is in column {self.screen.cursor.x}, expected {column}"

    def _read(self, until: float) -> bool:
        """Read something by then, and show it; False where the time is over or the other side has closed."""
        try:
            data = self.process.read_nonblocking(1 << 16, max(0.0, until - time.monotonic()))
        except (pexpect.TIMEOUT, pexpect.EOF):
            return False
        self.raw += data
        self._stream.feed(data)
        while self.screen.answers:  # e.g. where the cursor is
            self.process.send(self.screen.answers.pop(0))
        return True

    def resize(self, columns: int, lines: int) -> None:
        self._raw_seen = len(self.raw)
        self.process.setwinsize(lines, columns)
        self.screen.resize(lines, columns)

    def ended(self) -> int:
        """The exit status, once the command has ended; of a signal, minus its number."""
        until = time.monotonic() + 200
        while not self.process.ptyproc.closed and self._read(until):
            pass
        while self.process.isalive():
            assert time.monotonic() < until, f"still running:\n{self.screen.text()}"
            time.sleep(0.01)
        status = self.process.exitstatus
        return -self.process.signalstatus if status is None else status

    def hang_up(self) -> None:
        """Take the terminal away."""
        self.process.ptyproc.fileobj.close()
        self.process.ptyproc.closed = True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate(force=True)
        self.process.close()


def chat(state: Path, *arguments: object, columns: int = 160, lines: int = 40, **env: str) -> Terminal:
    """`python -m runtime chat`, with its history below `state`."""
    command = (sys.executable, "-m", "runtime", "chat", *arguments, "--threads", 1)
    return Terminal(*command, columns=columns, lines=lines, XDG_STATE_HOME=str(state), **env)
