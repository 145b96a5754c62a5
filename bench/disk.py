"""Decoding in less memory than a model needs, beside llama.cpp in the same memory.

    python -m bench.disk --shape mistral-7b --active 0.10 --type q4_0 [--layers N] [--budgets 100,75,50,35]
        [--ffn predicted,exact] [--threads N] [--rounds N] [--tokens N] [--pressure trimmed|locked]
    python -m bench.disk MODEL.gguf --twin STOCK.gguf

A budget is a share of our file's size. Contenders take turns, one in memory at a time, and no page of either file is in
the system's cache when a turn begins. Prints tokens/s with their spread, bytes and reads of a token from memory and
disk, how long was waited, and the speed that these bytes allow: at the bandwidth of ggml's dense product and at the
disk's speed, both measured in the run, and with memory and disk at work at the same time. The last line is one JSON
object.

--pressure trimmed: llama.cpp keeps what fits, and drops the rest behind each token: the best that it could do
(bench/short_memory.py). locked: a process takes the memory of the machine away until so much is left
while llama.cpp computes (bench/pressure.py), which concerns everybody who uses it; at least 3 GiB are left.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contender_process import BANDWIDTH, ContenderProcess
from bench.contenders import LLAMA_CPP, Spec, in_order
from bench.machine import describe
from bench.make_model import add_recipe, cached, recipe_of
from bench.pressure import Pressure
from bench.race import RaceSetup, load_average, set_up
from bench.resident_memory import drop_cached
from bench.short_memory import TRIMMED
from bench.tables import console, table
from runtime.base.figures import memory
from runtime.base.processors import default_threads
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.compute.traffic import Activity, bytes_per_token
from runtime.errors import UserError
from runtime.hybrid.disk_speed import BUNDLE, DEPTHS, DiskSpeed, disk_speed

LOCKED = "locked"
N_CTX = 512
PROGRAM = 128 << 20  # bytes of Python and libraries, which no budget counts
_SETTLING = 8  # tokens before those that count
_SETTLING_S = 15.0
_MODES = ("predicted", "exact")


@dataclass(frozen=True)
class DiskPlan:
    """How a race is run. budgets: shares of our file's size. tokens: of a turn, which ends after `turn_s` seconds.

    Raises UserError for values out of range.
    """

    budgets: tuple[float, ...] = (1.0, 0.75, 0.5, 0.35)
    modes: tuple[str, ...] = _MODES
    rounds: int = 3
    tokens: int = 64
    turn_s: float = 10.0
    pressure: str = TRIMMED

    def __post_init__(self) -> None:
        if not all(0 < share < math.inf for share in self.budgets):
            raise UserError("--budgets: expected shares above 0, in %, with commas")
        if self.rounds < 1 or not 1 <= self.tokens <= N_CTX // 2 or not self.turn_s > 0:
            raise UserError(f"--rounds, --seconds: expected more than 0; --tokens: 1 to {N_CTX // 2}")


def race(setup: RaceSetup, plan: DiskPlan, say: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    """The figures of each budget, as its turns end."""
    modes = setup.modes(plan.modes)
    bandwidth, disk = _yardsticks(setup)
    for share in plan.budgets:
        budget = int(share * setup.path.stat().st_size)
        say(f"budget {share:.0%}, {memory(budget)}")
        turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in (LLAMA_CPP, *modes)}
        for _ in range(plan.rounds):
            for kind, taken in turns.items():
                with _pressure(plan, kind, budget):
                    taken.append(_turn(setup, plan, kind, budget))
            say("  tokens/s: " + ", ".join(f"{kind} {taken[-1]['speed']:.2f}" for kind, taken in turns.items()))
        found = {kind: _figures(setup, kind, taken, bandwidth, disk) for kind, taken in turns.items()}
        base = found[LLAMA_CPP]["tokens_per_s"]
        for figures in found.values():
            figures["x_llama_cpp"] = figures["tokens_per_s"] / base
        yield {"share": share, "budget": budget, "bandwidth": bandwidth, **_disk_figures(disk), "contenders": found}


@contextmanager
def _pressure(plan: DiskPlan, kind: str, budget: int) -> Iterator[None]:
    """Takes memory away from llama.cpp, if that is wanted: ours keep to a budget by themselves."""
    if plan.pressure != LOCKED or kind != LLAMA_CPP:
        yield
        return
    with Pressure(budget + PROGRAM) as pressure:
        yield
        if not pressure.still_there():
            raise UserError("others needed the memory that was taken away: this race is worth nothing")


def drop_all(setup: RaceSetup) -> None:
    """Let both files leave the page cache."""
    for path in (setup.path, setup.twin):
        drop_cached(path)


def _yardsticks(setup: RaceSetup) -> tuple[float, DiskSpeed]:
    spec = Spec(BANDWIDTH, str(setup.path), setup.threads, N_CTX)
    with ContenderProcess(spec) as yardstick:
        bandwidth = float(yardstick.ask("measure"))
    return bandwidth, disk_speed([setup.path], anew=True)


def _turn(setup: RaceSetup, plan: DiskPlan, kind: str, budget: int) -> dict[str, Any]:
    """One contender, loaded anew: tokens until its memory holds what it would, then those that count."""
    path = setup.twin if kind == LLAMA_CPP else setup.path
    n_ctx = min(N_CTX, setup.n_ctx)
    spec = Spec(kind, str(path), setup.threads, n_ctx, ram_budget=budget, pressure=plan.pressure)
    ids = setup.ids
    drop_all(setup)
    with ContenderProcess(spec) as worker:
        try:
            worker.open(ids[:1])
            worker.ask("decode", prompt=ids[:1], ids=ids[1 : 1 + _SETTLING], limit_s=_SETTLING_S)
            begin = 1 + _SETTLING
            wanted = ids[begin : begin + plan.tokens]
            reply = dict(worker.ask("decode", prompt=ids[:1], ids=wanted, limit_s=plan.turn_s))
            reply |= {"memory": worker.ask("memory")}
        except BaseException:
            worker.kill()
            raise
    reply["seconds"] -= reply.get("aside_s", 0.0)
    return {**reply, "speed": reply["tokens"] / reply["seconds"]}


def _figures(
    setup: RaceSetup, kind: str, turns: Sequence[dict[str, Any]], bandwidth: float, disk: DiskSpeed
) -> dict[str, Any]:
    """Medians of the turns of one contender, and what the bytes of the last one allow."""
    last = turns[-1]
    fired = last.get("fired") or [1.0] * setup.structure.block_count
    gates = last.get("gates") or fired
    activity = Activity("dense" if kind == LLAMA_CPP else kind, fired, gates)
    touched = bytes_per_token(setup.structure, setup.tensors, activity).total
    n, speed = last["tokens"], statistics.median(turn["speed"] for turn in turns)
    read, reads = last["disk_bytes"] / n, last.get("reads", 0) / n
    from_memory, from_disk = touched / bandwidth, disk.seconds(read, reads)
    return {
        "tokens_per_s": speed,
        "min": min(turn["speed"] for turn in turns),
        "max": max(turn["speed"] for turn in turns),
        "bytes_per_token": touched,
        "disk_bytes_per_token": read,
        "reads_per_token": reads,
        "missed": last["paged_bytes"] / max(1, last["wanted_bytes"]) if "wanted_bytes" in last else None,
        "waited": last["waited_s"] / last["seconds"] if "waited_s" in last else None,
        "bound_tokens_per_s": 1 / max(from_memory, from_disk),
        "share_of_bound": speed * max(from_memory, from_disk),
        "share_in_turn": speed * (from_memory + from_disk),  # of what one after the other allows
        "memory": last["memory"],
    }


def _disk_figures(disk: DiskSpeed) -> dict[str, Any]:
    return {
        "disk_sequential": disk.sequential,
        "disk_reads": dict(zip(map(str, DEPTHS), disk.reads, strict=True)),
        "disk_read_bytes": BUNDLE,
    }


_COLUMNS = (
    *("", "tokens/s", "min - max", "x llama.cpp", "MB/token", "from disk", "reads", "missed", "waited"),
    *("bound", "of bound", "in turn"),
)


def show(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print the table."""
    rows: list[tuple[str, ...]] = []
    for result in results:
        rows.append((f"{result['share']:.0%}, {memory(result['budget'])}",))
        rows += [_cells(kind, result["contenders"][kind]) for kind in result["contenders"]]
    first = results[0]
    reads = ", ".join(f"{reads / 1e3:.1f}" for reads in first["disk_reads"].values())
    title = (
        f"decoding {facts['model']} in less memory, {facts['threads']} threads, {facts['date']}\n{facts['cpu']}, "
        f"memory {first['bandwidth'] / 1e9:.1f} GB/s, disk {first['disk_sequential'] / 1e9:.2f} GB/s in sequence,\n"
        f"{reads} thousand reads of {BUNDLE} bytes/s, {', '.join(map(str, DEPTHS))} at the same time"
    )
    out = console()
    out.print(table(title, _COLUMNS, rows))
    out.print(
        f"llama.cpp: {'its pages dropped behind each token' if facts['pressure'] == TRIMMED else 'memory locked'}."
    )
    if facts["synthetic"]:
        out.print("SYNTHETIC weights: speed and memory only.")


def _cells(kind: str, r: dict[str, Any]) -> tuple[str, ...]:
    return (
        kind,
        f"{r['tokens_per_s']:.2f}",
        f"{r['min']:.2f} - {r['max']:.2f}",
        f"{r['x_llama_cpp']:.2f}",
        f"{r['bytes_per_token'] / 1e6:.0f}",
        f"{r['disk_bytes_per_token'] / 1e6:.1f}",
        f"{r['reads_per_token']:.0f}" if r["reads_per_token"] else "",
        "" if r["missed"] is None else f"{r['missed']:.1%}",
        "" if r["waited"] is None else f"{r['waited']:.0%}",
        f"{r['bound_tokens_per_s']:.2f}",
        f"{r['share_of_bound']:.0%}",
        f"{r['share_in_turn']:.0%}",
    )


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) / 100 for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(in_order(text.split(",")))


def _arguments() -> argparse.Namespace:
    parser = HelpParser(prog="python -m bench.disk", description="Decoding in less memory, beside llama.cpp.")
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    parser.add_argument("--twin", type=Path, help="the same weights for llama.cpp (made where it is not given)")
    add_recipe(parser, required=False)
    plan = DiskPlan()
    parser.add_argument(
        "--budgets", type=_shares, default=plan.budgets, metavar="%[,%..]", help="of our file's size (100,75,50,35)"
    )
    parser.add_argument("--ffn", type=_names, default=plan.modes, metavar="MODE[,MODE..]", help="our modes")
    parser.add_argument("--threads", type=int, default=default_threads(), help="(default: physical cores)")
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="turns of each contender (3)")
    parser.add_argument("--tokens", type=int, default=plan.tokens, help="decoded in a turn, at most (64)")
    parser.add_argument("--seconds", type=float, default=plan.turn_s, help="of a turn, at most (10)")
    parser.add_argument("--pressure", choices=(TRIMMED, LOCKED), default=TRIMMED, help="what keeps llama.cpp short")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    return args


def main() -> None:
    args = _arguments()
    plan = DiskPlan(args.budgets, args.ffn, args.rounds, args.tokens, args.seconds, args.pressure)
    others = load_average(_say)
    path, twin = (args.model, args.twin) if args.model else cached(recipe_of(args))
    results: list[dict[str, Any]] = []
    with set_up(path, twin, args.threads, _SETTLING + plan.tokens) as setup:
        facts = {"model": path.name, "synthetic": setup.synthetic, "threads": args.threads, "pressure": plan.pressure}
        facts |= {**describe(), "load_average_before": others}
        results += race(setup, plan, _say)
    show(results, facts)
    print(json.dumps({**facts, "budgets": results}), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
