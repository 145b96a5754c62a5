"""What llama-server offers beside OpenAI's endpoints: health, props, slots, and the tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response

from runtime.base.arguments import token_ids
from runtime.serve import wire
from runtime.serve.body import read_object
from runtime.serve.checks import Flag, Ids, Keyed, Listing, Text
from runtime.serve.conversation import chat_prompt, is_prefill, normalised, plain
from runtime.serve.errors import ApiError, wrong
from runtime.serve.front import Front
from runtime.serve.replies import error_reply, json_reply
from runtime.serve.tools import tools_of


async def health(front: Front, _: Request) -> Response:
    """Whether answers are to be had; 503 where not. Always public, never waits."""
    state = front.service.state
    if state == "ready":
        return json_reply({"status": "ok"})
    words = {"loading": "the model is being loaded", "dead": "the engine has failed"}
    message = words.get(state, "the server ends")
    return error_reply(ApiError(503, message, None, state, {"status": state}, retry=None if state == "dead" else 1.0))


async def props(front: Front, _: Request) -> Response:
    """What the server runs, and how."""
    model, service, settings = front.model, front.service, front.settings
    return json_reply(
        {
            "model_alias": settings.name,
            "model_path": model.path.name,
            "n_ctx": model.n_ctx,
            "total_slots": service.parallel,
            "queue": service.queue,
            "cells": model.engine.cells.n_cells,
            "ffn": model.ffn,
            "n_layers": model.structure.block_count,
            "neurons": [block.n_neurons for block in model.structure.blocks],
            "calibrated_shares": front.calibrated_shares,
            "dense_bytes_per_token": front.dense_bytes,
            "chat_template": front.chat_template or "",
            "bos_token": model.special_tokens.get("bos_token", ""),
            "eos_token": model.special_tokens.get("eos_token", ""),
            "default_generation_settings": {
                "n_ctx": model.n_ctx,
                "params": {
                    **asdict(settings.sampling),
                    "max_tokens": -1 if settings.max_tokens is None else settings.max_tokens,
                },
            },
            "modalities": {"vision": False, "audio": False},
            "build_info": f"lazyneuron {wire.version()}",
        }
    )


async def slots(front: Front, request: Request) -> Response:
    """What is being computed; with `?fail_on_no_slot=1`, 503 where nothing more would begin at once."""
    found = front.service.slots()
    if request.query_params.get("fail_on_no_slot") and len(found) >= front.service.parallel:
        raise ApiError(503, "no slot is free", None, "no_slot", retry=1.0)
    every: list[dict[str, Any]] = [{"is_processing": True, **asdict(slot)} for slot in found]
    every += [{"is_processing": False}] * (front.service.parallel - len(found))
    return json_reply([{"id": i, "n_ctx": front.model.n_ctx, **slot} for i, slot in enumerate(every)])


async def metrics(front: Front, request: Request) -> Response:
    """What is counted, for Prometheus."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    headers = {"Cache-Control": "no-store", "Content-Type": content_type}
    return Response(encode(front.metrics.registry), headers=headers)


async def tokenize(front: Front, request: Request) -> Response:
    """A text as ids."""
    body = await read_object(request, front.settings)
    text = _given(body, "content", Text(), "")
    special, parse, pieces = (
        _given(body, name, Flag(), default)
        for name, default in (("add_special", False), ("parse_special", True), ("with_pieces", False))
    )
    ids = await front.prepare(lambda: front.model.tokenize(text, special, parse))
    if not pieces:
        return json_reply({"tokens": ids})
    return json_reply({"tokens": [{"id": i, "piece": _piece(front, i)} for i in ids]})


def _piece(front: Front, token: int) -> str | list[int]:
    data = front.model.tokenizer.token_bytes(token, special=True)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


async def detokenize(front: Front, request: Request) -> Response:
    """Ids as a text."""
    body = await read_object(request, front.settings)
    ids = token_ids("tokens", _given(body, "tokens", Ids(), []), front.model.structure.vocab_size)
    decode = front.model.tokenizer.decode
    return json_reply({"content": await front.prepare(lambda: decode(ids))})


async def apply_template(front: Front, request: Request) -> Response:
    """A conversation as the prompt that a chat would make of it."""
    body = await read_object(request, front.settings)
    messages = _given(body, "messages", Listing(), None)
    if messages is None:
        raise wrong("messages", "is missing")
    more = _given(body, "chat_template_kwargs", Keyed(), {})
    add = _given(body, "add_generation_prompt", Flag(), None)
    continued = _given(body, "continue_final_message", Flag(), None)
    tools = tools_of({**body, "tools": _given(body, "tools", Listing(), [])})

    def prompt() -> str:
        found, special = normalised(messages), front.model.special_tokens
        goes_on = is_prefill(found, continued, add)
        return plain(chat_prompt(front.chat_template, found, special, add is not False, more, tools, goes_on))

    return json_reply({"prompt": await front.prepare(prompt)})


def _given(body: dict[str, Any], name: str, check: Any, default: Any) -> Any:
    value = body.get(name)
    return default if value is None else check(name, value)
