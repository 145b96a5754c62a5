"""A JSON schema as a grammar, in GBNF: every text of the grammar is JSON that the schema accepts.

The converter of llama-cpp-python leaves out silently what it does not know (`minimum`, `not`, `multipleOf`, ...), so
that answers need not be valid. Here it is one error. Objects have their properties in the schema's order, numbers a
bounded number of digits, and white space is short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from runtime.base.arguments import shown
from runtime.errors import UserError
from runtime.text.json_pattern import pattern_rule
from runtime.text.json_ranges import integer_rule

_MOST, _DEEPEST, _MOST_TIMES = 4000, 60, 2000
_KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
_BASIC = {
    "ws": '" "? | "\\n" " "{0,12}',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (member ("," ws member)*)? ws "}"',
    "member": 'string ws ":" ws value',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "string": '"\\"" char* "\\""',
    "char": 'plain | "\\\\" (["\\\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "plain": '[^"\\\\\\x00-\\x1F\\x7F]',
    "letter": 'plain | "\\\\" ["\\\\/bfnrt]',  # each is one character, which cannot be said of \u
    "text": "letter*",
    "integer": '"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": '"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "positive": '("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "date": '[0-9]{4} "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])',
    "time": 'hour ":" sixty ":" sixty ("." [0-9]{1,6})? ("Z" | [-+] hour ":" sixty)',
    "hour": '[01] [0-9] | "2" [0-3]',
    "sixty": "[0-5] [0-9]",
    "date-time": 'date "T" time',
    "uuid": '[0-9a-f]{8} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{4} "-" [0-9a-f]{12}',
}
_FORMATS = ("date", "time", "date-time", "uuid")
# What a schema can demand that is not built here.
_REFUSED = (
    *("not", "if", "then", "else", "multipleOf", "uniqueItems", "patternProperties", "propertyNames", "contains"),
    *("minContains", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    *("unevaluatedProperties", "unevaluatedItems", "$dynamicRef", "$recursiveRef", "additionalItems"),
)
_UNIONS = ("anyOf", "oneOf")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_OF_KIND = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "minLength", "maxLength", "format"),
    "number": _BOUNDS,
}


def gbnf_of(schema: Any) -> str:
    """The grammar. Raises UserError for what is no schema, or demands what cannot be promised."""
    root, rules = rules_of(schema)
    return gbnf({"root": root, **rules})


def rules_of(schema: Any, prefix: str = "r") -> tuple[str, dict[str, str]]:
    """The right side of a rule for a schema, and the rules with names that begin with `prefix` that it needs. Raises
    UserError as above.
    """
    found = _Schema(schema, prefix)
    return found.root(), found.rules


def gbnf(rules: Mapping[str, str]) -> str:
    """A grammar of such rules."""
    return "".join(f"{name} ::= {rule}\n" for name, rule in {**rules, **_BASIC}.items())


class _Schema:
    def __init__(self, root: Any, prefix: str) -> None:
        self._root, self._prefix = root, prefix
        self.rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._n = self._depth = 0

    def root(self) -> str:
        return self._rule_of(self._root)

    def _new(self, rule: str) -> str:
        self._n += 1
        if self._n > _MOST:
            raise _wrong(f"it has more than {_MOST} parts")
        self.rules[f"{self._prefix}-{self._n}"] = rule
        return f"{self._prefix}-{self._n}"

    def _named(self, schema: Any) -> str:
        """A name of a rule for a schema."""
        rule = self._rule_of(schema)
        return rule if rule in _BASIC or rule in self.rules else self._new(rule)

    def _rule_of(self, schema: Any) -> str:
        if schema is True:
            return "value"
        if not isinstance(schema, Mapping):
            raise _wrong("nothing is valid by `false`" if schema is False else f"{shown(schema)} is no schema")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _wrong(f"it is more than {_DEEPEST} levels deep")
        refused = [key for key in _REFUSED if schema.get(key) not in (None, False)]
        if refused:
            raise _wrong(f"`{refused[0]}` is not supported")
        found = self._whole(schema)
        self._depth -= 1
        return found

    def _whole(self, schema: Mapping[str, Any]) -> str:
        if "$ref" in schema:
            _alone(schema, "$ref")
            return self._ref(schema["$ref"])
        if "allOf" in schema:
            return self._rule_of(_merged(schema))
        for key in _UNIONS:
            if key in schema:
                _alone(schema, key)
                return self._union(schema[key], key)
        if "const" in schema or "enum" in schema:
            return _constants(schema)
        kinds = _kinds(schema)
        if kinds == _KINDS:
            return "value"
        return " | ".join(
            self._new(self._of_kind(kind, schema)) if len(kinds) > 1 else self._of_kind(kind, schema) for kind in kinds
        )

    def _union(self, schemas: Any, key: str) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise _wrong(f"`{key}` is {shown(schemas)}, expected a list of schemas")
        return " | ".join(self._named(one) for one in schemas if one is not False)

    def _ref(self, ref: Any) -> str:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise _wrong(f"`$ref` is {shown(ref)}, expected one within the schema, such as #/$defs/name")
        if ref not in self._refs:
            at = self._root
            for part in ref.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                at = at.get(key) if isinstance(at, Mapping) else None
            if at is None:
                raise _wrong(f"`$ref` {shown(ref)} leads nowhere")
            self._refs[ref] = self._new("")
            depth, self._depth = self._depth, 0
            self.rules[self._refs[ref]] = self._rule_of(at)
            self._depth = depth
        return self._refs[ref]

    def _of_kind(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return _number(kind, schema)
        return kind

    # --- objects ---------------------------------------------------------------------------------------------------

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise _wrong(f"`properties` is {shown(properties)}, expected an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _wrong(f"`required` is {shown(required)}, expected a list of names")
        more = schema.get("additionalProperties", not properties)
        missing = [name for name in required if name not in properties]
        if missing and more is False:
            raise _wrong(f"`required` has {shown(missing[0])}, which may not be there")
        members = {**properties, **dict.fromkeys(missing, True if more is False else more)}
        if not members and more is True:
            return "object"
        pairs = [
            (self._new(f'{_literal(name)} ws ":" ws {self._named(one)}'), name in required)
            for name, one in members.items()
            if one is not False or name in required
        ]
        other = None if more is False else self._new(f'{self._other_key(list(members))} ws ":" ws {self._named(more)}')
        return f'"{{" ws {self._members(pairs, other)} ws "}}"'

    def _members(self, pairs: list[tuple[str, bool]], other: str | None) -> str:
        """Two rules for each member: what follows it, where something stands before, and where nothing does."""
        after = self._new(f'("," ws {other})*' if other else '""')
        first = self._new(f"({other} {after})?" if other else '""')
        for pair, needed in reversed(pairs):
            here, then = f"{pair} {after}", f'"," ws {pair} {after}'
            first = self._new(here if needed else f"{here} | {first}")
            after = self._new(then if needed else f"{then} | {after}")
        return first

    def _other_key(self, names: list[str]) -> str:
        """A rule for the name of a property that is none of these, spelled without escapes."""
        return f'"\\"" {self._unlike(names, 0)} "\\""' if names else "string"

    def _unlike(self, names: list[str], at: int) -> str:
        if at > 200:
            raise _wrong("a property has a name of more than 200 characters")
        here = [name[at] for name in names if len(name) > at]
        plain = sorted({sign for sign in here if sign not in '"\\' and 31 < ord(sign) != 127})
        escaped = "".join(f"\\U{ord(sign):08X}" for sign in plain)
        parts = [f'[^"\\\\\\x00-\\x1F\\x7F{escaped}] plain*']
        for sign in plain:
            longer = [name for name in names if len(name) > at and name[at] == sign]
            parts.append(f"[\\U{ord(sign):08X}] {self._unlike(longer, at + 1)}")
        if all(len(name) != at for name in names):
            parts.append('""')
        return self._new(" | ".join(parts))

    # --- arrays, texts ---------------------------------------------------------------------------------------------

    def _array(self, schema: Mapping[str, Any]) -> str:
        first, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):
            first, items = items, False
        if not isinstance(first, list):
            raise _wrong(f"`prefixItems` is {shown(first)}, expected a list of schemas")
        least, most = _times(schema, "minItems", "maxItems")
        rules = [self._named(one) for one in first[: most if most is not None else None]]
        rest = self._named(items) if items is not False and (most is None or most > len(rules)) else None
        if rest is None and least > len(rules):
            raise _wrong("`minItems` is more than there can be")
        n = len(rules)
        tail = '""'
        if rest:
            tail = self._new(
                f'("," ws {rest}){_counted(max(0, least - max(n, 1)), None if most is None else most - max(n, 1))}'
            )
            if not n:
                tail = self._new(f"{rest} {tail}" if least else f"({rest} {tail})?")
        for i in reversed(range(n)):
            comma = '"," ws' if i else ""
            needed = self._new(f"{comma} {rules[i]} {tail}")
            tail = needed if i < least else self._new(f"{needed}?")
        return f'"[" ws {tail} ws "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = _times(schema, "minLength", "maxLength")
        bounded = least > 0 or most is not None
        if "pattern" in schema:
            if bounded:
                raise _wrong("`pattern` beside `minLength` or `maxLength` is not supported")
            if not isinstance(schema["pattern"], str):
                raise _wrong(f"`pattern` is {shown(schema['pattern'])}, expected a text")
            return f'"\\"" {self._new(pattern_rule(schema["pattern"], "text"))} "\\""'
        if schema.get("format") in _FORMATS and not bounded:
            return f'"\\"" {schema["format"]} "\\""'
        return f'"\\"" letter{_counted(least, most)} "\\""' if bounded else "string"


def _kinds(schema: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = schema.get("type")
    if kinds is None:
        found = [kind for kind, keys in _OF_KIND.items() if any(key in schema for key in keys)]
        # Without a type, a demand concerns values of one type only; texts of that type are valid, too.
        return tuple(found) or _KINDS
    listed = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(listed, list) or not listed or any(kind not in _KINDS for kind in listed):
        raise _wrong(f"`type` is {shown(kinds)}, expected one of {', '.join(_KINDS)}")
    return tuple(dict.fromkeys(listed))


def _constants(schema: Mapping[str, Any]) -> str:
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(values, list) or not values or len(values) > _MOST:
        raise _wrong("`enum` is expected to be a list of values")
    if "const" in schema and "enum" in schema and schema["const"] not in schema["enum"]:
        raise _wrong("`const` is none of `enum`")
    demands = {key for keys in _OF_KIND.values() for key in keys} & set(schema)
    if demands:
        raise _wrong(f"`{min(demands)}` beside `enum` or `const` is not supported")
    kinds = _kinds(schema)
    kept = [value for value in values if any(_is(value, kind) for kind in kinds)]
    if not kept:
        raise _wrong("no value of `enum` or `const` is of its `type`")
    return " | ".join(_literal(value) for value in kept)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and float(value).is_integer())
    return isinstance(value, {"object": dict, "array": list, "string": str}.get(kind, ()))


def _literal(value: Any) -> str:
    """JSON of a value, as a literal."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):
        raise _wrong("a value cannot be written as JSON") from None
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _number(kind: str, schema: Mapping[str, Any]) -> str:
    bounds = {key: schema[key] for key in _BOUNDS if schema.get(key) is not None}
    for key, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
            raise _wrong(f"`{key}` is {shown(value)}, expected a number up to 1e15")
    if not bounds:
        return kind
    if kind == "integer":
        return integer_rule(bounds)
    if bounds == {"minimum": 0}:
        return "positive"
    raise _wrong("`minimum` and `maximum` of numbers that are not whole are supported as `minimum: 0` only")


def _times(schema: Mapping[str, Any], low: str, high: str) -> tuple[int, int | None]:
    least, most = schema.get(low) or 0, schema.get(high)
    for key, value in ((low, least), (high, most)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_TIMES
        ):
            raise _wrong(f"`{key}` is {shown(value)}, expected 0 to {_MOST_TIMES}")
    if most is not None and most < least:
        raise _wrong(f"`{low}` is more than `{high}`")
    return least, most


def _counted(least: int, most: int | None) -> str:
    return "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"


def _alone(schema: Mapping[str, Any], key: str) -> None:
    demands = {*_UNIONS, *_BOUNDS, "const", "enum", "allOf", "$ref", *(k for keys in _OF_KIND.values() for k in keys)}
    beside = sorted((demands & set(schema)) - {key})
    if beside:
        raise _wrong(f"`{beside[0]}` beside `{key}` is not supported")


def _merged(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """allOf as one schema: parts that are the only one, or objects with properties of their own."""
    parts = schema["allOf"]
    if not isinstance(parts, list) or not parts or not all(isinstance(one, Mapping) for one in parts):
        raise _wrong(f"`allOf` is {shown(parts)}, expected a list of schemas")
    rest = {key: value for key, value in schema.items() if key != "allOf"}
    every = [*parts, rest] if _demands(rest) else parts
    if len(every) == 1:
        return dict(every[0])
    merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
    for one in every:
        unknown = sorted(_demands(one) - {"type", "properties", "required"})
        if unknown or one.get("type", "object") != "object":
            raise _wrong(f"`{unknown[0] if unknown else 'type'}` in `allOf` is not supported")
        twice = set(merged["properties"]) & set(one.get("properties", {}))
        if twice:
            raise _wrong(f"`allOf` has {shown(min(twice))} twice")
        merged["properties"] |= one.get("properties", {})
        merged["required"] += one.get("required", [])
    return merged


def _demands(schema: Iterable[str]) -> set[str]:
    known = {
        "type",
        "const",
        "enum",
        "$ref",
        "allOf",
        *_UNIONS,
        *_REFUSED,
        *(k for keys in _OF_KIND.values() for k in keys),
    }
    return known & set(schema)


def _wrong(what: str) -> UserError:
    return UserError(f"schema: {what}")
