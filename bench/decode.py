"""Decoding speed, side by side: llama.cpp's own runtime and ours in `dense`, `exact` and `predicted` mode, taking turns
in one run.

    python -m bench.decode --shape mistral-7b --active 0.10 --type q4_0 --threads 2 [--rounds N] [--tokens N] [--prompt]
        [--busy N]
    python -m bench.decode MODEL.gguf

Prints medians with their spread, ratios to llama.cpp, bytes read per token (with the activity measured in the run) and
the speed that these bytes allow at the memory bandwidth that ggml's dense product reaches in the same run; with
`--prompt` also prompt processing, load time and resident memory; with `--busy N` also the speed beside N processes that
compute all the time. The speeds of a round are printed as it ends. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.contenders import LLAMA_CPP
from bench.make_model import add_recipe, cached, recipe_of
from bench.race import race, set_up
from bench.tables import console, table
from runtime.base.processors import default_threads
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError

MAX_PROGRAMS = 256  # busy ones
_KINDS = (LLAMA_CPP, "dense", "exact", "predicted")


def measure(
    path: Path, twin: Path | None, threads: int, tokens: int = 64, rounds: int = 5, prompts: bool = False,
    programs: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Race on a model; twin: a stock file with the same weights, or None to make one; programs: busy ones beside it.

    Returns what is printed as JSON.
    """
    if tokens < 1 or rounds < 1:
        raise UserError("--tokens and --rounds: expected at least 1")
    if not 0 <= programs <= MAX_PROGRAMS:
        raise UserError(f"--busy {programs}, expected 0 to {MAX_PROGRAMS}")
    with set_up(path, twin, threads, tokens) as setup:
        return race(setup, tokens, rounds, prompts, lambda text: print(text, file=sys.stderr), programs)


def _decoding(result: Mapping[str, Any]) -> Table:
    bandwidth = result["bandwidth_bytes_per_s"] / 1e9
    spread = f"{result['bandwidth_min'] / 1e9:.1f} - {result['bandwidth_max'] / 1e9:.1f}"
    title = (
        f"decoding {result['model']}, {result['threads']} threads, memory {bandwidth:.1f} GB/s ({spread})\n"
        f"{result['cpu']} ({' '.join(result['instruction_sets'])}), kernels: {result['kernels']}"
    )
    programs = result["busy_programs"]
    beside = (f"beside {programs} busy", "of idle") if programs else ()
    columns = ("", "tokens/s", "min - max", "x llama.cpp", "active", "MB/token", "bound", "of bound", *beside)
    rows = [
        (
            kind,
            f"{r['tokens_per_s']:.2f}",
            f"{r['min']:.2f} - {r['max']:.2f}",
            f"{result['ratios'].get(kind, 1.0):.2f}",
            f"{r['active']:.1%}",
            f"{r['bytes_per_token'] / 1e6:.1f}",
            f"{r['bound_tokens_per_s']:.1f}",
            f"{r['share_of_bound']:.0%}",
            *_busy(r),
        )
        for kind, r in _entries(result)
    ]
    return table(title, columns, rows)


def _busy(r: Mapping[str, Any]) -> tuple[str, ...]:
    """What a contender did beside busy programs, if there were any."""
    if not (beside := r.get("busy")):
        return ()
    return (
        f"{beside['tokens_per_s']:.2f}",
        f"{beside['share_of_idle']:.0%}",
    )


def _entries(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(kind, result[kind]) for kind in _KINDS if kind in result]


def _prompts(result: Mapping[str, Any]) -> Table:
    base = result[LLAMA_CPP]["prompt"]
    rows = [
        (kind, *(f"{r['prompt'][n]:.1f} ({r['prompt'][n] / base[n]:.2f}x)" for n in base))
        for kind, r in _entries(result)
    ]
    return table("prompts, tokens/s (x llama.cpp)", ("", *(f"{n} tokens" for n in base)), rows)


def _loading(result: Mapping[str, Any]) -> Table:
    columns = ("", "load s", "first token s", "peak MB", "anonymous MB", "file MB", "touchable MB")
    keys = ("peak_bytes", "anonymous_bytes", "file_bytes", "touchable_bytes")
    rows = [
        (
            kind,
            f"{r['load_s']:.2f}",
            f"{r['first_token_s']:.2f}",
            *(f"{r['memory'].get(key, 0) / 1e6:.0f}" for key in keys),
        )
        for kind, r in _entries(result)
    ]
    return table("loading a mapped, cached file; memory after decoding", columns, rows)


def show(result: Mapping[str, Any], out: Console) -> None:
    """Print the tables for people."""
    out.print(_decoding(result))
    if "prompt" in result[LLAMA_CPP]:
        out.print(_prompts(result))
        out.print("In every mode a prompt goes through whole matrices where that is expected to be faster.")
        out.print(_loading(result))
    if result["synthetic"]:
        out.print("SYNTHETIC weights: speed and memory only.")
    out.print("The bound is bandwidth / bytes per token; a model that fits the CPU's caches may exceed it.")


def main() -> None:
    parser = HelpParser(
        prog="python -m bench.decode", description="Decoding speed beside llama.cpp on the same weights."
    )
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    add_recipe(parser, required=False)
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="threads for every contender (default: physical cores)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns that count")
    parser.add_argument("--prompt", action="store_true", help="also prompts, load time and memory")
    parser.add_argument("--busy", type=int, default=0, help="also decode beside so many processes that compute")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    path, twin = (args.model, None) if args.model else cached(recipe_of(args))
    result = measure(path, twin, args.threads, args.tokens, args.rounds, args.prompt, args.busy)
    show(result, console())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
