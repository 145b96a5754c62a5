"""Many clients at once for a while, some of them bad: every answer is that of the request alone, and nothing is lost.

    python tests/serve_soak.py MODEL [--seconds 300] [--clients 64] [--health 1.0] [--growth 0.1]

Clients stream or wait, leave midway, read slowly, drop the connection, and send what is no request. At the end: no wrong
answer, memory as after the first quarter, all slots free, every /health in time. One line of JSON; status 1 if not all is
so.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np

PATH = "/v1/completions"
TEXT = (Path(__file__).parent.parent / "examples/tiny-relu-llama/README.md").read_text()
MALFORMED: list[bytes] = [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": 5}', b'{"prompt": "a", "n": 0}', b"[" * 5000]
OPTIONS = [
    "--parallel",
    "16",
    "--queue",
    "128",
    "--n-ctx",
    "256",
    "--threads",
    "2",
    "--ffn",
    "exact",
    "--deterministic",
]


def requests() -> list[dict[str, Any]]:
    """What is asked for: short and long prompts, greedy and random, bound and not."""
    found = []
    for i in range(24):
        body: dict[str, Any] = {
            "prompt": TEXT[i * 131 :][: 20 + 37 * (i % 12)],
            "max_tokens": 5 + 7 * (i % 6),
            "seed": i,
        }
        body |= (
            {"temperature": 0} if i % 3 == 0 else {"repeat_penalty": 1.1} if i % 3 == 1 else {"presence_penalty": 0.5}
        )
        if i % 8 == 5:
            body |= {"grammar": 'root ::= " " [a-z ]{5,40} "."', "ignore_eos": True, "max_tokens": 60}
        found.append(body)
    return found


@dataclass
class Soak:
    """A run: what is right, and what was seen."""

    url: str
    bodies: list[dict[str, Any]]
    right: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    async def client(self, number: int, ends: float) -> None:
        """One client: an action after the other."""
        chance = random.Random(number)
        actions = (self.whole, self.stream, self.leave, self.slow, self.drop, self.malformed)
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as client:
            while time.monotonic() < ends:
                action = chance.choices(actions, (30, 35, 15, 6, 8, 6))[0]
                try:
                    await action(client, chance)
                except Exception as error:  # a client of ours met what no client should meet
                    self.wrong.append(f"{action.__name__}: {type(error).__name__}: {error}"[:300])
                    await asyncio.sleep(0.5)

    def judge(self, i: int, text: str, kind: str) -> None:
        """Compare an answer with that of the same request alone."""
        self.seen[kind] += 1
        if text != self.right[i]:
            self.wrong.append(f"{kind}, request {i}: {text[:80]!r}, alone {self.right[i][:80]!r}")

    async def whole(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Wait for a whole answer."""
        i = chance.randrange(len(self.bodies))
        reply = await client.post(PATH, json=self.bodies[i])
        if reply.status_code == 429:
            await self.full(reply)
            return
        assert reply.status_code == 200, reply.text
        self.judge(i, reply.json()["choices"][0]["text"], "whole")

    async def full(self, reply: httpx.Response) -> None:
        """The queue is full: come again later."""
        self.seen["full"] += 1
        assert int(reply.headers["retry-after"]) >= 0
        await asyncio.sleep(0.5)

    async def stream(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Read a streamed answer to its end."""
        await self.streamed(client, chance, "stream", None, 0.0)

    async def slow(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Read it slowly."""
        await self.streamed(client, chance, "slow", None, 0.2)

    async def leave(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Leave it midway."""
        await self.streamed(client, chance, "left", chance.randrange(8), 0.0)

    async def streamed(
        self, client: httpx.AsyncClient, chance: random.Random, kind: str, most: int | None, pause: float
    ) -> None:
        """Read a stream; most: events after which to leave."""
        i = chance.randrange(len(self.bodies))
        text, n = "", 0
        async with client.stream("POST", PATH, json={**self.bodies[i], "stream": True}) as reply:
            if reply.status_code == 429:
                await self.full(reply)
                return
            assert reply.status_code == 200, reply.status_code
            async for line in reply.aiter_lines():
                if most is not None and n >= most:
                    self.seen[kind] += 1
                    return
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += "".join(choice["text"] for choice in event["choices"])
                    n += 1
                await asyncio.sleep(pause)
        if most is None:
            self.judge(i, text, kind)

    async def drop(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Send a request, or half of one, and hang up."""
        body = json.dumps(chance.choice(self.bodies)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        _, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        data = head + body
        writer.write(data[: chance.choice((10, len(head), len(data) - 3, len(data)))])
        await writer.drain()
        await asyncio.sleep(chance.choice((0, 0.01, 0.3)))
        writer.transport.abort()
        self.seen["dropped"] += 1

    async def malformed(self, client: httpx.AsyncClient, chance: random.Random) -> None:
        """Send what is no request."""
        reply = await client.post(PATH, content=chance.choice(MALFORMED))
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"]
        self.seen["malformed"] += 1


def watch(port: int, pid: int, told: Connection) -> None:
    """Ask /health ten times a second until something is told, then send back how long each answer took, and the
    server's memory, in MiB. To be run in a process of its own: beside 64 clients a thread waits for its turn.
    """
    health, memory = [], []
    while not told.poll(0.1):
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
        health.append(time.perf_counter() - began)
        pages = Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]
        memory.append(int(pages) / 1024)
    told.send((health, memory))


async def soaked(soak: Soak, clients: int, seconds: float, pid: int) -> None:
    """Compute each request alone, then all of them in company."""
    async with httpx.AsyncClient(base_url=soak.url, timeout=120) as client:
        for body in soak.bodies:
            soak.right.append((await client.post(PATH, json=body)).json()["choices"][0]["text"])
        ours, theirs = multiprocessing.Pipe()
        arguments = (int(soak.url.rpartition(":")[2]), pid, theirs)
        watching = multiprocessing.get_context("spawn").Process(target=watch, args=arguments)
        watching.start()
        theirs.close()  # so that a watch that fails is seen
        ends = time.monotonic() + seconds
        await asyncio.gather(*(soak.client(i, ends) for i in range(clients)))
        ours.send("stop")
        soak.health, soak.memory = ours.recv()
        watching.join()
        await asyncio.sleep(1)
        slots = (await client.get("/slots")).json()
        if any(slot["is_processing"] for slot in slots):
            soak.wrong.append(f"slots are not free: {slots}"[:300])
        for i in (0, 5):
            soak.judge(i, (await client.post(PATH, json=soak.bodies[i])).json()["choices"][0]["text"], "after")


def verdict(soak: Soak, status: int, most: float, growth: float) -> dict[str, Any]:
    """What came of it; `failures` is empty where all is well. most: seconds that /health may take; growth: share by
    which memory may grow.
    """
    health, n = sorted(soak.health), len(soak.memory) // 4
    before, after = (sum(part) / max(1, len(part)) for part in (soak.memory[n : 2 * n], soak.memory[-n:]))
    p99 = health[int(0.99 * (len(health) - 1))]
    failures = soak.wrong[:20]
    if after > (1 + growth) * before:
        failures.append(f"memory grew from {before:.1f} to {after:.1f} MiB")
    if health[-1] > most:
        failures.append(f"/health took {health[-1]:.3f} s")
    if status:
        failures.append(f"the server ended with status {status}")
    return {
        "seen": dict(soak.seen),
        "wrong": len(soak.wrong),
        "health_p99": p99,
        "health_max": health[-1],
        "memory": [round(sum(m) / len(m), 1) for m in np.array_split(soak.memory, 12) if len(m)],
        "memory_before": before,
        "memory_after": after,
        "failures": failures,
    }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description="many clients at once, some of them bad")
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    # A server that hangs takes ever longer; how long one takes that does not is the machine's business, too.
    parser.add_argument("--health", type=float, default=1.0, help="seconds that /health may take at most (1)")
    # Graphs of the batches that come up are made and kept: on a busy machine that takes more than the first quarter.
    parser.add_argument("--growth", type=float, default=0.1, help="share by which memory may grow (0.1)")
    given = parser.parse_args()
    command = [sys.executable, "-m", "runtime", "serve", str(given.model), "--port", "0", "--json", *OPTIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout
        try:
            soak = Soak(json.loads(server.stdout.readline())["address"], requests())
            asyncio.run(soaked(soak, given.clients, given.seconds, server.pid))
            server.send_signal(signal.SIGTERM)
            found = verdict(soak, server.wait(60), given.health, given.growth)
        finally:
            server.kill()
    print(json.dumps(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
