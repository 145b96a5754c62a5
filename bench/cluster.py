"""Stages beside one engine: what a hop costs, and how many tokens a pipeline gives.

    python -m bench.cluster MODEL.gguf [--stages 2,4] [--sequences 1,2,4,8,16] [--tokens N] [--threads N]
    python -m bench.cluster --shape mistral-7b --type q4_0 --layers 8

All stages are processes of a Ray cluster (on this machine, unless RAY_ADDRESS names another), with --threads threads
each (1). `computing`: of a token's time, what all stages spent on its blocks; `a hop`: the rest, over the number of
stages: sending, waking, receiving, and the way back. Then a calculation: the same stages on machines of their own, by
what a work of so many tokens was measured to take and the measured hop; and a model of 70 billion parameters, and one
of eight experts, on 2 to 64 machines and three networks. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import describe
from bench.make_model import add_recipe, cached, random_ids, recipe_of
from bench.pipeline import NETWORKS, SEQUENCES, Line, best
from bench.tables import console, table
from runtime.base_engine import BaseEngine
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.compute.batch import Batch
from runtime.errors import UserError
from runtime.model import open_model
from runtime.options import RunOptions
from runtime.stages.opening import connect
from runtime.stages.staged_engine import StagedEngine

_WARM_UP = 3  # rounds that do not count: graphs are made
_BANDWIDTH = 60e9  # bytes/s of each machine in the calculation of large models
# Bytes of a token, and of a hidden state: Q4_0 with 10 % of the neurons, as `python -m bench.simulate` counts them.
_LARGE = (("70B dense, 80 layers", 13.6e9, 80, 8192 * 4), ("8x7B, 32 layers", 3.5e9, 32, 4096 * 4))
_MACHINES = (2, 4, 8, 16, 32, 64)


def decode(engine: BaseEngine, n_sequences: int, n_tokens: int) -> tuple[float, float | None]:
    """Seconds of a round in which each sequence gets a token, and what stages computed in it (None without any), the
    medians. No groups are made: one work goes through all stages.
    """
    ids = random_ids(engine.structure.vocab_size, _WARM_UP + n_tokens)
    engine.exclusively(engine.cells.clear)
    computed: list[float] = []
    if isinstance(engine, StagedEngine):
        engine.on_work = lambda seconds: computed.append(sum(seconds))
        engine.groups_wanted = 1
    rounds = []
    for at, token in enumerate(ids):
        started = time.perf_counter()
        engine.compute(Batch.together([Batch.of([token], at, k) for k in range(n_sequences)]))
        rounds.append(time.perf_counter() - started)
    inside = statistics.median(computed[_WARM_UP:]) if computed else None
    return statistics.median(rounds[_WARM_UP:]), inside


def measure(path: Path, stages: int | None, sequences: Sequence[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """By number of sequences, what an engine of so many stages does."""
    options = RunOptions(
        threads=args.threads, device="none", sequences=max(sequences), n_ctx=args.tokens + 8, stages=stages
    )
    found = []
    with open_model(path, options) as model:
        for n in sequences:
            seconds, inside = decode(model.engine, n, args.tokens)
            hop = None if inside is None or stages is None else (seconds - inside) / stages
            found.append({"stages": stages, "sequences": n, "seconds": seconds, "computing": inside, "hop": hop})
    return found


def simulated(results: list[dict[str, Any]], n_stages: int) -> list[dict[str, Any]]:
    """The same stages on machines of their own: tokens/s by number of sequences."""
    own = [r for r in results if r["stages"] == n_stages]
    work = Line.through({r["sequences"]: r["computing"] for r in own}).divided(n_stages)
    hop = statistics.median(r["hop"] for r in own)
    one, _ = best(work, n_stages, 1, hop)
    rows = []
    for n in SEQUENCES:
        speed, groups = best(work, n_stages, n, hop)
        rows.append({"stages": n_stages, "sequences": n, "tokens_per_s": speed, "groups": groups, "x_one": speed / one})
    return rows


def large(share: float) -> list[dict[str, Any]]:
    """Large models on many machines. share: of a work's time with one token, what each token more adds."""
    rows = []
    for name, nbytes, layers, hidden in _LARGE:
        for machines in (m for m in _MACHINES if m <= layers):
            whole = nbytes / _BANDWIDTH
            work = Line(whole * (1 - share), whole * share).divided(machines)
            for network in NETWORKS:
                row: dict[str, Any] = {"model": name, "machines": machines, "network": network.name}
                for n in (1, 16, 64):
                    groups_of = max(1, n // (2 * machines))
                    row[str(n)] = best(work, machines, n, network.hop(hidden * groups_of))[0]
                row["network_share"] = machines * network.hop(hidden) / (whole + machines * network.hop(hidden))
                rows.append(row)
    return rows


def show(results: list[dict[str, Any]], calculated: list[dict[str, Any]], models: list[dict[str, Any]]) -> None:
    """Print the tables."""
    out = console()
    rows = [
        (
            f"{r['stages'] or 'one engine'}",
            f"{r['sequences']}",
            f"{r['sequences'] / r['seconds']:.2f}",
            f"{1e3 * r['seconds']:.2f}",
            "" if r["computing"] is None else f"{1e3 * r['computing']:.2f}",
            "" if r["hop"] is None else f"{1e3 * r['hop']:.2f}",
        )
        for r in results
    ]
    out.print(table("Measured", ("stages", "sequences", "tokens/s", "ms a round", "computing", "a hop"), rows))
    own = [
        (f"{r['stages']}", f"{r['sequences']}", f"{r['tokens_per_s']:.2f}", f"{r['x_one']:.2f}", f"{r['groups']}")
        for r in calculated
    ]
    out.print(
        table(
            "Calculated: stages on machines of their own", ("stages", "sequences", "tokens/s", "x one", "groups"), own
        )
    )
    many = [
        (
            r["model"], f"{r['machines']}", r["network"],
            *(f"{r[n]:.1f}" for n in ("1", "16", "64")), f"{r['network_share']:.1%}",
        )
        for r in models
    ]  # fmt: skip
    columns = ("model", "machines", "network", "1 sequence", "16", "64", "of 1: network")
    out.print(table(f"Calculated, tokens/s, {_BANDWIDTH / 1e9:.0f} GB/s each", columns, many))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = HelpParser(prog="python -m bench.cluster", description="Stages beside one engine.")
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    add_recipe(parser, required=False)
    parser.add_argument("--stages", type=_numbers, default=(2, 4), metavar="N[,N..]", help="(2,4)")
    parser.add_argument("--sequences", type=_numbers, default=SEQUENCES, metavar="N[,N..]", help="at once")
    parser.add_argument("--tokens", type=int, default=16, help="rounds that are measured (16)")
    parser.add_argument("--threads", type=int, default=1, help="of each stage, and of the one engine (1)")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    if min(*args.stages, *args.sequences, args.tokens, 2) < 1 or max(args.sequences) > 16:
        raise UserError("--stages, --tokens: expected 1 or more; --sequences: 1 to 16")
    path = args.model or cached(recipe_of(args))[0]
    connect(max(args.stages) * args.threads)
    results = [r for stages in (None, *args.stages) for r in measure(path, stages, args.sequences, args)]
    calculated = [row for stages in args.stages for row in simulated(results, stages)]
    alone = Line.through({r["sequences"]: r["seconds"] for r in results if r["stages"] is None})
    models = large(alone.token / alone(1))
    show(results, calculated, models)
    facts = {"model": path.name, "threads": args.threads, **describe()}
    print(json.dumps({**facts, "measured": results, "calculated": calculated, "large": models}), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
