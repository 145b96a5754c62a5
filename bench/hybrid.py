"""Decoding with a GPU, side by side: our runtime and llama.cpp's within the same budgets of device memory, taking turns
in one run.

    python -m bench.hybrid --shape mistral-7b --active 0.10 --type q4_0 [--budgets 25,50,75,100] [--device NAME]
    [--rounds N] [--tokens N]
    python -m bench.hybrid MODEL.gguf

100 % is what everything takes there: weights, keys and values, and the planner's reserve. llama.cpp keeps all on the
device but the FFNs of as few of the first layers as possible; where that does not fit, whole layers. Each turn is a
process of its own, so that the device holds nothing else. Where there is no GPU, it says so and ends with status 2. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.contender_process import ContenderProcess
from bench.contenders import LLAMA_CPP, LlamaCpp, Spec
from bench.make_model import add_recipe, cached, recipe_of
from bench.offload import offloaded
from bench.race import PROMPT, RaceSetup, load_average, set_up
from bench.resident_memory import read_through
from bench.tables import console, table
from runtime.base.processors import default_threads
from runtime.bindings.logs import silence
from runtime.cli.help import HelpParser
from runtime.cli.program import run_command
from runtime.errors import UserError
from runtime.hybrid.choose import machine_options, usable
from runtime.hybrid.costs import PlanOptions, machine_of, model_costs
from runtime.hybrid.devices import DeviceInfo, devices, find
from runtime.hybrid.planner import evaluate
from runtime.model_file.reader import GgufFile
from runtime.options import FFN_MODES, RunOptions

NO_GPU = 2  # exit status
OURS = "lazyneuron"
_GPUS = ("GPU", "IGPU")
_KIB = 1 << 10
_WARM_UP = 16  # tokens
_OF_DECODING = ("tokens", "seconds", "fired", "gates")
_FIRST = PROMPT + _WARM_UP  # position of the first token that counts


@dataclass
class BudgetEntry:
    """One contender within one budget, and its turns so far."""

    spec: Spec
    speeds: list[float] = field(default_factory=list)  # tokens per second
    turns: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, setup: RaceSetup, tokens: int) -> None:
        """Load, decode some tokens to warm up and those that count, and end."""
        read_through(Path(self.spec.path))
        prompt, warm_up, ids = setup.ids[:PROMPT], setup.ids[PROMPT:_FIRST], setup.ids[_FIRST : _FIRST + tokens]
        with ContenderProcess(self.spec) as worker:
            loads = worker.open(prompt)
            reply = worker.ask("decode", prompt=prompt, ids=ids, warm_up=warm_up)
            self.speeds.append(tokens / reply["seconds"])
            self.turns.append({**reply, **loads, **worker.ask("on_device")})

    def figures(self) -> dict[str, Any]:
        """What is printed as JSON; `driver_bytes` is None where the driver does not report free memory."""
        last = {key: value for key, value in self.turns[-1].items() if key not in _OF_DECODING}
        medians = {
            key: statistics.median(turn[key] for turn in self.turns)
            for key in ("load_s", "first_token_s", "driver_bytes")
        }
        return {
            "tokens_per_s": statistics.median(self.speeds),
            "min": min(self.speeds),
            "max": max(self.speeds),
            "active": statistics.mean(self.turns[-1].get("fired", [1.0])),
            **last,
            **medians,
            "driver_bytes": medians["driver_bytes"] or None,
        }


def measure(
    path: Path,
    twin: Path | None,
    device: DeviceInfo,
    percents: Sequence[float],
    threads: int,
    ffn: str | None = None,
    tokens: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Race on a model; twin: a stock file with the same weights, or None to make one; ffn: None for predicted where the
    file has a predictor. Returns what is printed as JSON.
    """
    if tokens < 1 or rounds < 1 or not percents or not all(0 <= percent <= 100 for percent in percents):
        raise UserError("--tokens and --rounds: expected at least 1; --budgets: 0 to 100")
    load = load_average(_say)
    with set_up(path, twin, threads, tokens, _WARM_UP) as setup, GgufFile(path) as file:
        mode = ffn or RunOptions().for_file(file).ffn
        run = RunOptions(ffn=mode, threads=threads, n_ctx=setup.n_ctx).for_file(file)
        options = machine_options([device], usable((), [device]), run)
        full = full_bytes(file, options)
        budgets = [usable((round(full * percent / 100),), [device])[0] // _KIB * _KIB for percent in percents]
        raced = [
            {
                OURS: BudgetEntry(_ours(setup, mode, device, budget)),
                LLAMA_CPP: BudgetEntry(_llama_cpp(setup, file, options, device, budget)),
            }
            for budget in budgets
        ]
        for i in range(rounds):
            _say(f"round {i + 1} of {rounds}")
            for entries in raced:
                for entry in entries.values():
                    entry.turn(setup, tokens)
        return {
            "model": path.name,
            "synthetic": setup.synthetic,
            "blocks": setup.structure.block_count,
            "threads": threads,
            "tokens": tokens,
            "rounds": rounds,
            "ffn": mode,
            "device": {key: getattr(device, key) for key in ("name", "description", "backend", "memory_total")},
            "full_bytes": full,
            "budgets": [
                {
                    "percent": percent,
                    "budget_bytes": budget,
                    **{kind: entry.figures() for kind, entry in entries.items()},
                }
                for percent, budget, entries in zip(percents, budgets, raced, strict=True)
            ],
            "load_average_before": load,
        }


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def full_bytes(file: GgufFile, options: PlanOptions) -> int:
    """What the planner says that all of a model takes on one device, reserve included."""
    blocks, head = model_costs(file, options)
    everything = [(b.neurons,) for b in blocks]
    return evaluate(blocks, head, machine_of(file.structure, options), 0, True, everything).bytes[0]


def _ours(setup: RaceSetup, ffn: str, device: DeviceInfo, budget: int) -> Spec:
    return Spec(ffn, str(setup.path), setup.threads, setup.n_ctx, device.name, budget)


def _llama_cpp(setup: RaceSetup, file: GgufFile, options: PlanOptions, device: DeviceInfo, budget: int) -> Spec:
    """As much as fits with the compute buffers that llama.cpp itself says it needs, and with the margin that ours has
    to leave.
    """
    blocks, head = model_costs(file, replace(options, run=replace(options.run, ffn="dense")))
    spec = Spec(LLAMA_CPP, str(setup.twin), setup.threads, setup.n_ctx, device.name)
    buffers = 0
    while True:
        machine = machine_of(setup.structure, replace(options, budgets=(budget,), reserve=options.margin + buffers))
        placement = offloaded(blocks, head, machine)
        first = placement.resident_from
        layers, cpu_ffns = len(blocks) - first + placement.head, sum(not hot for (hot,) in placement.hot[first:])
        found = replace(spec, layers=layers, cpu_ffns=cpu_ffns)
        needed = LlamaCpp(found).compute_bytes()
        if needed <= buffers:
            return found
        buffers = needed


def _where(r: Mapping[str, Any], n_blocks: int) -> str:
    """What is on the device, in words."""
    if "layers" in r:
        return f"{r['layers']}/{n_blocks + 1} layers" + (f", {r['cpu_ffns']} FFNs not" if r["cpu_ffns"] else "")
    return f"{r['blocks']}/{n_blocks} blocks, {r['hot_share']:.0%} hot" + (", head" if r["head"] else "")


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for budget in result["budgets"]:
        yield (f"{budget['percent']:g} %: {budget['budget_bytes'] / 1e6:.0f} MB",)
        base = budget[LLAMA_CPP]["tokens_per_s"]
        for kind in (LLAMA_CPP, OURS):
            r = budget[kind]
            yield (
                kind,
                f"{r['tokens_per_s']:.2f}",
                f"{r['min']:.2f} - {r['max']:.2f}",
                f"{r['tokens_per_s'] / base:.2f}",
                f"{r['device_bytes'] / 1e6:.0f}",
                "n/a" if r["driver_bytes"] is None else f"{r['driver_bytes'] / 1e6:.0f}",
                _where(r, result["blocks"]),
            )


def show(result: Mapping[str, Any], out: Console) -> None:
    """Print the table for people."""
    device = result["device"]
    title = (
        f"decoding {result['model']}, {result['ffn']}, {result['threads']} threads, "
        f"{device['name']} ({device['description']})"
    )
    columns = ("", "tokens/s", "min - max", "x llama.cpp", "buffers MB", "driver MB", "on the device")
    out.print(table(title, columns, list(_rows(result))))
    out.print(
        "buffers: as each runtime counts its own; driver: by how much the free memory shrank that the driver reports."
    )
    if result["synthetic"]:
        out.print("SYNTHETIC weights: speed and memory only.")


def _percents(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> None:
    parser = HelpParser(
        prog="python -m bench.hybrid",
        description="Decoding speed on a GPU beside llama.cpp with the same memory there.",
    )
    parser.add_argument("model", type=Path, nargs="?", help="a converted GGUF file (else: --shape)")
    add_recipe(parser, required=False)
    parser.add_argument(
        "--device", metavar="NAME", help="a GPU as `python -m runtime devices` lists it (default: the first)"
    )
    parser.add_argument("--budgets", type=_percents, default=[25, 50, 75, 100], metavar="PERCENT[,PERCENT..]",
                        help="of the device memory that everything takes (default: 25,50,75,100)")  # fmt: skip
    parser.add_argument("--ffn", choices=FFN_MODES, help="our mode (default: predicted where the file has a predictor)")
    parser.add_argument(
        "--threads", type=int, default=default_threads(), help="of the CPU, for both (default: physical cores)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded per turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender within each budget")
    args = parser.parse_args()
    silence()
    gpus = [device for kind in _GPUS for device in devices() if device.kind == kind]
    if not gpus:
        parser.exit(NO_GPU, "no GPU: ggml sees none on this machine, nothing is measured (docs/install-gpu.md)\n")
    device = next(iter(find((args.device,)) if args.device else gpus), None)
    if device is None or device.kind not in _GPUS:
        raise UserError(f"device `{args.device}`, expected a GPU: {', '.join(gpu.name for gpu in gpus)}")
    if (args.model is None) == (args.shape is None):
        raise UserError("expected either a model file or --shape")
    path, twin = (args.model, None) if args.model else cached(recipe_of(args))
    result = measure(path, twin, device, args.budgets, args.threads, args.ffn, args.tokens, args.rounds)
    show(result, console())
    print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_command(main))
