"""/openapi.json: what the table of fields says, in the form that tools read."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from runtime.serve import wire
from runtime.serve.fields import ANTHROPIC, CHAT, NATIVE, RESPONSES, TEXT, fields_of
from runtime.serve.front import Front
from runtime.serve.replies import json_reply

_BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/v1/responses": RESPONSES,
    "/v1/messages": ANTHROPIC,
    "/completion": NATIVE,
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"type": "string", "enum": ["error"]},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": "string", "nullable": True},
                "code": {"type": "string", "nullable": True},
            },
        }
    },
}


async def openapi(_front: Front, _: Request) -> Response:
    """The description."""
    return json_reply(description())


def description() -> dict[str, Any]:
    """The endpoints with a table of fields, as an OpenAPI document."""
    return {
        "openapi": "3.0.3",
        "info": {"title": "lazyneuron", "version": wire.version()},
        "paths": {path: {"post": _operation(path, endpoint)} for path, endpoint in _BODIES.items()},
        "components": {"schemas": {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}},
    }


def body_schema(endpoint: str) -> dict[str, Any]:
    """The fields of an endpoint as a JSON schema. Any other field is ignored, and null counts as absent."""
    found = fields_of(endpoint)
    # Anthropic's form demands a field that others need not have.
    required = [f.name for f in found if f.needed or (f.name == "max_tokens" and endpoint == ANTHROPIC)]
    properties = {
        name: {**field.check.schema, "description": field.about, **({} if name in required else {"nullable": True})}
        for field in found
        for name in (field.name, *field.aliases)
    }
    return {"type": "object", "required": required, "properties": properties}


def _operation(path: str, endpoint: str) -> dict[str, Any]:
    name = "AnthropicError" if endpoint == ANTHROPIC else "Error"
    error = {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
    schema = body_schema(endpoint)
    return {
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "the answer, or its events where `stream` is true"},
            "400": {"description": "a field is wrong; `param` names it", **error},
            "429": {"description": "too many requests wait; Retry-After says when to ask again", **error},
            "503": {"description": "the server is loading, ends, or has lost its engine", **error},
        },
    }
