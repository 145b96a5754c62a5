"""What an answer must look like, as requests say it: a grammar, a JSON schema, a response format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runtime.base.arguments import shown
from runtime.errors import UserError
from runtime.serve.errors import ApiError, wrong
from runtime.serve.fields import Fields
from runtime.text.grammar import Grammar


def grammar_of(given: Fields) -> Grammar | None:
    """The grammar that a request asks for; None where it asks for none. Raises ApiError for what is wrong or cannot be
    promised: an answer is never less bound than it was asked to be.
    """
    # An empty schema asks for JSON of any kind; an empty grammar or format asks for nothing, as in llama.cpp's server.
    found = [
        (field, given[field])
        for field in ("grammar", "json_schema", "response_format")
        if given.get(field) or (field == "json_schema" and field in given)
    ]
    if "response_format" in given and given["response_format"].get("type") == "text":
        found = [(field, value) for field, value in found if field != "response_format"]
    if not found:
        return None
    if len(found) > 1:
        raise wrong(found[0][0], f"is there beside {found[1][0]}, expected one of them")
    field, value = found[0]
    try:
        return _grammar(field, value)
    except ApiError:
        raise
    except UserError as error:
        raise wrong(field, error.message) from None


def _grammar(field: str, value: Any) -> Grammar:
    if field == "grammar":
        return Grammar.from_gbnf(value)
    return Grammar.from_json_schema(value if field == "json_schema" else schema_of(value))


def schema_of(response_format: Mapping[str, Any]) -> Any:
    """The schema of a `response_format`, as OpenAI and llama.cpp have it. Raises ApiError for another type."""
    kind = response_format.get("type")
    if kind == "json_object":
        schema = response_format.get("schema")
        return {"type": "object"} if schema is None else schema
    if kind != "json_schema":
        raise wrong("response_format", f"type is {shown(kind)}, expected text, json_object or json_schema")
    inner = response_format.get("json_schema", response_format)
    if not isinstance(inner, Mapping) or inner.get("schema") is None:
        raise wrong("response_format", "json_schema has no schema")
    return inner["schema"]
