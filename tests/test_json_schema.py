"""Answers bound to JSON schemas are valid, judged by jsonschema; schemas that cannot be promised are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from test_grammar import accepts, generated

from runtime.errors import UserError
from runtime.text.grammar import Grammar
from runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.native

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["value", "next"],
}
SCHEMAS: dict[str, Any] = {
    "anything": {},
    "true": True,
    "object": {"type": "object"},
    "array": {"type": "array"},
    "string": {"type": "string"},
    "number": {"type": "number"},
    "several types": {"type": ["integer", "null", "boolean"]},
    "enum": {"enum": ["red", 5, None, {"a": [1, '"\\']}, True, "é\n"]},
    "enum of a type": {"type": "string", "enum": ["a", 1, "b"]},
    "const": {"const": {"kind": "x"}},
    "required": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
        "required": ["b"],
    },
    "all optional": {"type": "object", "properties": {k: {"type": "boolean"} for k in "abc"}},
    "closed": {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False},
    "open": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "ab": {"type": "integer"}, "": {"type": "null"}, '"\\': {"const": 1}},
        "additionalProperties": {"type": "string"},
    },
    "a map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}}},
    "required but not described": {"type": "object", "required": ["x"], "additionalProperties": {"type": "null"}},
    "nested": {"type": "object", "properties": {"in": {"type": "object", "properties": {"x": {"const": 1}}}}},
    "items": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "no items": {"type": "array", "maxItems": 0},
    "one or none": {"type": "array", "items": {"type": "null"}, "maxItems": 1},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 2},
    "tuple and more": {
        "type": "array",
        "prefixItems": [{"const": 1}],
        "items": {"const": 2},
        "minItems": 3,
        "maxItems": 5,
    },
    "lengths": {"type": "string", "minLength": 2, "maxLength": 5},
    "at least long": {"type": "string", "minLength": 3},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{2,4}(?:x|y)?$"},
    "pattern anywhere": {"type": "string", "pattern": '["\\\\]\\.\\s'},
    "pattern of two": {"type": "string", "pattern": "^a|\\u0062+$"},
    "pattern of no class": {"type": "string", "pattern": "^[^a-y\\W]*$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "whole numbers": {"type": "integer", "minimum": -17, "maximum": 1205},
    "beyond": {"type": "integer", "exclusiveMinimum": 98, "exclusiveMaximum": 101.5},
    "positive": {"type": "number", "minimum": 0},
    "union": {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "object", "properties": {"n": {"type": "null"}}}]},
    "one of": {"oneOf": [{"properties": {"k": {"const": "a"}}, "required": ["k"], "type": "object"}, {"type": "null"}]},
    "all of": {
        "allOf": [{"properties": {"a": {"type": "null"}}, "required": ["a"]}, {"properties": {"b": {"const": 2}}}]
    },
    "a list": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "a tree": {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}},
    "pydantic": {
        "title": "Person",
        "type": "object",
        "$defs": {"Pet": {"properties": {"kind": {"enum": ["cat", "dog"], "type": "string"}}, "type": "object"}},
        "properties": {
            "age": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None, "title": "Age"},
            "pets": {"items": {"$ref": "#/$defs/Pet", "description": "one"}, "type": "array", "maxItems": 2},
        },
        "required": ["pets"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def vocab(tiny_gguf: Path) -> Iterator[Tokenizer]:
    with Tokenizer(tiny_gguf) as tokenizer:
        yield tokenizer


# Random logits go on before and after a pattern that is not anchored, and seldom meet it.
@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "pattern anywhere"])
def test_what_is_written_is_valid(name: str, vocab: Tokenizer) -> None:
    schema, ended = SCHEMAS[name], 0
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(("date", "uuid")))
    grammar = Grammar.from_json_schema(schema)
    for seed in range(12):
        text = generated(vocab, grammar, seed, 300)
        if text is not None:
            ended += 1
            checker.validate(json.loads(text))
    assert ended >= 3


def test_what_is_valid_can_be_written() -> None:
    for name, texts in {
        "anything": ['{"a": [1, -2.5e3, "x\\u00e9\\n", null, true, {}]}', "[]", '"é🙂"', "0"],
        "all optional": ["{}", '{"b":true}', '{"a": true, "c": false}', '{"a":true,"b":false,"c":true}'],
        "open": ['{"a":1,"b":"x","abc":"y","c":""}', '{"aa":"x"}', '{"":null,"é":"x"}'],
        "tuple and more": ["[1,2,2]", "[1, 2, 2, 2, 2]"],
        "pattern anywhere": ['"ab\\\\. "', '"\\".\\t "'],
        "whole numbers": [str(n) for n in range(-17, 1206)],
        "beyond": ["99", "100", "101"],
        "a list": ['{"value": 1, "next": {"value": 2, "next": null}}'],
    }.items():
        grammar = Grammar.from_json_schema(SCHEMAS[name])
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMAS[name])
            assert accepts(grammar, text), (name, text)


def test_what_is_not_valid_cannot() -> None:
    for name, texts in {
        "object": ["[]", "{,}", '{"a":1,}', "{'a':1}", '{"a":01}', '{"a":"\n"}', "{}{}"],
        "open": ['{"a":"x"}', '{"ab":"x"}', '{"\\u0061":"x"}', '{"b":1}'],
        "closed": ['{"a":1,"b":2}', "{}"],
        "tuple and more": ["[1,2]", "[1,2,2,2,2,2]", "[2,2,2]"],
        "lengths": ['"a"', '"abcdef"', '"\\u0061"'],
        "whole numbers": ["-18", "1206", "01", "-0", "5.0", "99999"],
        "pattern": ['"AB-1"', '"AB-12345"', '"xAB-12"', '"AB-12xx"'],
    }.items():
        grammar = Grammar.from_json_schema(SCHEMAS[name])
        for text in texts:
            assert not accepts(grammar, text), (name, text)


def test_bounds_of_whole_numbers_are_exact() -> None:
    for low, high in [(0, 9), (7, 7), (95, 1003), (-120, -95), (-5, 5), (10, 19), (199, 201), (1000, 1000), (-1, 0)]:
        grammar = Grammar.from_json_schema({"type": "integer", "minimum": low, "maximum": high})
        found = [n for n in range(-1300, 1300) if accepts(grammar, str(n))]
        assert found == list(range(low, high + 1))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (5, "expected an object"),
        ([], "expected an object"),
        ("{", "no JSON"),
        ("[" * 100000, "no JSON"),
        (False, "nothing is valid"),
        ({"type": "text"}, "`type` is 'text'"),
        ({"type": []}, "`type` is"),
        ({"properties": 5, "type": "object"}, "`properties` is 5"),
        ({"type": "object", "required": "a"}, "`required` is"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "may not be there"),
        ({"type": "object", "properties": {"a": 5}}, "5 is no schema"),
        ({"$ref": "http://example.org/x"}, r"`\$ref` is"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"$ref": "#"}, "no text is of this form"),
        ({"enum": []}, "`enum`"),
        ({"enum": [1], "type": "string"}, "no value"),
        ({"anyOf": []}, "`anyOf` is"),
        ({"anyOf": [{}], "minLength": 5}, "`minLength` beside `anyOf`"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "in `allOf`"),
        ({"not": {"type": "string"}}, "`not` is not supported"),
        ({"type": "number", "multipleOf": 0.1}, "`multipleOf`"),
        ({"type": "number", "maximum": 5}, "not whole"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no whole number"),
        ({"type": "integer", "minimum": "5"}, "`minimum` is"),
        ({"type": "array", "uniqueItems": True}, "`uniqueItems`"),
        ({"type": "array", "minItems": 10**9}, "`minItems` is"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "more than `maxItems`"),
        ({"type": "array", "items": False, "minItems": 1}, "more than there can be"),
        ({"type": "string", "minLength": -1}, "`minLength` is"),
        ({"type": "string", "pattern": "a(?=b)"}, "looks around"),
        ({"type": "string", "pattern": "(a"}, r"a \( without"),
        ({"type": "string", "pattern": "a)"}, r"unexpected \)"),
        ({"type": "string", "pattern": "\\bx"}, "not supported"),
        ({"type": "string", "pattern": "*"}, "nothing to repeat"),
        ({"type": "string", "pattern": "(" * 100}, "within each other"),
        ({"type": "string", "pattern": "[b-a]"}, "a range"),
        ({"type": "string", "pattern": "[\\x00-\\x01]"}, "without characters"),
        ({"type": "string", "pattern": "(a{999}){999}{9}"}, "repetition of a repetition"),
        ({"type": "object", "properties": {str(i): {"type": "string"} for i in range(5000)}}, "more than 4000 parts"),
    ],
    ids=str,
)
def test_what_cannot_be_promised_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        Grammar.from_json_schema(schema)
    assert "\n" not in refused.value.message
    assert len(refused.value.message) < 250


def test_depth_is_bounded() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UserError, match="levels deep"):
        Grammar.from_json_schema(schema)


def test_a_bounded_size_compiles_in_time() -> None:
    wide = {"type": "object", "properties": {f"key{i}": {"type": "string", "maxLength": 40} for i in range(300)}}
    grammar = Grammar.from_json_schema(wide)
    assert accepts(grammar, '{"key7":"x","key299":"y"}')
    assert not accepts(grammar, '{"key299":"x","key7":"y"}')
    assert re.match("root ::=", grammar.text)
