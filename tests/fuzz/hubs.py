"""A Hub whose answers are damaged: status, headers, JSON, names and sizes. No socket is opened: the client's own transport answers.

Whatever it says, nothing may be written outside the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants, errors

from convert.hub import fetch
from fuzz import mutate_json
from fuzz.worker import Failed, Files, Target
from runtime.hub import locate

_HTTP: Any = importlib.import_module(
    errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
)  # the client's HTTP library
_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_WAITED = 60.0  # seconds of waiting that the answers may cause
_REQUESTS = 300
_WORDS = (
    "rfilename", "siblings", "sha", "lfs", "size", "sha256", "gguf", "architecture", "status", "headers", "body", "ETag", "X-Repo-Commit", "X-Linked-Etag",
    "X-Linked-Size", "Location", "Content-Length", "Content-Range", "Content-Encoding", "Retry-After", "X-Error-Code", "X-Error-Message", "RateLimit", "X-Xet-Hash",
    "gzip", "../../escaped", "/escaped", "..", ".", "a/../../b.gguf", "..\\..\\b.gguf", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "config.json",
    "main", _COMMIT, "RepoNotFound", "GatedRepo", "EntryNotFound", "RevisionNotFound", "https://elsewhere.invalid/x", "http://127.0.0.1/x", "r=0;t=99999", "99999",
    "model.safetensors", "a" * 300 + ".gguf", "\x00.gguf", "CON.gguf",
)  # fmt: skip


def _file(data: str) -> dict[str, Any]:
    etag = hashlib.sha256(data.encode()).hexdigest()
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": _COMMIT, "Content-Length": str(len(data))}
    return {"status": 200, "headers": headers, "body": data}


def _answers(names: list[str]) -> dict[str, Any]:
    files = {name: _file(f"GGUF of {name}") for name in names}
    siblings = [
        {"rfilename": name, "size": len(file["body"]), "lfs": {"sha256": hashlib.sha256(file["body"].encode()).hexdigest(), "size": len(file["body"]), "pointerSize": 134}}
        for name, file in files.items()
    ]  # fmt: skip
    info = {
        "id": "user/repo",
        "sha": _COMMIT,
        "private": False,
        "siblings": siblings,
        "tags": [],
        "gguf": {"architecture": "lazyneuron"},
    }
    return {"info": {"status": 200, "headers": {}, "body": info}, "files": files}


BASES = (
    _answers(["model-q4_0.gguf"]),
    _answers(["model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "README.md"]),
    _answers(["config.json", "model.safetensors", "tokenizer.json"]),
)


def _response(request: Any, told: Any) -> Any:
    told = told if isinstance(told, dict) else {}
    status, headers, body = told.get("status", 200), told.get("headers", {}), told.get("body", "")
    raw = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else json.dumps(body).encode()
    pairs = (
        [(str(k).encode("utf-8", "replace"), str(v).encode("utf-8", "replace")) for k, v in headers.items()]
        if isinstance(headers, dict)
        else []
    )
    pairs = [(k, v) for k, v in pairs if k and not set(k + v) & set(b"\r\n\0")]  # no server's answer has these
    status = status if isinstance(status, int) and 200 <= status < 600 else 500
    return _HTTP.Response(status, headers=pairs, stream=_HTTP.ByteStream(b"" if request.method == "HEAD" else raw))


def _used(folder: Path) -> bool:
    answers = json.loads((folder / "answers.json").read_bytes())
    answers = answers if isinstance(answers, dict) else {}
    requests = waited = 0.0

    def answer(request: Any) -> Any:
        nonlocal requests
        requests += 1
        if requests > _REQUESTS:
            raise Failed(f"requests without end: {request.url}")
        path = unquote(request.url.path)
        if "/resolve/" not in path:
            return _response(request, answers.get("info"))
        files = answers.get("files")
        name = path.partition("/resolve/")[2].partition("/")[2]
        return _response(request, files.get(name, next(iter(files.values()), {})) if isinstance(files, dict) else {})

    def sleep(seconds: float) -> None:
        nonlocal waited
        waited += seconds
        if waited > _WAITED:
            raise Failed(f"waits too long: {waited:.0f} seconds")

    huggingface_hub.set_client_factory(
        lambda: _HTTP.Client(transport=_HTTP.MockTransport(answer), follow_redirects=False)
    )
    cache = folder / "cache"
    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(cache)),
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(time, "sleep", sleep),
    ):
        if "config.json" in json.dumps(answers):
            fetch("user/repo")
        else:
            locate("user/repo")
    return True


def _contained(folder: Path) -> bool:
    beside = set(folder.parent.iterdir())
    try:
        return _used(folder)
    finally:
        escaped = [
            path
            for path in folder.rglob("*")
            if path.relative_to(folder).parts[0] not in ("cache", "out", "answers.json")
        ]
        if escaped or set(folder.parent.iterdir()) - beside:
            raise Failed(f"written outside the cache: {escaped or set(folder.parent.iterdir()) - beside}")


def hub_targets(rng_of: Callable[[str, int], Random]) -> list[Target]:
    """The one target."""
    whole = [json.dumps(base).encode() for base in BASES]

    def make(index: int) -> Files:
        rng = rng_of("hub", index)
        base = rng.choice(whole)
        for _ in range(8):
            data = mutate_json.damaged(rng, base, _WORDS)
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # what is no JSON belongs into a body: this is the transport's own format
                json.loads(data)
                return {"answers.json": data}
        raw = mutate_json.damaged(rng, json.dumps(BASES[0]["info"]["body"]).encode()).decode("utf-8", "replace")
        data = json.dumps(BASES[0] | {"info": {"status": 200, "headers": {}, "body": raw}}).encode()
        return {"answers.json": data}

    return [Target("hub", make, _contained, 1, cache="cache")]
