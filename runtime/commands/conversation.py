"""A chat as data: its messages, the prompt they make, and the file they are saved in.

With a chat template the messages are rendered by it; without one (a base model) the conversation is one running text
that user and model write in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.base.atomic import check_target, replacing
from runtime.base.text_file import read_text
from runtime.errors import UserError
from runtime.text import chat_template

_FORMAT = "lazyneuron_conversation"
_VERSION = 1
_ROLES = ("system", "user", "assistant")
Message = dict[str, str]


@dataclass
class Conversation:
    """Messages, oldest first, each a `role` and its `content`.

    chat_template: the file's Jinja template, or None for running text. special_tokens: what it may name.
    system: the system prompt; it survives `reset`. dropped: how many of the oldest messages after the system prompt the
    prompt leaves out, because the context has no room for them; they stay in `messages`, and in the file of `save`.
    """

    chat_template: str | None
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    dropped: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system prompt if there is one."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.dropped = 0

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def drop_last(self) -> None:
        """Take the last message back."""
        self.messages.pop()

    def undo(self) -> str:
        """Take back the user's last text, which is returned, and all that followed it. Raises UserError if there is
        none.
        """
        at = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if at is None:
            raise UserError("nothing to take back: the conversation is empty")
        text = self.messages[at]["content"]
        del self.messages[at:]
        self.dropped = 0  # there may be room again
        return text

    def drop_oldest(self) -> bool:
        """Leave the oldest turn (a text and its reply) out of the prompt; returns False where only the last one is
        left.
        """
        first = self._n_system() + self.dropped
        following = (i for i in range(first + 1, len(self.messages)) if self.messages[i]["role"] == "user")
        at = next(following, None)
        if at is not None:
            self.dropped += at - first
        return at is not None

    def prompt(self) -> str:
        """The text that the model continues. Raises UserError when the template refuses the messages."""
        n = self._n_system()
        messages = self.messages[:n] + self.messages[n + self.dropped :]
        if self.chat_template is not None:
            return chat_template.render(self.chat_template, messages, self.special_tokens)
        return _running_text(messages)

    def _n_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def save(self, path: Path) -> None:
        """Write the messages to `path`, whole or not at all, replacing an older saved conversation but no other
        file.
        """
        check_target(path, 0, force=True, example="chat.json")
        if path.exists():
            try:
                _read(path)
            except UserError:
                raise UserError(f"`{path}`: exists and is no saved conversation", "choose another name") from None
        values = {_FORMAT: _VERSION, "messages": self.messages}
        with replacing(path) as partial:
            text = json.dumps(values, ensure_ascii=False, indent=1) + "\n"
            partial.write_text(text, encoding="utf-8", errors="replace")  # lone surrogates, as the tokenizer takes them

    def load(self, path: Path) -> None:
        """Replace the messages by those of a saved conversation. Raises UserError when `path` holds none."""
        self.messages, self.dropped = _read(path), 0
        first = self.messages[0] if self.messages else {"role": ""}
        self.system = first["content"] if first["role"] == "system" else ""


def _running_text(messages: Iterable[Message]) -> str:
    text = ""
    for message in messages:
        # A reply continues the user's text where it ends; whatever the user writes begins a line.
        starts_line = message["role"] != "assistant" and text and not text.endswith("\n")
        text += ("\n" if starts_line else "") + message["content"]
    return text


def _read(path: Path) -> list[Message]:
    try:
        values = json.loads(read_text(path).text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"`{path}`: no saved conversation ({error})", "expected a file written by /save") from None
    if not isinstance(values, dict) or values.get(_FORMAT) != _VERSION:
        raise UserError(f"`{path}`: no saved conversation of version {_VERSION}", "expected a file written by /save")
    messages = values.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(f"`{path}`: damaged conversation, expected messages with a role and a text")
    return messages


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    return value["role"] in _ROLES and isinstance(value["content"], str)
