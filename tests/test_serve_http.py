"""What a client meets before any answer: names, keys, origins, bodies, errors. Numbers are those of the cases in docs/serve.md."""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from serving import Running, Scripted, end, piece, running

import runtime
from runtime.model import Model
from runtime.serve.settings import Settings

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def model(tiny_gguf: Path) -> Iterator[Model]:
    with runtime.load(tiny_gguf, threads=1, device="none") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    """One that says hello to everybody."""
    service = Scripted(model, lambda _: [piece("Hel", 5), piece("lo", 6), end("Hello", tokens=2)])
    with running(service, lambda: model) as found:
        yield found


@pytest.fixture(scope="module")
def locked(model: Model) -> Iterator[Running]:
    """The same with a key, a page that may use it, a name of its own and one model only."""
    service = Scripted(model, lambda _: [piece("Hello"), end("Hello")])
    settings = Settings(
        "tiny", ("small",), (KEY, "another"), strict_model=True, cors_origins=("https://page.example",), max_body=4096
    )
    with running(service, lambda: model, settings) as found:
        yield found


PROMPT = {"prompt": "Hello"}


def raw(server: Running, data: bytes) -> bytes:
    """What comes back for these bytes."""
    port = int(server.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def request(body: bytes, *headers: str, method: str = "POST", path: str = "/v1/completions") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer(reply: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body or b"{}")


# --- bodies (41) ------------------------------------------------------------------------------------------------------


def test_case_41_bodies_of_any_length_and_form(server: Running) -> None:
    """Case 41: chunked bodies are read; none, no JSON, no object are a 400 in OpenAI's form."""
    body = json.dumps(PROMPT).encode()
    chunked = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (5, body[:5], len(body) - 5, body[5:])
    status, found = answer(raw(server, request(chunked, "Transfer-Encoding: chunked")))
    assert status == 200
    assert found["choices"][0]["text"] == "Hello"
    for wrong in (b"", b"{", b"[1]", b'"x"', b"null", b"\xff\xfe\xfd", b'{"a":NaN}', b"[" * 100_000, b"1" * 10_000):
        status, found = answer(raw(server, request(wrong, f"Content-Length: {len(wrong)}")))
        assert (status, found["error"]["code"]) == (400, "invalid_json"), wrong[:20]
    status, found = answer(raw(server, request(b"")))  # without a length: an empty body
    assert (status, found["error"]["code"]) == (400, "invalid_json")
    status, found = answer(raw(server, request(b"{}", "Content-Length: 2")))
    assert (status, found["error"]["param"]) == (400, "prompt")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_bodies_in_unicode_of_any_kind(server: Running, encoding: str) -> None:
    body = json.dumps({"content": "čaj ☕"}, ensure_ascii=False).encode(encoding)
    reply = server.post("/tokenize", content=body, headers={"Content-Type": "text/plain"})
    ids = reply.json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json()["content"] == "čaj ☕"


def test_charsets(server: Running) -> None:
    body = json.dumps({"content": "é"}, ensure_ascii=False).encode("latin-1")
    found = server.post("/tokenize", content=body, headers={"Content-Type": "application/json; charset=latin-1"})
    assert found.json() == server.post("/tokenize", {"content": "é"}).json()
    for charset in ("klingon", "base64", "idna-x"):
        found = server.post("/tokenize", content=b"{}", headers={"Content-Type": f"text/plain; charset={charset}"})
        assert found.status_code == 415, charset


def test_packed_bodies(server: Running) -> None:
    body = json.dumps({"content": "Hello there"}).encode()
    plain = server.post("/tokenize", content=body).json()
    for name, data in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        assert server.post("/tokenize", content=data, headers={"Content-Encoding": name}).json() == plain, name
    for name, data, status in (
        ("gzip", b"nothing of the kind", 400),
        ("gzip", gzip.compress(body)[:-10], 400),
        ("gzip, gzip, gzip", body, 415),
    ):
        assert server.post("/tokenize", content=data, headers={"Content-Encoding": name}).status_code == status, name
    for name in ("br", "zstd", "gzip, zstd"):  # of which Python 3.10 to 3.13 knows nothing
        reply = server.post("/tokenize", content=b"\x28\xb5\x2f\xfd" + body, headers={"Content-Encoding": name})
        assert (reply.status_code, reply.headers["accept-encoding"]) == (415, "gzip, deflate")
        error = reply.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "unknown_encoding")
        assert "expected gzip, deflate or none" in error["message"]


def test_large_bodies_are_refused_packed_or_not(locked: Running) -> None:
    headers = {"X-Api-Key": KEY}
    large = json.dumps({"content": "x" * 5000}).encode()
    bomb = gzip.compress(b"0" * (1 << 26))
    assert len(bomb) > 4096
    assert locked.post("/tokenize", content=large, headers=headers).status_code == 413
    small_bomb = gzip.compress(b"0" * (1 << 21))
    assert len(small_bomb) < 4096
    packed = headers | {"Content-Encoding": "gzip"}
    assert locked.post("/tokenize", content=small_bomb, headers=packed).status_code == 413
    chunks = (b"x" * 1000 for _ in range(10))  # no length is told
    assert locked.post("/tokenize", content=chunks, headers=headers).status_code == 413


# --- paths and methods (43, 44) ---------------------------------------------------------------------------------------


def test_case_43_careless_paths(server: Running) -> None:
    """Case 43: double slashes and one at the end are no difference."""
    for path in ("//models", "/v1//models", "/v1/models/", "/models", "//v1///models//"):
        assert server.get(path).json()["data"][0]["id"] == "model", path


def test_case_44_nothing_but_the_endpoints(server: Running) -> None:
    """Case 44: no files are served."""
    for path in ("/README.md", "/../pyproject.toml", "/%2e%2e/pyproject.toml", "/.git/config", "/runtime/serve/app.py"):
        reply = server.get(path)
        assert reply.status_code == 404, path
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_methods(server: Running) -> None:
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.post("/v1/models").status_code == 405
    with server.client() as client:
        assert client.head("/health").content == b""
        assert client.head("/v1/models").status_code == 200
        reply = client.options("/v1/chat/completions")
    assert (reply.status_code, "access-control-allow-origin" in reply.headers) == (204, False)


# --- keys (46), names and origins (45) --------------------------------------------------------------------------------


def test_case_46_keys(locked: Running) -> None:
    """Case 46: /health and the page's files are public, everything else asks for the key, paths that are not there too."""
    assert locked.get("/health").json() == {"status": "ok"}
    page = locked.get("/")
    files = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert {PurePosixPath(file).suffix for file in files} >= {".js", ".css"}
    for file in files:
        assert locked.get(f"/{file.lstrip('./')}").status_code == 200, file
    for headers in ({}, {"X-Api-Key": "wrong"}, {"Authorization": f"Basic {KEY}"}, {"Authorization": "Bearer"}):
        for path in ("/v1/models", "/props", "/slots", "/nothing"):
            reply = locked.get(path, headers=headers)
            assert reply.status_code == 401, (path, headers)
            assert reply.json()["error"]["type"] == "authentication_error"
            assert reply.headers["x-should-retry"] == "false"
            assert KEY not in reply.text
    for headers in ({"X-Api-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"authorization": "bearer another"}):
        assert locked.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1:8080", "[::1]:80", "10.1.2.3", "box", "box.local", "a.internal"]
)
def test_case_45_own_names(server: Running, host: str) -> None:
    """Case 45: addresses, names of this machine and of the local network."""
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "[::1", "evil.example:80"]
)
def test_case_45_names_of_others(server: Running, host: str) -> None:
    """Case 45: a name that somebody else may point here is refused (DNS rebinding)."""
    reply = server.get("/v1/models", headers={"Host": host})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")


def test_case_45_foreign_pages(server: Running, locked: Running) -> None:
    """Case 45: pages of others may not send, and get no permission to read; those of this server may, and those named."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "file://"):
        reply = server.post("/v1/completions", PROMPT, headers={"Origin": origin})
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "origin_not_allowed"), origin
        assert "access-control-allow-origin" not in server.get("/v1/models", headers={"Origin": origin}).headers
    assert server.post("/v1/completions", PROMPT, headers={"Origin": server.url}).status_code == 200
    allowed = {"Origin": "https://page.example", "X-Api-Key": KEY}
    reply = locked.post("/v1/completions", PROMPT, headers=allowed)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == "https://page.example"
    with locked.client() as client:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type",
        }
        reply = client.options("/v1/chat/completions", headers={"Origin": "https://page.example", **asked})
        assert reply.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "access-control-allow-credentials" not in reply.headers
        reply = client.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **asked})
        assert "access-control-allow-origin" not in reply.headers
    refused = locked.get("/v1/models", headers={"Origin": "https://page.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"  # or the page could not read why


# --- names of requests and of models (42) -----------------------------------------------------------------------------


def test_case_42_models(server: Running, locked: Running) -> None:
    """Case 42: the list is never empty; other names are served, or refused where the operator says so."""
    found = server.get("/v1/models").json()
    assert found["object"] == "list"
    assert {"id": "model", "object": "model", "owned_by": "lazyneuron"}.items() <= found["data"][0].items()
    assert server.get("/v1/models/model").json() == found["data"][0]
    assert server.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.post("/v1/completions", {**PROMPT, "model": "gpt-4"}).json()["model"] == "model"
    key = {"X-Api-Key": KEY}
    assert [one["id"] for one in locked.get("/v1/models", headers=key).json()["data"]] == ["tiny", "small"]
    reply = locked.post("/v1/completions", {**PROMPT, "model": "gpt-4"}, headers=key)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    for name in ("tiny", "small", None):
        assert locked.post("/v1/completions", {**PROMPT, "model": name}, headers=key).status_code == 200


def test_names_of_requests(server: Running) -> None:
    assert server.get("/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("a b", "x" * 200, "ü", ""):
        found = server.get("/health", headers={"X-Request-Id": odd.encode("latin-1")}).headers["x-request-id"]
        assert found.startswith("req_")


def test_log_has_a_line_a_request_and_no_prompt(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lazyneuron.serve"):
        server.post("/v1/completions", {"prompt": "a secret"}, headers={"X-Request-Id": "logged-1"})
        server.get("/nothing%0aforged%1b[31m")
        server.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "lazyneuron.serve"]
    assert len(lines) == 2
    assert lines[0].startswith("logged-1 POST /v1/completions 200 ")
    assert {"prompt=3", "tokens=2", "end=eos"} <= set(lines[0].split())
    assert "secret" not in "".join(lines)
    assert lines[1].isprintable()


# --- fields -----------------------------------------------------------------------------------------------------------

WRONG = [
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": True}, "top_p"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"seed": "lucky"}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": 5}, "logit_bias"),
    ({"logit_bias": {"5": 200}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"model": 5}, "model"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", {}]}, "prompt[1]"),
    ({"prompt": [1, "a", 1.5]}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": [["a", 1, True]]}, "prompt[0]"),
    ({"prompt": {"prompt_string": "a", "multimodal_data": ["x"]}}, "prompt"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_wrong_fields_are_named(server: Running, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):  # an error before the first piece is an ordinary one
        reply = server.post("/v1/completions", {**PROMPT, "stream": stream, **fields})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"]) == (400, param)
        assert error["type"] == "invalid_request_error"
        assert reply.headers["x-should-retry"] == "false"


def test_null_is_absent_and_unknown_fields_are_ignored(server: Running) -> None:
    nulls = dict.fromkeys(
        ["temperature", "stop", "max_tokens", "seed", "logprobs", "logit_bias", "n", "stream", "suffix", "best_of"]
    )
    reply = server.post("/v1/completions", {**PROMPT, **nulls, "what_is_this": {"deep": [1]}, "user": "me"})
    assert reply.status_code == 200


def test_fields_reach_the_engine(server: Running) -> None:
    body = {"prompt": [5, 6], "temperature": 0.5, "top_k": 7, "seed": -9007199254740991, "stop": "\n", "max_tokens": 9}
    server.post("/v1/completions", {**body, "logprobs": 3, "echo": True, "repetition_penalty": 1.5, "ignore_eos": True})
    service = server.service
    assert isinstance(service, Scripted)
    job = service.jobs[-1]
    assert (job.prompt, job.max_tokens, job.stop, job.top_logprobs) == ((5, 6), 9, ("\n",), 3)
    assert (job.prompt_logprobs, job.ignore_eos) == (True, True)
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_k, sampling.repeat_penalty) == (0.5, 7, 1.5)
    assert sampling.seed == -9007199254740991 % 0xFFFFFFFF
    server.post("/v1/completions", {"prompt": "a"})
    assert service.jobs[-1].max_tokens == 16
    server.post("/v1/completions", {"prompt": "a", "n_predict": -1, "seed": -1})
    assert service.jobs[-1].max_tokens is None
    assert service.jobs[-1].sampling.seed is None


def test_openapi_names_every_field(server: Running) -> None:
    found = server.get("/openapi.json").json()
    body = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert body["properties"]["temperature"]["maximum"] == 100
    assert "max_completion_tokens" in body["properties"]
