"""/v1/models: there is one."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from runtime.serve.errors import ApiError
from runtime.serve.front import Front
from runtime.serve.replies import json_reply


async def models(front: Front, _: Request) -> Response:
    """The model under all its names. Does not wait for anything that is computed."""
    return json_reply({"object": "list", "data": [_described(front, name) for name in front.settings.names]})


async def model(front: Front, request: Request) -> Response:
    """One of these."""
    name = request.path_params["name"]
    if name not in front.settings.names:
        raise ApiError(404, f"the model `{name[:80]}` does not exist", "model", "model_not_found")
    return json_reply(_described(front, name))


def _described(front: Front, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {"id": name, "object": "model", "created": int(front.service.started)}
    about["owned_by"] = "lazyneuron"
    if front.service.state in ("ready", "draining"):
        s = front.model.structure
        size = sum(tensor.nbytes for tensor in front.model.tensors.values())
        about["meta"] = {"n_ctx": front.model.n_ctx, "n_ctx_train": s.context_length, "n_vocab": s.vocab_size}
        about["meta"] |= {"n_embd": s.embedding_length, "size": size}
    return about
