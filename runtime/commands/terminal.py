"""A chat at a terminal: the prompt with its history and keys, Ctrl-C, and the footer below each reply.

Knows keys and streams; what a text or a command means is the session's.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from runtime.commands.footer import print_footer
from runtime.commands.options import note, printable
from runtime.commands.session import HELP, Session, attempt

_LEAVING_HINT = "Ctrl-D or /exit leaves, /help lists the commands"


class Terminal:
    """The loop of a chat: read, reply, show the figures. Errors are shown, and the chat goes on."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._prompt = _prompt_session()

    def run(self) -> None:
        """Talk until the user leaves."""
        model = self._session.model
        note(f"{model.path.name}: {model.ffn}, {model.threads} threads, context of {model.n_ctx} tokens")
        note("/help lists the commands; Alt+Enter or a backslash at the end of a line begins another line")
        self._running = True
        while self._running and (text := self._read()) is not None:
            attempt(lambda text=text: self._take(text))  # type: ignore[misc]

    def _read(self) -> str | None:
        """What was typed: "" after Ctrl-C, None to leave."""
        try:
            return self._prompt.prompt("> ")
        except KeyboardInterrupt:
            note(_LEAVING_HINT)
            return ""
        except EOFError:
            return None

    def _take(self, text: str) -> None:
        if text.startswith("/"):
            self._running = self._session.command(text.strip())
        elif text.strip():
            self._reply(text)

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
                note("\nstopped" if interrupt.begun else "\nstopped before the reply began: your text was taken back")
                return
        if not reply.text.endswith("\n"):
            print()
        print_footer(reply.stats, reply.stop_reason)
        if full := self._session.context_note(reply):
            note(full)


class Interrupt:
    """Ctrl-C while a reply runs: asks it to stop after the current token; before the first one it stops at once.

    A second Ctrl-C always stops at once.
    """

    def __init__(self) -> None:
        self.asked = self.begun = False

    def __enter__(self) -> Interrupt:
        self._before: Any = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked or not self.begun:
            raise KeyboardInterrupt
        self.asked = True


def _prompt_session() -> PromptSession[str]:
    commands = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
    return PromptSession(
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        history=_history(),
        completer=WordCompleter(commands, sentence=True),
        complete_while_typing=False,
    )


def _history() -> History:
    """What was typed before, kept for this user alone; only in memory where the file cannot be written."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "lazyneuron" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        note(f"the history is not kept: `{path}`: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(str(path))


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
