"""Decoding speed, side by side: llama.cpp's own runtime and ours in all its modes, taking turns in one run.

    python -m bench.decode --shape mistral-7b --active 0.10 --type q4_0 q4_k --threads 1,2 [--rounds N] [--tokens N]
        [--ffn exact,predicted] [--prompt] [--busy N] [--minutes M] [--alone]
    python -m bench.decode MODEL.gguf

Prints medians with their spread, ratios to llama.cpp, bytes read per token (with the activity measured in the run) and
the speed that these bytes allow at the memory bandwidth that ggml's dense product reaches in the same run; with
`--prompt` also prompt processing, load time and resident memory; with `--busy N` also the speed beside N processes that
compute all the time; with `--alone` one model at a time is in memory. A table for each file, with a part for each
number of threads. The speeds of a round are printed as it ends; where the time is over, and after Ctrl-C, the rounds
that have ended are shown. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.decode_tables import show
from bench.machine import describe
from bench.make_model import add_recipe, cached, recipes_of
from bench.race import INTERRUPTED, RacePlan, race, set_up
from bench.tables import console
from runtime.base.processors import default_threads
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError

MINUTES = 10.0  # for each file, making it included
MAX_THREADS = 1024


def measure(
    path: Path, twin: Path | None, threads: Sequence[int], plan: RacePlan, ends: float
) -> Iterator[dict[str, Any]]:
    """Race on a model with each number of threads; twin: a stock file with the same weights, or None to make one.

    ends: of `time.monotonic`, when all should be over. Yields what is printed as JSON; after one that was interrupted
    there are no more.
    """
    with set_up(path, twin, max(threads), plan.tokens) as setup:
        for i, n in enumerate(threads):
            now = time.monotonic()
            result = race(replace(setup, threads=n), plan, _say, now + (ends - now) / (len(threads) - i))
            yield result
            if result["cut_short"] == INTERRUPTED:
                return


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _files(args: argparse.Namespace) -> Iterator[tuple[Path, Path | None]]:
    """The model that was named, or one of each type, made when its turn comes."""
    if args.model:
        yield args.model, None
    else:
        yield from map(cached, recipes_of(args))


def _race_all(args: argparse.Namespace, races: list[dict[str, Any]]) -> bool:
    """Race on every file, show each one's tables and add the results to `races`; returns whether it was interrupted."""
    plan = RacePlan(args.tokens, args.rounds, args.prompt, args.busy, args.ffn, args.alone)
    machine, files = describe(), _files(args)
    while True:
        ends, found = time.monotonic() + 60 * args.minutes, len(races)
        try:
            file = next(files, None)
            if file:
                for result in measure(*file, args.threads, plan, ends):
                    races.append({**result, **machine})  # noqa: PERF401  (an interrupt leaves what is there)
        except KeyboardInterrupt:
            if not races:
                raise
            file, races[-1]["cut_short"] = None, INTERRUPTED
        if races[found:]:
            show(races[found:], console())
        if races and races[-1]["cut_short"] == INTERRUPTED:
            return True
        if not file:
            return False


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not all(1 <= number <= MAX_THREADS for number in numbers):
        raise UserError(f"--threads {text}, expected numbers from 1 to {MAX_THREADS}, with commas")
    return numbers


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _arguments() -> argparse.Namespace:
    parser = HelpParser(
        prog="python -m bench.decode", description="Decoding speed beside llama.cpp on the same weights."
    )
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    add_recipe(parser, required=False, several=True)
    parser.add_argument(
        "--threads", type=_numbers, default=[default_threads()], metavar="N[,N..]",
        help="threads for every contender, or several numbers (default: physical cores)",
    )  # fmt: skip
    parser.add_argument(
        "--ffn", type=_names, default=(), metavar="MODE[,MODE..]", help="our modes (default: all that the file allows)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per turn, of 5 seconds at most")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--prompt", action="store_true", help="also prompts, load time and memory")
    parser.add_argument("--busy", type=int, default=0, help="also decode beside so many processes that compute")
    parser.add_argument(
        "--alone", action="store_true",
        help="one model at a time in memory, loaded anew for each turn: where all of them would not fit",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=MINUTES,
        help="for each file, making it included: then the rounds that have ended are shown (default: 10)",
    )  # fmt: skip
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes}, expected more than 0")
    return args


def main() -> None:
    args, races = _arguments(), list[dict[str, Any]]()
    interrupted = _race_all(args, races)
    print(json.dumps({"races": races}), flush=True)
    if interrupted:
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run_command(main))
