"""A Hugging Face Hub on this machine: the part of its HTTP interface that the real huggingface_hub client speaks.

Large files are not served by the Hub itself but, as in reality, by a storage under another host name. Connections can be
dropped on purpose, and every request is kept with its headers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_secretOfTheTests"
LARGE = (".gguf", ".safetensors", ".bin", ".png", ".model")  # what .gitattributes of a repository sends to LFS
Answer = tuple[int, bytes, dict[str, str]]


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


class Server(ThreadingHTTPServer):
    """Keeps requests."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], host: str) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://{host}:{self.server_port}"
        self.requests: list[Request] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None: ...

    def seen(self, method: str, part: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None: ...

    def remember(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.command, self.path, headers))  # type: ignore[attr-defined]

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True


# --- the storage of large files --------------------------------------------------------------------------------------


class Storage(Server):
    """Objects by their sha256. Drops the next `drops` transfers after `drop_after` bytes. sent, received: bytes of bodies, dropped ones included."""

    def __init__(self) -> None:
        super().__init__(StorageHandler, "localhost")
        self.objects: dict[str, bytes] = {}
        self.damaged: set[str] = set()
        self.drops = self.drop_after = self.sent = self.received = 0
        self.dropped: set[str] = set()
        self.pause = 0.0  # seconds before the second half of a download
        self.room = 1000  # for so many objects more
        self.lock = threading.Lock()

    def add(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        self.objects[oid] = data
        return oid

    def drops_now(self, upload: str = "") -> bool:
        """Whether this transfer is to be dropped; one upload is dropped only once."""
        with self.lock:
            if self.drops <= 0 or upload in self.dropped:
                return False
            self.drops -= 1
            self.dropped |= {upload} - {""}
            return True


class StorageHandler(Handler):
    server: Storage

    def do_GET(self) -> None:
        self.remember()
        oid = self.path.rsplit("/", 1)[-1]
        if oid not in self.server.objects:
            return self.answer(404, b"{}")
        data = self.server.objects[oid]
        if oid in self.server.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        first = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        part = data[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(part)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        dropped = self.server.drops_now()
        part = part[: self.server.drop_after] if dropped else part
        half = len(part) // 2 if self.server.pause else len(part)
        self.wfile.write(part[:half])
        self.server.sent += half
        if half < len(part):
            time.sleep(self.server.pause)
            self.wfile.write(part[half:])
            self.server.sent += len(part) - half
        if dropped:
            self.hang_up()
        return None

    def do_PUT(self) -> None:
        self.remember()
        oid = self.path.rsplit("/", 1)[-1]
        if self.server.drops_now(upload=oid):
            self.server.received += len(self.rfile.read(self.server.drop_after))
            self.hang_up()
            return None
        data = self.body()
        if self.server.room <= 0:
            return self.answer(507)
        self.server.room -= 1
        self.server.received += len(data)
        assert self.server.add(data) == oid
        return self.answer(200)


# --- the Hub itself --------------------------------------------------------------------------------------------------


@dataclass
class Repo:
    """Branch -> commit, and commit -> path -> content; large contents are in the storage under `oids`."""

    name: str
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, changes: Mapping[str, bytes | None], branch: str = "main") -> str:
        """Add files to a branch; None takes one out."""
        changed = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        files = {path: data for path, data in changed.items() if data is not None}
        name = hashlib.sha1(repr(sorted((path, digest(data)) for path, data in files.items())).encode()).hexdigest()
        self.branches[branch], self.commits[name] = name, files
        return name

    def find(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.branches.get(revision, revision if revision in self.commits else None)


def digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub(Server):
    """All repositories; `storage` has their large files. gguf: what model_info says of GGUF files' architecture."""

    def __init__(self) -> None:
        super().__init__(HubHandler, "127.0.0.1")
        self.storage = Storage()
        self.repos: dict[str, Repo] = {}
        self.refused: dict[str, tuple[int, str]] = {}  # repository -> status, error code
        self.moved: set[str] = set()  # repositories for which it sends clients to another host
        self.architecture = ""

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main", private: bool = False) -> Repo:
        found = self.repos.setdefault(repo, Repo(repo, private))
        for path, data in files.items():
            if path.endswith(LARGE):
                self.storage.add(data)
        found.commit(files, branch)
        return found

    def stop(self) -> None:
        self.storage.stop()
        super().stop()


class HubHandler(Handler):
    server: Hub

    def do_HEAD(self) -> None:
        self.remember()
        path = urlsplit(self.path).path
        for pattern, reply in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self.tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            if found := re.fullmatch(pattern, path):
                repo, revision, *rest = found.groups()
                return self.answer(*self.of_repo(repo, revision or "main", reply, *map(unquote, rest)))
        return self.answer(404, b"{}")

    do_GET = do_HEAD  # noqa: N815

    def do_POST(self) -> None:
        self.remember()
        path, body = urlsplit(self.path).path, self.body()
        if path == "/api/validate-yaml":
            return self.answer(*validate(json.loads(body)["content"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, b'{"error": "Invalid username or password."}')
        if path == "/api/repos/create":
            return self.answer(*self.create(json.loads(body)))
        for pattern, reply in (
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)", self.batch),
        ):
            if found := re.fullmatch(pattern, path):
                repo = self.server.repos.get(found[1])
                return self.answer(*(reply(repo, unquote(found[2]), body) if repo else missing("RepoNotFound")))
        return self.answer(404, b"{}")

    def of_repo(self, name: str, revision: str, reply: Any, *rest: str) -> Answer:
        if name in self.server.moved:
            return 307, b"", {"Location": f"{self.server.storage.url}/api/models/{name}"}
        if name in self.server.refused:
            status, code = self.server.refused[name]
            return status, b"{}", {"X-Error-Code": code}
        repo = self.server.repos.get(name)
        allowed = repo and (not repo.private or self.headers.get("Authorization") == f"Bearer {TOKEN}")
        if not repo or not allowed:
            return missing("RepoNotFound", 401)
        commit = repo.find(revision)
        return reply(name, commit, repo.commits[commit], *rest) if commit else missing("RevisionNotFound")

    # reading

    def info(self, name: str, commit: str, files: dict[str, bytes]) -> Answer:
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [
            {"rfilename": path, **(described(path, data, "sha256") if blobs else {})} for path, data in files.items()
        ]
        gguf = {"gguf": {"architecture": self.server.architecture}} if self.server.architecture else {}
        private = self.server.repos[name].private
        return as_json({"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": [], **gguf})

    def tree(self, _name: str, _commit: str, files: dict[str, bytes]) -> Answer:
        return as_json([{"type": "file", "path": path, **described(path, data, "oid")} for path, data in files.items()])

    def resolve(self, _name: str, commit: str, files: dict[str, bytes], path: str) -> Answer:
        if path not in files:
            return missing("EntryNotFound")
        data, headers = files[path], {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            return 200, data, {**headers, "ETag": f'"{digest(data)}"'}
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": '"of the redirect"'}
        return 302, b"", {**headers, **linked, "Location": f"{self.server.storage.url}/objects/{oid}"}

    # writing

    def create(self, wanted: dict[str, Any]) -> Answer:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.repos:
            problem = {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            return 409, json.dumps(problem).encode(), {}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.add(name, {".gitattributes": b"*.gguf filter=lfs\n"}, private=private)
        return as_json({"url": f"{self.server.url}/{name}", "name": name})

    def branch(self, repo: Repo, branch: str, _body: bytes) -> Answer:
        if branch in repo.branches:
            return 409, b'{"error": "Reference already exists"}', {}
        repo.branches[branch] = repo.branches["main"]
        return as_json({})

    def preupload(self, repo: Repo, revision: str, body: bytes) -> Answer:
        commit = repo.find(revision)
        if commit is None:
            return missing("RevisionNotFound")
        files = []
        for wanted in json.loads(body)["files"]:
            path, old = wanted["path"], repo.commits[commit].get(wanted["path"])
            large = path.endswith(LARGE)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else digest(old)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": files})

    def batch(self, _repo: Repo, _: str, body: bytes) -> Answer:
        objects = []
        for wanted in json.loads(body)["objects"]:
            href = f"{self.server.storage.url}/objects/{wanted['oid']}"
            known = wanted["oid"] in self.server.storage.objects
            objects.append({**wanted, **({} if known else {"actions": {"upload": {"href": href}}})})
        return as_json({"transfer": "basic", "objects": objects})

    def commit(self, repo: Repo, branch: str, body: bytes) -> Answer:
        files: dict[str, bytes | None] = {}
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.storage.objects:
                    return 400, b'{"error": "LFS object not uploaded"}', {}
                files[value["path"]] = self.server.storage.objects[value["oid"]]
            elif key == "deletedFile":
                files[value["path"]] = None
        oid = repo.commit(files, branch)
        return as_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo.name}/commit/{oid}"})


def described(path: str, data: bytes, sha256: str) -> dict[str, Any]:
    """Size and blob of a file; sha256: what the interface calls the hash of a large one."""
    oid = hashlib.sha256(data).hexdigest()
    lfs = {"lfs": {sha256: oid, "size": len(data), "pointerSize": 134}} if path.endswith(LARGE) else {}
    return {"size": len(data), "blobId": digest(data), "oid": digest(data), **lfs}


def validate(card: str) -> Answer:
    """Refuse a model card as the Hub does where its metadata is no YAML, or fields of it have the wrong form."""
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        data = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return 400, json.dumps({"errors": [{"message": str(error)}]}).encode(), {}
    wrong = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(data.get(key, ""), str)]
    wrong += [key for key in ("tags", "language") if not isinstance(data.get(key, []), list)]
    wrong += ["license"] if re.search(r"[^a-z0-9.+-]", data.get("license", "")) else []
    problems = json.dumps({"errors": [{"message": f'"{key}" has a wrong form'} for key in wrong], "warnings": []})
    return (400 if wrong else 200), problems.encode(), {}


def as_json(value: Any) -> Answer:
    return 200, json.dumps(value).encode(), {"Content-Type": "application/json"}


def missing(code: str, status: int = 404) -> Answer:
    return status, b"{}", {"X-Error-Code": code}
