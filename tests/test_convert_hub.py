"""Fetching from a Hub: huggingface_hub itself, against a small server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from checkpoints import copy_checkpoint, load_tensors
from plain import PLAIN, convert
from powerinfer_files import predictor_arrays, save_predictors

from runtime.gguf_file import GgufFile

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FORBIDDEN = {"user/gated": (403, "GatedRepo"), "user/missing": (401, "RepoNotFound")}


class Hub(ThreadingHTTPServer):
    """One repository, `user/model`, served from a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fetched: set[str] = set()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_arguments: object) -> None: ...

    def do_HEAD(self) -> None:
        path = urlsplit(self.path).path
        refused = next((answer for repo, answer in FORBIDDEN.items() if repo in path), None)
        if refused:
            self.answer(refused[0], b"{}", {"X-Error-Code": refused[1]} if refused[1] else {})
        elif path.startswith("/api/models/user/model/tree/"):
            files = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": digest(f)} for f in self.files()]
            self.answer(200, json.dumps(files).encode())
        elif path.startswith("/api/models/user/model"):
            siblings = [{"rfilename": file.name} for file in self.files()]
            self.answer(200, json.dumps({"id": "user/model", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/user/model/resolve/{COMMIT}/"):
            self.send_file(self.server.folder / path.rsplit("/", 1)[-1])
        else:
            self.answer(404, b"{}")

    do_GET = do_HEAD  # noqa: N815

    def files(self) -> list[Path]:
        return sorted(self.server.folder.iterdir())

    def send_file(self, file: Path) -> None:
        self.server.fetched.add(file.name)
        self.answer(200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    folder = copy_checkpoint(checkpoint("llama-mha"), tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\nA card.\n")
    torch.save(load_tensors(folder), folder / "pytorch_model.bin")
    (folder / "flax_model.msgpack").write_text("large and useless")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run(hub: Hub, repo: str, out: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(out.parent / "home"), **env}
    command = [sys.executable, "-m", "convert", repo, str(out), "--force", *options, *PLAIN]
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", **settings}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)


def test_only_the_needed_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = run(hub, "user/model", out)
    assert done.returncode == 0, done.stderr
    assert hub.fetched == {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json", "README.md"}
    data = out.read_bytes()
    for text in (b"https://huggingface.co/user/model", b"apache-2.0"):
        assert text in data
    convert(hub.folder, tmp_path / "local.gguf")
    assert data.endswith((tmp_path / "local.gguf").read_bytes()[-400_000:])  # the same tensors

    hub.fetched.clear()
    again = run(hub, "user/model", tmp_path / "again.gguf", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.gguf").read_bytes() == data
    assert hub.fetched == set()


def test_pickles_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    done = run(hub, "user/model", tmp_path / "x.gguf")
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin" in hub.fetched
    assert "flax_model.msgpack" not in hub.fetched


def test_only_predictors_are_fetched_of_their_repository(hub: Hub, tmp_path: Path) -> None:
    local = copy_checkpoint(hub.folder, tmp_path / "local")
    layers = predictor_arrays(2, 32, 256, 32)
    save_predictors(hub.folder / "p", layers, 0.5)
    for file in (hub.folder / "p").iterdir():
        file.rename(hub.folder / file.name)
    (hub.folder / "p").rmdir()
    done = run(hub, str(local), tmp_path / "x.gguf", "--import-predictor", "user/model")
    assert done.returncode == 0, done.stderr
    assert hub.fetched == {"config.json", "model_0.pt", "model_1.pt"}
    with GgufFile(tmp_path / "x.gguf") as file:
        assert file.metadata["lazyneuron.predictor.source"] == "user/model"
        assert file.metadata["lazyneuron.predictor.threshold"] == 0.5


@pytest.mark.parametrize(
    ("repo", "complaint"),
    [
        ("user/gated", "access to it must be granted first"),
        ("user/missing", "no such folder, and no such repository on the Hub"),
    ],
)
def test_refusals(repo: str, complaint: str, hub: Hub, tmp_path: Path) -> None:
    done = run(hub, repo, tmp_path / "x.gguf")
    error, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert error.startswith(f"error: `{repo}`: {complaint}")
    assert hint.startswith("hint: ")
    assert not (tmp_path / "x.gguf").exists()
