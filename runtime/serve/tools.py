"""Tools: what a request says of them, how the model is told, and the calls in what it writes.

Calls are written as Hermes does, which most open models with such training know: `<tool_call>`, a JSON object with name
and arguments, `</tool_call>`. Where a call is required, a grammar sees to it; else what looks like one is read as one.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from runtime.base.arguments import shown
from runtime.errors import UserError
from runtime.serve.errors import wrong
from runtime.text.grammar import Grammar
from runtime.text.json_schema import gbnf, rules_of

OPENS, CLOSES = "<tool_call>", "</tool_call>"
_MOST = 128
_LONGEST_NAME = 128
_MOST_CALLS = 128  # of an answer
_TOLD = """You can call functions. These are known, as JSON schemas:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments within tags, and nothing else:
<tool_call>
{{"name": "the name", "arguments": {{}}}}
</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request. functions: each with name, description and parameters; forced: one of these names must be
    called, () none must; parallel: several calls may be made.
    """

    functions: tuple[Mapping[str, Any], ...]
    forced: tuple[str, ...] = ()
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of all."""
        return tuple(one["name"] for one in self.functions)

    @property
    def described(self) -> list[dict[str, Any]]:
        """As templates take them."""
        return [{"type": "function", "function": dict(one)} for one in self.functions]

    def grammar(self) -> Grammar | None:
        """The form of an answer that must call; None where it need not. Raises ApiError for parameters that cannot be
        promised.
        """
        if not self.forced:
            return None
        rules: dict[str, str] = {}
        calls = []
        for i, one in enumerate(self.functions):
            if one["name"] in self.forced:
                try:
                    arguments, more = rules_of(one.get("parameters") or {"type": "object"}, f"t{i}")
                except UserError as error:
                    raise wrong(f"tools[{i}].function.parameters", error.message) from None
                name = json.dumps(json.dumps(one["name"]))
                rules |= {
                    **more,
                    f"t{i}": arguments,
                    f"call{i}": f'"{{\\"name\\": " {name} ", \\"arguments\\": " t{i} "}}"',
                }
                calls.append(f"call{i}")
        rules["call"] = f'"{OPENS}\\n" ({" | ".join(calls)}) "\\n{CLOSES}"'
        return Grammar(gbnf({"root": 'call ("\\n" call)*' if self.parallel else "call", **rules}))


def tools_of(given: Mapping[str, Any]) -> Tools | None:
    """The tools that a request may use; None where there are none, or it says so. Fields: tools, tool_choice,
    parallel_tool_calls, in OpenAI's and in Anthropic's forms. Raises ApiError.
    """
    listed = given.get("tools") or []
    if len(listed) > _MOST:
        raise wrong("tools", f"{len(listed)} tools, expected at most {_MOST}")
    # Those of other kinds, such as a search, are for other servers: clients send them to all.
    functions = [_function(one, f"tools[{i}]") for i, one in enumerate(listed) if not _is_other(one)]
    names = [one["name"] for one in functions]
    if len(set(names)) < len(names):
        raise wrong("tools", f"{shown(next(name for name in names if names.count(name) > 1))} is there twice")
    forced = _forced(given.get("tool_choice"), names)
    if forced is None or not functions:
        return None
    choice = given.get("tool_choice")
    alone = isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use") is True
    return Tools(tuple(functions), forced, given.get("parallel_tool_calls", True) and not alone)


def _is_other(tool: Any) -> bool:
    """Whether it is no function: a custom tool of OpenAI's takes text, one of Anthropic's has a schema."""
    kind = tool.get("type", "function") if isinstance(tool, Mapping) else "function"
    return kind != "function" and not (kind == "custom" and "input_schema" in tool)


def _function(tool: Any, where: str) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping):
        raise wrong(where, f"{shown(tool)}, expected an object")
    name, parameters = inner.get("name"), inner.get("parameters", inner.get("input_schema"))
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise wrong(f"{where}.function.name", f"{shown(name)}, expected 1 to {_LONGEST_NAME} characters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong(f"{where}.function.parameters", f"{shown(parameters)}, expected a JSON schema")
    about = inner.get("description")
    return {"name": name, "description": about if isinstance(about, str) else "", "parameters": parameters or {}}


def _forced(choice: Any, names: Sequence[str]) -> tuple[str, ...] | None:
    """Names of which one must be called; None: no tools at all."""
    kind = choice.get("type") if isinstance(choice, Mapping) else choice
    if kind in (None, "auto"):
        return ()
    if kind == "none":
        return None
    if kind in ("required", "any"):
        if not names:
            raise wrong("tool_choice", "there are no tools to call")
        return tuple(names)
    if isinstance(choice, Mapping) and kind in ("function", "tool"):
        inner = choice.get("function", choice)
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if name not in names:
            raise wrong("tool_choice", f"{shown(name)} is none of the tools")
        return (str(name),)
    raise wrong("tool_choice", f"{shown(choice)}, expected auto, none, required or a tool")


def told(template: str, messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """Messages as a template can show them: where it knows nothing of tools, these and their calls become text."""
    knows = "tool_calls" in template or "tools" in template
    found = [_with_text(one) if not knows else _with_objects(one) for one in messages]
    if not tools or "tools" in template:
        return found
    text = _TOLD.format(tools="\n".join(json.dumps(one, ensure_ascii=False) for one in tools.described))
    if found and found[0]["role"] == "system":
        return [{**found[0], "content": f"{found[0]['content']}\n\n{text}".lstrip()}, *found[1:]]
    return [{"role": "system", "content": text}, *found]


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of calls as objects, which templates write as JSON."""
    if not message.get("tool_calls"):
        return dict(message)
    calls = [{**one, "function": _called(one)} if isinstance(one, Mapping) else one for one in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [one for one in message.get("tool_calls") or () if isinstance(one, Mapping)]
    texts = [f"{OPENS}\n{json.dumps(_called(one), ensure_ascii=False)}\n{CLOSES}" for one in calls]
    content = "\n".join([*([message["content"]] if message["content"] else []), *texts])
    return {"role": message["role"], "content": content}


def _called(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("function")
    inner = inner if isinstance(inner, Mapping) else {}
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return {"name": inner.get("name", ""), "arguments": arguments}


# --- what the model writes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of a tool. arguments: a JSON object, as text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: "call_" + secrets.token_hex(12))

    def wire(self, index: int | None = None) -> dict[str, Any]:
        """In OpenAI's form; index: in a stream."""
        function = {"name": self.name, "arguments": self.arguments}
        return {**({} if index is None else {"index": index}), "id": self.id, "type": "function", "function": function}


Part: TypeAlias = "str | Call"


class CallReader:
    """Text and calls, out of pieces of what a model writes. Joined, they are the same however it is cut.

    calls: all so far. What looks like a call and is none, one of no tool that there is, or one more than may be made,
    is text.
    """

    def __init__(self, tools: Tools | None) -> None:
        self._names = frozenset(tools.names if tools else ())
        self._most = _MOST_CALLS if tools and tools.parallel else 1
        self._held = self._spaces = ""
        self._inside = False
        self.calls: list[Call] = []

    def push(self, text: str) -> list[Part]:
        """What is sure after another piece: texts and calls, in order."""
        if not self._names:
            return [text] if text else []
        self._held += text
        parts: list[Part] = []
        while True:
            before, found, after = self._held.partition(CLOSES if self._inside else OPENS)
            if not found:
                break
            parts.append(self._closed(before) if self._inside else self._opened(before))
            self._held, self._inside = after, not self._inside
        if not self._inside:
            n = len(self._held) - _may_open(self._held)
            parts.append(self._held[:n])
            self._held = self._held[n:]
        return [part for part in parts if part]

    def end(self) -> list[Part]:
        """What was held back: a call whose end is missing counts, if it is whole."""
        held, self._held = self._held, ""
        part: Part = "" if self.calls and not held.strip() else held
        if self._inside:
            self._inside = False
            part = self._read(held) or self._spaces + OPENS + held
        return [part] if part else []

    def _opened(self, before: str) -> str:
        """The text before a marker; spaces are kept back until it is known whether a call follows."""
        self._spaces = before[len(before.rstrip()) :]
        return before.rstrip()

    def _closed(self, inner: str) -> Part:
        return self._read(inner) or self._spaces + OPENS + inner + CLOSES

    def _read(self, text: str) -> Call | None:
        """The call that stands between the markers, if it is one."""
        if len(self.calls) >= self._most:
            return None
        try:
            found = json.loads(text)
            if not isinstance(found, dict) or found.get("name") not in self._names:
                return None
            arguments = found.get("arguments", found.get("parameters", {}))
            if isinstance(arguments, str):  # some write them as text
                arguments = json.loads(arguments)
            call = Call(found["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
        except (ValueError, TypeError, RecursionError):  # TypeError: a name that is no text
            return None
        if not isinstance(arguments, dict):
            return None
        self.calls.append(call)
        return call


def split(parts: Sequence[Part]) -> tuple[str, list[Call]]:
    """The text of parts, and their calls."""
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts), [part for part in parts if isinstance(part, Call)]


def _may_open(text: str) -> int:
    """How many characters at the end of a text are held back: spaces, and what may become a marker."""
    for n in range(min(len(OPENS) - 1, len(text)), 0, -1):
        if text.endswith(OPENS[:n]):
            rest = text[:-n]
            return n + len(rest) - len(rest.rstrip())
    return len(text) - len(text.rstrip())
