"""Messages as clients send them, as a chat template takes them: roles that it knows, contents that are texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.base.arguments import shown
from runtime.errors import UserError
from runtime.serve.errors import ApiError, wrong
from runtime.serve.tools import Tools, told
from runtime.text.chat_template import render

Message = dict[str, Any]
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_TEXTS = ("text", "input_text", "output_text", "refusal")
_KEPT = ("name", "tool_calls", "tool_call_id")  # beside role and content, where templates may look for them
_MOST = 4096  # messages
_OPENS, _CLOSES, _CUT = "\ufdd0", "\ufdd1", "\ufdd2"  # no characters, so that no text has them


def normalised(messages: Sequence[Any], name: str = "messages") -> list[Message]:
    """Messages with contents as texts and roles as templates know them; system messages at the beginning are one.

    Raises ApiError with the place of what is wrong.
    """
    if not messages:
        raise wrong(name, "is empty, expected at least one message")
    if len(messages) > _MOST:
        raise wrong(name, f"{len(messages)} messages, expected at most {_MOST}")
    found: list[Message] = []
    for i, message in enumerate(messages):
        one = _normalised(message, f"{name}[{i}]")
        if one["role"] == "system" and len(found) == 1 and found[0]["role"] == "system":
            found[0]["content"] += "\n\n" + one["content"]
        else:
            found.append(one)
    return found


def _normalised(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise wrong(where, f"{shown(message)}, expected an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}.role", f"{shown(role)}, expected one of {', '.join(_ROLES)}")
    one: Message = {"role": _ROLES[role], "content": text_of(message.get("content"), f"{where}.content")}
    return one | {key: message[key] for key in _KEPT if message.get(key)}


def text_of(content: Any, where: str) -> str:
    """A content as one text: a text, null for none, or parts of text. Raises ApiError for other parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong(where, f"{shown(content)}, expected a text or a list of parts")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise wrong(where, f"{shown(part)}, expected an object")
    kind = part.get("type")
    text = part.get("refusal" if kind == "refusal" else "text")
    if kind not in _TEXTS or not isinstance(text, str):
        raise wrong(where, f"a part of type {shown(kind)}, expected text: no model of ours sees or hears")
    return text


def chat_prompt(
    template: str | None,
    messages: Sequence[Message],
    special_tokens: Mapping[str, Any],
    add_generation_prompt: bool = True,
    values: Mapping[str, Any] | None = None,
    tools: Tools | None = None,
    continues: bool = False,
) -> str:
    """The prompt for a conversation. values: others that the template may name; tools: that the model may call;
    continues: the prompt ends where the last message does, so that the model goes on with it.

    Raises ApiError where the model has no template, UserError where it refuses.
    """
    if template is None:
        raise ApiError(
            400,
            "the model has no chat template: use /v1/completions, or start the server with --chat-template",
            "messages",
            "no_chat_template",
        )
    named = {**({"tools": tools.described} if tools else {}), **(values or {})}
    shown_messages = _shielded(told(template, messages, tools), special_tokens)
    if not continues:
        return render(template, shown_messages, special_tokens, add_generation_prompt, named)
    # A template may put something before the message's text, too, so it is rendered whole, and cut behind its text.
    shown_messages[-1]["content"] += _CUT
    prompt, found, _ = render(template, shown_messages, special_tokens, False, named).rpartition(_CUT)
    if not found:
        raise wrong("messages", "the chat template does not show the last message, so it cannot be continued")
    return prompt


def is_prefill(messages: Sequence[Message], continues: bool | None, add_generation_prompt: bool | None) -> bool:
    """Whether a model goes on with the last message, by what a request says of it (None: nothing). Where it says
    nothing, a last message of the assistant is continued, as llama.cpp's and Anthropic's servers do. Raises ApiError.
    """
    last = messages[-1]
    if continues is None:
        return last["role"] == "assistant" and not last.get("tool_calls") and add_generation_prompt is not False
    name = "continue_final_message"
    if continues and add_generation_prompt:
        raise wrong(name, "is true beside add_generation_prompt, expected one of them")
    if continues and (last["role"] != "assistant" or last.get("tool_calls")):
        raise wrong(name, "the last message is no text of the assistant")
    return continues


def _shielded(messages: Sequence[Message], special_tokens: Mapping[str, Any]) -> list[Message]:
    """Messages in which special tokens that a client spelled are marked, so that they stay text."""
    listed = [value if isinstance(value, list) else [value] for value in special_tokens.values()]
    known = sorted(
        {text for texts in listed for text in texts if isinstance(text, str) and text}, key=len, reverse=True
    )
    pattern = re.compile("|".join(map(re.escape, known)) or "(?!)")

    def marked(text: str) -> str:
        return pattern.sub(lambda found: f"{_OPENS}{found[0]}{_CLOSES}", plain(text))

    return [{**one, "content": marked(one["content"])} for one in messages]


def plain(prompt: str) -> str:
    """A prompt without these marks, to be shown."""
    return prompt.replace(_OPENS, "").replace(_CLOSES, "").replace(_CUT, "")


def chat_ids(prompt: str, encode: Callable[..., list[int]]) -> tuple[int, ...]:
    """Ids of such a prompt, in which the template has spelled the special tokens; those that a client spelled are text.

    Raises UserError where there are none.
    """
    ids: list[int] = []
    # A template may cut a text: a mark without the other is none.
    for i, part in enumerate(re.split(f"{_OPENS}([^{_OPENS}{_CLOSES}]*){_CLOSES}", prompt)):
        if part:
            ids += encode(plain(part), add_special=False, parse_special=i % 2 == 0)
    if not ids:
        raise UserError("messages: the conversation has no tokens", "give some text")
    return tuple(ids)
