"""Tools: which a request may use, what a model is told of them, and the calls in what it writes, however it comes."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from test_grammar import accepts

from runtime.serve.errors import ApiError
from runtime.serve.tools import Call, CallReader, Part, Tools, split, told, tools_of
from runtime.text.chat_template import render

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": 'the "clock"'}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ørsta <b>"}}\n</tool_call>'


def read(text: str, cuts: tuple[int, ...] = ()) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls in what is written, cut at these places."""
    said, calls = split(parts_of(text, cuts))
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


def parts_of(text: str, cuts: tuple[int, ...] = (), parallel: bool = True) -> list[Part]:
    reader, parts = CallReader(reading(parallel)), list[Part]()
    for low, high in zip((0, *cuts), (*cuts, len(text)), strict=True):
        parts += reader.push(text[low:high])
    parts += reader.end()
    assert all(parts)
    assert [part for part in parts if isinstance(part, Call)] == reader.calls
    return parts


def reading(parallel: bool = True) -> Tools:
    found = tools_of({"tools": [WEATHER, {"name": "clock"}], "parallel_tool_calls": parallel})
    assert found
    return found


WRITTEN: list[tuple[str, str, int]] = [
    ("Hello.\n", "Hello.\n", 0),
    (CALL, "", 1),
    (f"I look.\n\n{CALL}\n{CALL}\n", "I look.", 2),
    (f"{CALL} And?", " And?", 1),
    (CALL.removesuffix("</tool_call>"), "", 1),
    (CALL.removesuffix('"}}\n</tool_call>'), CALL.removesuffix('"}}\n</tool_call>'), 0),
    ("a <tool_call>\nnone</tool_call> b", "a <tool_call>\nnone</tool_call> b", 0),
    ('x <tool_call>{"name": "else"}</tool_call>', 'x <tool_call>{"name": "else"}</tool_call>', 0),
    ('<tool_call>{"name": "clock"}</tool_call>', "", 1),
    ("<tool_call>[]</tool_call>  ", "<tool_call>[]</tool_call>  ", 0),
    (CALL.replace('{"city": "Ørsta <b>"}', '"{\\"city\\": 1}"'), "", 1),
    *(
        (text, text, 0)
        for value in ("[1]", '"x"', "NaN", '{"a": 1e999}', '{"a": NaN}')
        for text in [f'<tool_call>{{"name": "clock", "arguments": {value}}}</tool_call>']
    ),
    ('<tool_call>{"name": []}</tool_call>', '<tool_call>{"name": []}</tool_call>', 0),
    (f"a {CALL} b {CALL} c", "a b c", 2),
    ("1 < 2 <tool <tool_cal", "1 < 2 <tool <tool_cal", 0),
    ("</tool_call> <<tool_call", "</tool_call> <<tool_call", 0),
]


@pytest.mark.parametrize(("text", "said", "n_calls"), WRITTEN)
def test_case_48_calls_are_the_same_however_the_text_is_cut(text: str, said: str, n_calls: int) -> None:
    whole = read(text)
    assert (whole[0], len(whole[1])) == (said, n_calls)
    rng = np.random.default_rng(0)
    for n in range(1, len(text)):
        assert read(text, (n,)) == whole
    for _ in range(300):
        assert read(text, tuple(sorted(rng.integers(0, len(text) + 1, rng.integers(1, 12)).tolist()))) == whole
    assert read(text, tuple(range(1, len(text)))) == whole


def test_parts_are_in_order_and_only_one_call_is_made_where_no_more_may_be() -> None:
    def kinds(text: str, parallel: bool = True) -> list[str]:
        return [part if isinstance(part, str) else "call" for part in parts_of(text, (), parallel)]

    assert kinds(f"a\n{CALL}\n{CALL} b {CALL}") == ["a", "call", "call", " b", "call"]
    assert kinds(f"a\n{CALL}\n{CALL} b", parallel=False) == ["a", "call", f"\n{CALL}", " b"]


def test_case_49_calls_have_ids_of_their_own_and_arguments_as_text() -> None:
    reader = CallReader(reading())
    reader.push(CALL + CALL)
    one, two = (call.wire(i) for i, call in enumerate(reader.calls))
    assert (one["index"], two["index"]) == (0, 1)
    assert one["id"] != two["id"]
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in (one, two))
    assert one["function"] == {"name": "weather", "arguments": '{"city": "Ørsta <b>"}'}
    assert "index" not in reader.calls[0].wire()


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        (None, ()),
        ("auto", ()),
        ({"type": "auto"}, ()),
        ("required", ("weather", 'the "clock"')),
        ({"type": "any"}, ("weather", 'the "clock"')),
        ({"type": "function", "function": {"name": "weather"}}, ("weather",)),
        ({"type": "function", "name": "weather"}, ("weather",)),
        ({"type": "tool", "name": "weather"}, ("weather",)),
    ],
)
def test_choices(choice: Any, forced: tuple[str, ...]) -> None:
    tools = tools_of({"tools": [WEATHER, CLOCK, {"type": "web_search"}], "tool_choice": choice})
    assert tools is not None
    assert tools.names == ("weather", 'the "clock"')
    assert tools.forced == forced
    assert (tools.grammar() is None) == (not forced)


def test_case_24_no_tools_are_none() -> None:
    """Case 24: an empty list is as none."""
    assert tools_of({"tools": []}) is tools_of({}) is tools_of({"tools": [WEATHER], "tool_choice": "none"}) is None
    flat = tools_of({"tools": [{"name": "f", "input_schema": PARAMETERS}]})
    assert flat is not None
    assert flat.functions[0]["parameters"] == PARAMETERS


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name"),
        ({"tools": [{"name": "x", "parameters": 5}]}, "tools[0].function.parameters"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "y"}}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": []}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"name": "x", "parameters": {"not": {"type": "null"}}}], "tool_choice": "required"}, "tools[0]"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        tools = tools_of(fields)
        assert tools is not None
        tools.grammar()
    assert refused.value.status == 400
    assert str(refused.value.param).startswith(param)


def test_a_forced_call_is_always_one() -> None:
    node = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"enum": [1, 2]}}}
    given = {"tools": [WEATHER, CLOCK, {"name": "node", "parameters": node}], "tool_choice": "required"}
    many = tools_of(given)
    one = tools_of({**given, "parallel_tool_calls": False})
    named = tools_of({**given, "tool_choice": {"type": "function", "function": {"name": "node"}}})
    assert many and one and named
    clock = '<tool_call>\n{"name": "the \\"clock\\"", "arguments": {"a":[]}}\n</tool_call>'
    numbered = '<tool_call>\n{"name": "node", "arguments": {"n":2}}\n</tool_call>'
    for text, by in (
        (CALL.replace('{"city": "', '{"city":"'), (True, True, False)),
        (clock, (True, True, False)),
        (numbered, (True, True, True)),
        (f"{clock}\n{numbered}", (True, False, False)),
        (numbered.replace("2", "3"), (False, False, False)),
        ("no", (False, False, False)),
    ):
        grammars = [tools.grammar() for tools in (many, one, named)]
        assert tuple(accepts(grammar, text) for grammar in grammars if grammar) == by, text
    jsonschema.validate({"n": 2}, node)


PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
KNOWS = "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{% for c in m.tool_calls %}" \
    "({{ c.function.arguments.city }}){% endfor %}{{ m.content }}{% endfor %}"  # fmt: skip
HISTORY = [
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]},
    {"role": "tool", "content": "no", "tool_call_id": "1"},
]  # fmt: skip


def test_templates_that_know_tools_get_them_and_others_are_told_in_words() -> None:
    tools = tools_of({"tools": [WEATHER]})
    assert tools
    known = render(KNOWS, told(KNOWS, HISTORY, tools), {}, values={"tools": tools.described})
    assert known == "[weather]Hot?(Oslo)no"
    text = render(PLAIN, told(PLAIN, HISTORY, tools), {})
    assert '"name": "weather", "description": "of a city"' in text
    assert text.endswith(
        '<user>Hot?<assistant><tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
        "<user><tool_response>\nno\n</tool_response>"
    )
    with_system = told(PLAIN, [{"role": "system", "content": "Be brief."}, *HISTORY], tools)
    assert [one["role"] for one in with_system] == ["system", "user", "assistant", "user"]
    assert with_system[0]["content"].startswith("Be brief.\n\nYou can call")
    assert told(PLAIN, HISTORY[:1], None) == HISTORY[:1]
