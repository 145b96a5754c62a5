"""A Hub whose answers are damaged: status, headers, JSON, names and sizes. No socket is opened: the client's own transport answers.

Whatever it says, nothing may be written outside the cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants, errors

from convert.commands.push import push
from convert.fetch_checkpoint import fetch
from fuzz import mutate_json
from fuzz.bases import MODELS, model_bytes
from fuzz.worker import Failed, Files, Target, seeded
from runtime.hub.locate import locate

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


_OID = "the model's sha256"
PUSH: dict[str, Any] = _answers(["model.gguf", "model-00001-of-00002.gguf", "README.md", "other.gguf"]) | {
    "create": {"status": 200, "headers": {}, "body": {"url": "https://huggingface.co/user/repo", "name": "user/repo"}},
    "branch": {"status": 200, "headers": {}, "body": {}},
    "preupload": {"status": 200, "headers": {}, "body": {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in (("model.gguf", "lfs"), ("README.md", "regular"))]}},
    "batch": {"status": 200, "headers": {}, "body": {"transfer": "basic", "objects": [{"oid": _OID, "size": 1, "actions": {"upload": {"href": "https://huggingface.co/objects/x"}}}]}},
    "upload": {"status": 200, "headers": {}, "body": ""},
    "validate": {"status": 200, "headers": {}, "body": {"errors": [], "warnings": []}},
    "commit": {"status": 200, "headers": {}, "body": {"success": True, "commitOid": _COMMIT, "commitUrl": f"https://huggingface.co/user/repo/commit/{_COMMIT}"}},
}  # fmt: skip
_KINDS = {"create": "/repos/create", "branch": "/branch/", "preupload": "/preupload/", "batch": "/objects/batch", "upload": "/objects/x", "validate": "/validate-yaml", "commit": "/commit/"}  # fmt: skip
_EXPECTED = ("cache", "out", "answers.json", "model.gguf")


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


class _Hub:
    """Answers requests with what a file says, and counts them."""

    def __init__(self, answers: Any) -> None:
        self.answers = answers if isinstance(answers, dict) else {}
        self.requests, self.waited = 0, 0.0

    def answer(self, request: Any) -> Any:
        """The answer to one request."""
        self.requests += 1
        if self.requests > _REQUESTS:
            raise Failed(f"requests without end: {request.url}")
        path, files = unquote(request.url.path), self.answers.get("files")
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            return _response(
                request, files.get(name, next(iter(files.values()), {})) if isinstance(files, dict) else {}
            )
        kind = next((kind for kind, part in _KINDS.items() if part in path), "info")
        return _response(request, self.answers.get(kind))

    def sleep(self, seconds: float) -> None:
        """In place of time.sleep."""
        self.waited += seconds
        if self.waited > _WAITED:
            raise Failed(f"waits too long: {self.waited:.0f} seconds")


@contextlib.contextmanager
def _connected(folder: Path) -> Iterator[None]:
    """huggingface_hub talks to the Hub that `answers.json` describes, with a cache in the folder."""
    hub = _Hub(json.loads((folder / "answers.json").read_bytes()))
    transport = _HTTP.MockTransport(hub.answer)
    huggingface_hub.set_client_factory(lambda: _HTTP.Client(transport=transport, follow_redirects=False))
    beside = set(folder.parent.iterdir())
    with (
        mock.patch.object(constants, "HF_HUB_CACHE", str(folder / "cache")),
        mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),
        mock.patch.object(time, "sleep", hub.sleep),
        mock.patch.dict(os.environ, {"HF_TOKEN": "hf_x"}),
    ):
        try:
            yield
        finally:
            escaped = [str(path) for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in _EXPECTED]
            escaped += map(str, set(folder.parent.iterdir()) - beside)
            if escaped:
                raise Failed(f"written outside the cache: {escaped}")


def _fetched(folder: Path) -> bool:
    with _connected(folder):
        if b"config.json" in (folder / "answers.json").read_bytes():
            fetch("user/repo")
        else:
            locate("user/repo")
    return True


def _pushed(folder: Path) -> bool:
    with _connected(folder), mock.patch("convert.commands.push.note"):  # lines for people, which are no complaints
        push(folder / "model.gguf", "user/repo", plot=False, revision="try", as_json=True)
    return True


def _damaged(rng: Random, base: bytes) -> bytes:
    """Answers with faults: in the file that describes them only such as leave it JSON, in the bodies any."""
    for _ in range(8):
        data = mutate_json.damaged(rng, base, _WORDS)
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(data)
            return data
    answers = json.loads(base)
    kind = rng.choice([kind for kind in answers if kind != "files"])
    answers[kind]["body"] = mutate_json.damaged(rng, json.dumps(answers[kind]["body"]).encode()).decode(
        "utf-8", "replace"
    )
    return json.dumps(answers).encode()


def hub_targets(folder: Path, rng_of: Callable[[str, int], Random]) -> list[Target]:
    """Fetching and pushing."""
    huggingface_hub.logging.set_verbosity_error()  # it tells people of what it tries again
    model = model_bytes(folder, *MODELS["bitnet"])
    whole = [json.dumps(base).encode() for base in BASES]
    sent = json.dumps(PUSH).replace(_OID, hashlib.sha256(model).hexdigest()).encode()

    def answers(rng: Random) -> Files:
        return {"answers.json": _damaged(rng, rng.choice(whole))}

    def push_answers(rng: Random) -> Files:
        return {"answers.json": _damaged(rng, sent), "model.gguf": model}

    fetching, pushing = seeded(rng_of, "hub", answers, _fetched), seeded(rng_of, "push", push_answers, _pushed, 0.5)
    return [replace(fetching, cache="cache"), replace(pushing, cache="cache")]
