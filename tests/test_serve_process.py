"""The command `serve` as a process: its line, its port, its socket, its signals, its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and sockets of Unix")
SLOW = {"prompt": "The", "max_tokens": 900, "ignore_eos": True, "stream": True}


class Process:
    """A server with its address; stderr is kept in a file. changed: Python that runs before the command."""

    def __init__(
        self, model: Path, folder: Path, *options: str, env: dict[str, str] | None = None, changed: str = ""
    ) -> None:
        self.log = folder / "log"
        program = f"{changed}\nimport sys\nfrom runtime.__main__ import main\nsys.exit(main())"
        start = ["-c", program] if changed else ["-m", "runtime"]
        command = [sys.executable, *start, "serve", str(model), "--threads", "1", "--device", "none", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | (env or {})
            )
        self._line = ""

    @property
    def line(self) -> str:
        """What it says when it answers; waits for that."""
        assert self.process.stdout
        self._line = self._line or self.process.stdout.readline()
        return self._line

    @property
    def url(self) -> str:
        return str(json.loads(self.line)["address"])

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextlib.contextmanager
def serving(
    model: Path, folder: Path, *options: str, env: dict[str, str] | None = None, changed: str = ""
) -> Iterator[Process]:
    found = Process(model, folder, *options, env=env, changed=changed)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()
        assert found.process.stdout
        found.process.stdout.close()


def test_one_line_says_where(tiny_gguf: Path, tmp_path: Path) -> None:
    with serving(tiny_gguf, tmp_path, "--port", "0") as server:
        assert server.line.startswith(f"{tiny_gguf.stem} is served at http://127.0.0.1:")
        assert httpx.get(f"{server.line.split()[-1]}/health").json() == {"status": "ok"}
        assert server.end(signal.SIGINT) == 0
    with serving(tiny_gguf, tmp_path, "--port", "0", "--json", "--alias", "one,two") as server:
        told = json.loads(server.line)
        assert set(told) == {"address", "addresses", "host", "port", "uds", "model", "pid"}
        assert (told["model"], told["pid"]) == ("one", server.process.pid)
        assert server.end() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one address of their own")
def test_several_hosts_have_one_port(tiny_gguf: Path, tmp_path: Path) -> None:
    hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.1")
    options = [word for host in hosts for word in ("--host", host)]
    with serving(tiny_gguf, tmp_path, "--port", "0", "--json", *options) as server:
        told = json.loads(server.line)
        assert told["addresses"] == [f"http://{host}:{told['port']}" for host in hosts[:2]]
        assert told["address"] == told["addresses"][0]
        for address in told["addresses"]:
            assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.3:{told['port']}/health")
        assert server.end() == 0
    with serving(tiny_gguf, tmp_path, "--port", "0", *options) as server:
        assert " and http://127.0.0.2:" in server.line
        assert server.end() == 0


def test_unix_socket(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:  # of a server that was killed
        stale.bind(str(path))
    with serving(tiny_gguf, tmp_path, "--uds", str(path), "--json") as server:
        assert json.loads(server.line)["uds"] == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json={"prompt": "The", "max_tokens": 2}).status_code == 200
        second = subprocess.run(
            [sys.executable, "-m", "runtime", "serve", str(tiny_gguf), "--uds", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (second.returncode, "another server listens there" in second.stderr) == (1, True)
        assert server.end() == 0
    assert not path.exists()


def test_keys_of_the_environment_and_of_a_file(tiny_gguf: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\n\nsecond\n")
    options = ("--port", "0", "--json", "--api-key-file", str(keys), "--api-key", "third")
    with serving(tiny_gguf, tmp_path, *options, env={"LAZYNEURON_API_KEY": "fourth"}) as server:
        statuses = {
            key: httpx.get(f"{server.url}/v1/models", headers={"X-Api-Key": key}).status_code
            for key in ("first", "second", "third", "fourth", "fifth")
        }
        assert statuses == {"first": 200, "second": 200, "third": 200, "fourth": 200, "fifth": 401}
        assert not any(key in server.log.read_text() for key in statuses)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--port", "70000"), "expected 0 to 65535"),
        (("--host", "192.0.2.1"), "192.0.2.1:8080: "),
        (("--port", "0", "--host", "127.0.0.1", "--host", "192.0.2.1"), "192.0.2.1:"),
        (("--host", "no.such.host.invalid"), "expected an address of this machine"),
        (("--api-key", " "), "an API key is empty"),
        (("--parallel", "0"), "expected 1 or more"),
        (("--temp", "1000"), "temperature is 1000.0, expected 0 to 100"),
        (("--n-ctx", "99999"), "expected 1 to 1024"),
    ],
)
def test_mistakes_are_one_line(tiny_gguf: Path, options: tuple[str, ...], words: str) -> None:
    command = [sys.executable, "-m", "runtime", "serve", str(tiny_gguf), "--device", "none", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert len(lines) <= 2


def test_a_port_in_use(tiny_gguf: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "runtime", "serve", str(tiny_gguf), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: 127.0.0.1:{port}: Address already in use\nhint: ")


class Streaming(threading.Thread):
    """A client in the middle of a long answer."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__()
        self.url, self.body, self.lines, self.begun = url, body, list[str](), threading.Event()

    def run(self) -> None:
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{self.url}/v1/completions", json=self.body) as r,
        ):
            for line in r.iter_lines():
                self.lines.append(line)
                if line.startswith("data"):
                    self.begun.set()

    @property
    def last(self) -> str:
        return [line for line in self.lines if line][-1]


def test_case_54_what_was_begun_ends_first(tiny_gguf: Path, tmp_path: Path) -> None:
    """Case 54: SIGTERM refuses new requests, lets streams end, and the process ends well."""
    with serving(tiny_gguf, tmp_path, "--port", "0", "--json") as server:
        client = Streaming(server.url, {**SLOW, "max_tokens": 300})
        client.start()
        assert client.begun.wait(30)
        server.process.send_signal(signal.SIGTERM)
        refused = None
        while client.is_alive() and refused is None:
            with contextlib.suppress(httpx.HTTPError):
                reply = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1})
                refused = reply if reply.status_code == 503 else None
        client.join()
        assert client.last == "data: [DONE]"
        if refused:  # else the stream was quicker
            assert refused.headers["retry-after"] == "1"
        assert server.process.wait(30) == 0


def test_case_54_what_takes_too_long_ends_with_an_error(tiny_gguf: Path, tmp_path: Path) -> None:
    """Case 54: after the time that it has."""
    with serving(tiny_gguf, tmp_path, "--port", "0", "--json", "--drain-seconds", "0") as server:
        client = Streaming(server.url, SLOW)
        client.start()
        assert client.begun.wait(30)
        assert server.end() == 0
        client.join()
        assert json.loads(client.last.removeprefix("data: "))["error"]["type"] == "unavailable_error"


def test_a_second_signal_ends_it_at_once(tiny_gguf: Path, tmp_path: Path) -> None:
    with (
        serving(tiny_gguf, tmp_path, "--port", "0", "--json") as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection,
    ):
        body = json.dumps({**SLOW, "max_tokens": 1000}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(100)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert server.end() in (0, 128 + signal.SIGTERM)  # 0 where the answer ended before
        assert time.monotonic() - began < 20


ENDLESS = """
import time
from runtime.commands import serve
serve.open_noted = lambda *given: time.sleep(600)
"""


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_loaded(tiny_gguf: Path, tmp_path: Path, number: int) -> None:
    """It does not wait for the load, which nothing can interrupt."""
    path = tmp_path / "socket"
    with (
        serving(tiny_gguf, tmp_path, "--uds", str(path), changed=ENDLESS) as server,
        httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client,
    ):
        limit = time.monotonic() + 60
        while not listens(path):
            assert time.monotonic() < limit
            time.sleep(0.02)
        reply = client.get("/health")
        assert (reply.status_code, reply.json()["error"]["status"]) == (503, "loading")
        client.close()
        began = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - began < 30
        assert server.line == ""
        assert server.log.read_text().endswith("the model was still being loaded\n")
    assert not path.exists()


FAILING = """
from runtime.engine import Engine
compute, steps = Engine.compute, iter(range(9))
def failing(*given):
    next(steps)
    return compute(*given)
Engine.compute = failing
"""


def test_case_37_a_dead_engine_ends_the_process(tiny_gguf: Path, tmp_path: Path) -> None:
    """Case 37: who waits gets an error, /health says `dead`, and the process ends with status 1."""
    with serving(tiny_gguf, tmp_path, "--port", "0", "--json", changed=FAILING) as server:
        client = Streaming(server.url, SLOW)
        client.start()
        client.join(60)
        assert json.loads(client.last.removeprefix("data: "))["error"]["type"] == "unavailable_error"
        reply = httpx.get(f"{server.url}/health")
        assert (reply.status_code, reply.json()["error"]["status"]) == (503, "dead")
        assert server.process.wait(60) == 1
        assert "the engine has failed: StopIteration()" in server.log.read_text()


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "runtime", "serve", str(tmp_path / "none.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.startswith("error: ")) == (1, True)
