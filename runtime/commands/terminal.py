"""A chat at a terminal: the prompt with its history and keys, Ctrl-C, and the footer below each reply."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.plain_text import PlainTextOutput
from prompt_toolkit.utils import is_dumb_terminal

from runtime.base.home import expanded, home
from runtime.cli.output import note
from runtime.commands.footer import print_footer
from runtime.commands.session import COMMANDS, Session, attempt
from runtime.errors import printable

_TAKES_FILE = [usage.split()[0] for usage in COMMANDS if usage.endswith(" FILE")]
_ECHOED = 8  # lines of a prompt from a file that are shown
_LEAVING_HINT = "Ctrl-D or /exit leaves, /help lists the commands"


class Terminal:
    """The loop of a chat: read, reply, show the figures. Errors are shown, and the chat goes on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prompt = _prompt_session()

    def run(self, first: str | None = None) -> None:
        """Talk until the user leaves; `first` is answered before anything is typed."""
        model = self._session.model
        note(f"{model.path.name}: {model.ffn}, {model.threads} threads, context of {model.n_ctx} tokens")
        note("/help lists the commands; Alt+Enter or a backslash at the end of a line begins another line")
        if first is not None:
            print(f"> {_shortened(printable(first))}")
            self._attempt(lambda: self._reply(first))
        self._running = True
        while self._running:
            self._attempt(self._step)

    def _attempt(self, step: Callable[[], None]) -> None:
        try:
            attempt(step)
        except KeyboardInterrupt:  # at the prompt, or in a command: the chat goes on
            note(_LEAVING_HINT)

    def _step(self) -> None:
        try:
            with _hang_up_at_once():
                typed = self._prompt.prompt("> ")
        except (EOFError, OSError):  # Ctrl-D; or the terminal has gone
            self._running = False
            return
        # Bytes that are no UTF-8 come as lone surrogates, which no file could hold.
        text = typed.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        self._running = self._session.take(text, self._reply)

    def _reply(self, text: str) -> None:
        with Interrupt() as interrupt:

            def show(piece: str) -> bool:
                interrupt.begun = True
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
                return not interrupt.asked

            try:
                reply = self._session.reply(text, show)
            except KeyboardInterrupt:
                if not interrupt.begun:
                    note("\nstopped before the reply began: the conversation is as it was")
                    return
                reply = self._session.replies[-1]
        if not reply.text.endswith("\n"):
            print()
        print_footer(reply.stats, reply.stop_reason)
        for line in self._session.context_notes(reply):
            note(line)


@contextmanager
def _hang_up_at_once() -> Iterator[None]:
    """While a prompt is shown, let a hang-up end the process: nothing is half-done then, and there is no terminal left
    to draw a last picture on.
    """
    hang_up = getattr(signal, "SIGHUP", None)
    before = hang_up and signal.getsignal(hang_up)
    if not hang_up or before == signal.SIG_IGN:
        yield
        return
    signal.signal(hang_up, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(hang_up, before)


def _shortened(text: str) -> str:
    lines = text.splitlines()
    return "\n  ".join([*lines[:_ECHOED], f"... {len(lines) - _ECHOED} more lines"] if len(lines) > _ECHOED else lines)


class Interrupt:
    """Ctrl-C while a reply runs: asks it to stop after the current token; before the first one it stops at once.

    A second Ctrl-C always stops at once.
    """

    def __init__(self) -> None:
        self.asked = self.begun = self._raised = False

    def __enter__(self) -> Interrupt:
        self._before: Any = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self._raised:
            return  # an impatient third one must not end the chat
        if self.asked or not self.begun:
            self._raised = True
            raise KeyboardInterrupt
        self.asked = True


class Commands(Completer):
    """Completes slash commands, and the file names that some of them take."""

    def __init__(self) -> None:
        known = {usage.removesuffix("FILE"): text for usage, text in COMMANDS.items()}
        self._names = WordCompleter(list(known), meta_dict=known, sentence=True)
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What may follow the text before the cursor."""
        command, space, argument = document.text_before_cursor.partition(" ")
        if space and command in _TAKES_FILE:
            return self._files.get_completions(Document(argument.lstrip()), complete_event)
        return self._names.get_completions(document, complete_event)


def _prompt_session() -> PromptSession[str]:
    return PromptSession(
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=_history(),
        completer=Commands(),
        complete_while_typing=False,
        enable_suspend=True,
        output=PlainTextOutput(sys.stdout) if is_dumb_terminal() else None,
    )


class _History(FileHistory):
    """What was typed before, this time and earlier; without a word where it can no longer be written: the chat goes
    on.
    """

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history() -> History:
    """The history kept for this user alone; only in memory where the file cannot be written."""
    named, at_home = os.environ.get("XDG_STATE_HOME"), home()
    state = expanded(named) if named else at_home and at_home / ".local/state"
    if state is None:
        note("the history is not kept: there is no home folder")
        return InMemoryHistory()
    path = state / "lazyneuron" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("a+b").close()  # a folder, or another user's
    except OSError as error:
        note(f"the history is not kept: `{path}`: {error.strerror}")
        return InMemoryHistory()
    return _History(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
