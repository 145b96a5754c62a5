"""Serving many clients at once: our server in its modes beside llama.cpp's, on the same weights, one after the other.

    python -m bench.serve --shape mistral-7b --layers 8 [--clients 1,2,4,8] [--ffn exact,predicted] [--seconds 15]
    python -m bench.serve MODEL.gguf [--twin TWIN.gguf]

A closed loop: each client asks again as soon as its answer is there, with prompts of 16 to 128 tokens in turn and
answers of `--tokens`. Prints tokens per second of all clients together and of one, the time to the first token and
between tokens (median and 95th percentile). llama-server of the pinned release is compiled where it is not there yet,
and left out where it has no file that it can read. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.llama_server import llama_server
from bench.machine import describe
from bench.make_model import add_recipe, cached, random_ids, recipe_of
from bench.tables import console, table
from runtime.base.processors import default_threads
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError
from runtime.model_file.reader import GgufFile

PROMPTS = (16, 64, 32, 128)  # tokens
N_CTX = 512  # of each request
LLAMA_SERVER = "llama-server"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Load:
    """What clients do. clients: how many at once, for so many seconds; tokens: of an answer; n_vocab: of the model."""

    clients: int
    seconds: float
    tokens: int
    n_vocab: int


@dataclass
class Seen:
    """What clients saw. first, between: seconds; arrivals: when chunks came; chunks, tokens: of whole answers."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    chunks: int = 0
    tokens: int = 0
    errors: int = 0


async def _ask(port: int, body: dict[str, Any], seen: Seen) -> None:
    """One answer, as it streams in."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""])
    began = latest = time.perf_counter()
    writer.write(head.encode() + data)
    n = 0
    try:
        if b" 200 " not in await reader.readline():
            seen.errors += 1
            return
        while line := await reader.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if usage := event.get("usage"):
                seen.tokens += usage["completion_tokens"]
                seen.chunks += n
            if event.get("choices") and event["choices"][0].get("finish_reason") is None:
                now = time.perf_counter()
                (seen.between if n else seen.first).append(now - (latest if n else began))
                seen.arrivals.append(now)
                latest, n = now, n + 1
    finally:
        writer.close()


async def _client(port: int, number: int, load: Load, ends: float, seen: Seen) -> None:
    ids = random_ids(load.n_vocab, 4096)
    turn = number
    while time.perf_counter() < ends:
        n = PROMPTS[turn % len(PROMPTS)]
        start = turn * 131 % (len(ids) - n)
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
        body = {"prompt": ids[start : start + n], "max_tokens": load.tokens, "cache_prompt": False, **options}
        await _ask(port, body, seen)
        turn += load.clients


async def _clients(port: int, load: Load) -> Seen:
    seen = Seen()
    ends = time.perf_counter() + load.seconds
    await asyncio.gather(*(_client(port, i, load, ends, seen) for i in range(load.clients)))
    return seen


def measure(port: int, load: Load) -> dict[str, Any]:
    """What the clients of a load see of a server: figures in seconds and tokens per second. Raises UserError where it
    answers nobody.
    """
    began = time.perf_counter()
    seen = asyncio.run(_clients(port, load))
    if not seen.chunks:
        raise UserError(f"no answer to {load.clients} clients; {seen.errors} were refused")
    per_chunk = seen.tokens / seen.chunks
    # The end, when some clients have had their last answer already, does not count; nor does the beginning.
    low, high = began + 0.2 * load.seconds, began + load.seconds
    n = sum(low <= at < high for at in seen.arrivals)
    speed = n * per_chunk / (high - low)
    return {
        "clients": load.clients,
        "tokens_per_s": speed,
        "per_client": speed / load.clients,
        "errors": seen.errors,
        **{f"first_p{q}": float(np.percentile(seen.first, q)) for q in (50, 95)},
        **{f"between_p{q}": float(np.percentile(seen.between or [0.0], q)) for q in (50, 95)},
    }


@contextmanager
def served(command: Sequence[str], port: int) -> Iterator[None]:
    """A server on a port. Raises UserError where it does not begin."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            ends = time.monotonic() + _START_SECONDS
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > ends:
                    raise UserError(f"`{' '.join(command[:4])} ...` does not serve", "run it by hand to see why")
                time.sleep(0.1)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _command(kind: str, args: argparse.Namespace, model: Path, twin: Path | None, port: int) -> list[str]:
    most = max(args.clients)
    if kind == LLAMA_SERVER:
        assert twin
        options = ["-m", twin, "--port", port, "-np", most, "-c", N_CTX * most, "--threads", args.threads]
        options += ["--threads-batch", args.threads, "--no-cache-prompt"]
        return [str(args.llama_server), *map(str, options)]
    options = [model, "--port", port, "--parallel", most, "--n-ctx", N_CTX, "--ffn", kind, "--threads", args.threads]
    return [sys.executable, "-m", "runtime", "serve", *map(str, options), "--queue", str(4 * most)]


def _race(args: argparse.Namespace, model: Path, twin: Path | None, results: list[dict[str, Any]]) -> None:
    with GgufFile(model) as file:
        n_vocab = file.structure.vocab_size
    ends = time.monotonic() + 60 * args.minutes
    for kind in (*([LLAMA_SERVER] if args.llama_server else []), *args.ffn):
        port = _free_port()
        with served(_command(kind, args, model, twin, port), port):
            measure(port, Load(1, 2.0, args.tokens, n_vocab))  # graphs are built, pages are read
            for clients in args.clients:
                if time.monotonic() + args.seconds > ends:
                    print(f"{kind}, {clients} clients: left out, the time is over", file=sys.stderr)
                    continue
                found = {"server": kind, **measure(port, Load(clients, args.seconds, args.tokens, n_vocab))}
                print("  ".join(_row(found)), file=sys.stderr)
                results.append(found)


def _row(found: dict[str, Any]) -> list[str]:
    times = [f"{1e3 * found[name]:.0f}" for name in ("first_p50", "first_p95", "between_p50", "between_p95")]
    return [
        found["server"],
        str(found["clients"]),
        f"{found['tokens_per_s']:.1f}",
        f"{found['per_client']:.2f}",
        *times,
    ]


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not all(1 <= number <= 32 for number in numbers):
        raise UserError(f"--clients {text}, expected numbers from 1 to 32, with commas")
    return numbers


def _arguments() -> argparse.Namespace:
    parser = HelpParser(prog="python -m bench.serve", description="Many clients at once, beside llama.cpp's server.")
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    add_recipe(parser, required=False)
    parser.add_argument("--clients", type=_numbers, default=[1, 2, 4, 8, 16, 32], metavar="N[,N..]", help="at once")
    parser.add_argument("--ffn", type=lambda text: text.split(","), default=["exact", "predicted"], help="our modes")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every server")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--seconds", type=float, default=15.0, help="for each number of clients")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it")
    parser.add_argument("--llama-server", type=Path, metavar="PATH", help="another one than the pinned release's")
    parser.add_argument("--no-llama-server", action="store_true", help="our server alone")
    parser.add_argument("--twin", type=Path, help="the same weights for llama.cpp (of a --shape: made)")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    if args.llama_server and args.no_llama_server:
        raise UserError("expected either --llama-server or --no-llama-server")
    if args.llama_server and not os.access(args.llama_server, os.X_OK):
        raise UserError(f"`{args.llama_server}`: no program")
    if args.model and args.llama_server and not args.twin:
        raise UserError("--llama-server needs --twin beside a model file: it cannot read ours")
    return args


def _opponent(args: argparse.Namespace) -> Path | None:
    """llama.cpp's server, where it is to race and has a file to read."""
    if args.no_llama_server or (args.model and not args.twin):
        return None
    return args.llama_server or llama_server()


def main() -> None:
    """Run it."""
    args, results = _arguments(), list[dict[str, Any]]()
    args.llama_server = _opponent(args)
    model, twin = (args.model, args.twin) if args.model else cached(recipe_of(args))
    try:
        _race(args, model, twin, results)
    finally:
        if results:
            columns = ["server", "clients", "tokens/s", "each", "first ms", "p95", "between ms", "p95"]
            console().print(table(f"{model.name}, {args.threads} threads", columns, [_row(one) for one in results]))
        print(json.dumps({"model": str(model), "threads": args.threads, "results": results, **describe()}), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
