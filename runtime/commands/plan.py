"""`python -m runtime plan`: what a device would hold of a model, and the speed to expect. A device that is described by numbers need not be there."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from runtime.base.sizes import parse_budgets
from runtime.cli.options import add_json, add_model, count, print_json
from runtime.errors import UserError
from runtime.hybrid.choose import machine_options, usable
from runtime.hybrid.costs import Floats, PlanOptions, frequencies, machine_of, model_costs
from runtime.hybrid.devices import find, parse_names
from runtime.hybrid.planner import Device, Machine, Placement, place
from runtime.model_file.reader import GgufFile
from runtime.options import FFN_MODES, KV_TYPES, RunOptions, SettledOptions

HELP = "show what a device would hold, and the speed to expect"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    add_model(parser)
    add_machine(
        parser,
        "memory to use on the device, e.g. 8 or 800MiB; several devices: 8,6 (with --device: what is free)",
        "of the device's memory, one number for each device",
    )
    add_json(parser)


def add_machine(parser: argparse.ArgumentParser, budget: str, device_bandwidth: str, cpu_bandwidth: str = "") -> None:
    """What is planned for: the options behind `known` and `context`. The texts explain --vram-budget, --device-bandwidth and --cpu-bandwidth."""
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--device", metavar="NAME[,NAME]", help="a device of this machine (see `devices`): its speed is measured once"
    )
    group.add_argument("--vram-budget", type=parse_budgets, default=(), metavar="GIB", help=budget)
    group.add_argument("--device-bandwidth", type=_numbers, metavar="GB/S", help=device_bandwidth)
    group.add_argument("--cpu-bandwidth", type=_number, metavar="GB/S", help=f"of main memory{cpu_bandwidth}")
    group.add_argument(
        "--sync-us",
        type=_number,
        metavar="US",
        help="microseconds for going from device to CPU and back (50; with --device: measured)",
    )
    group.add_argument("--threads", "-t", type=count, metavar="N", help="of the CPU, where its speed is measured")
    run = parser.add_argument_group("running the model")
    run.add_argument("--ffn", choices=FFN_MODES, help="predicted where the file has a predictor, else exact")
    run.add_argument("--n-ctx", "-c", type=count, metavar="N", help="context in tokens (default: the model's, <= 8192)")
    run.add_argument("--kv-type", choices=KV_TYPES, default="f16", help="numbers of the KV cache (f16)")
    run.add_argument("--positions", type=count, metavar="N", help="positions that a token sees (half the context)")


def plan(
    model: Path,
    device: str | None = None,
    vram_budget: tuple[int, ...] = (),
    device_bandwidth: tuple[float, ...] | None = None,
    cpu_bandwidth: float | None = None,
    sync_us: float | None = None,
    threads: int | None = None,
    ffn: str | None = None,
    n_ctx: int | None = None,
    kv_type: str = "f16",
    positions: int | None = None,
    as_json: bool = False,
) -> None:
    """Print the split of each layer between device and CPU, bytes per device, the expected time per token and what limits it."""
    described = known(device_bandwidth, cpu_bandwidth, sync_us, positions)
    wanted = RunOptions(ffn=ffn, threads=threads, n_ctx=n_ctx, kv_type=kv_type)
    with GgufFile(model) as file:
        run = wanted.for_file(file)
        if device:
            options = replace(measured(device, vram_budget, run), **described)
        else:
            _check_described(vram_budget, described)
            options = PlanOptions(run, vram_budget, **described)
        report = {"model": str(model), "kv_type": kv_type, **_report(file, options)}
    if as_json:
        print_json(report)
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_table(report))
    for line in _summary(report):
        console.print(line)


def known(
    device_bandwidth: tuple[float, ...] | None,
    cpu_bandwidth: float | None,
    sync_us: float | None,
    positions: int | None,
) -> dict[str, Any]:
    """Those fields of `PlanOptions` that the options (in GB/s and microseconds) give."""
    given: dict[str, Any] = {
        "device_bandwidths": device_bandwidth and tuple(rate * 1e9 for rate in device_bandwidth),
        "cpu_bandwidth": cpu_bandwidth and cpu_bandwidth * 1e9,
        "sync": None if sync_us is None else sync_us * 1e-6,
        "n_positions": positions,
    }
    return {name: value for name, value in given.items() if value is not None}


def measured(device: str, budgets: tuple[int, ...], run: SettledOptions) -> PlanOptions:
    """The planner's options for devices of this machine. Raises UserError for a device that is not there."""
    found = tuple(find(parse_names(device)))
    if not found:
        raise UserError(f"no device `{device}`", "`python -m runtime devices` lists them")
    return machine_options(found, usable(budgets, found), run)


def _check_described(budgets: tuple[int, ...], known: Mapping[str, Any]) -> None:
    missing = [] if budgets else ["--vram-budget"]
    for option, name in (("--device-bandwidth", "device_bandwidths"), ("--cpu-bandwidth", "cpu_bandwidth")):
        missing += [] if name in known else [option]
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing",
            "describe a machine with these options, or name a device of this one: --device",
        )


def _report(file: GgufFile, options: PlanOptions) -> dict[str, Any]:
    machine = machine_of(file.structure, options)
    blocks, head = model_costs(file, options)
    nothing = tuple(Device(0, d.bandwidth) for d in machine.devices)
    cpu_only = place(blocks, head, Machine(nothing, machine.cpu_bandwidth, machine.sync))
    return {
        "ffn": options.ffn,
        "n_ctx": options.n_ctx,
        "calibrated": file.structure.neuron_order == "hot",
        "cpu_only_seconds": cpu_only.seconds,
        **placed(place(blocks, head, machine), machine, [frequencies(file, i) for i in range(len(blocks))]),
    }


def placed(placement: Placement, machine: Machine, frequencies: Sequence[Floats]) -> dict[str, Any]:
    """What is where, and what that is expected to cost. frequencies: how often each neuron fires, per layer."""
    return {
        "seconds": placement.seconds,
        "tokens_per_s": 1 / placement.seconds,
        "parts": placement.parts,
        "limit": placement.limit,
        "head_on_device": placement.head,
        "slack_bytes": placement.slack,
        "devices": [
            {"budget": d.budget, "bytes": used, "reserve": d.reserve if used else 0}
            for d, used in zip(machine.devices, placement.bytes, strict=True)
        ],
        "layers": [_layer(freq, placement, i) for i, freq in enumerate(frequencies)],
    }


def _layer(freq: Floats, placement: Placement, i: int) -> dict[str, Any]:
    """activations: the share of what fires in this layer that the device computes."""
    hot = placement.hot[i]
    return {
        "attention_on_device": i >= placement.resident_from,
        "hot": list(hot),
        "neurons": len(freq),
        "activations": float(freq[: sum(hot)].sum() / (freq.sum() or 1.0)),
        "seconds": placement.block_seconds[i],
        "limit": placement.block_limits[i],
    }


def _table(report: dict[str, Any]) -> Table:
    title = f"{Path(report['model']).name}, {report['ffn']}, context {report['n_ctx']}, KV {report['kv_type']}"
    table = Table(title=title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    for name in ("layers", "attention, KV", "hot neurons", "of all", "activations", "us per layer", "waits for"):
        table.add_column(name, justify="right")
    for first, last, layer in _alike(report["layers"]):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            "device" if layer["attention_on_device"] else "CPU",
            " + ".join(map(str, layer["hot"])),
            f"{sum(layer['hot']) / layer['neurons']:.1%}",
            f"{layer['activations']:.1%}",
            f"{layer['seconds'] * 1e6:.1f}",
            layer["limit"],
        )
    return table


def _alike(layers: list[dict[str, Any]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Runs of layers that are the same in every column: first, last, and what they are."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[start]:
            yield start, i - 1, layers[start]
            start = i


def _summary(report: dict[str, Any]) -> Iterator[str]:
    yield ""
    for i, device in enumerate(report["devices"]):
        reserve = f", {_mib(device['reserve'])} of it for compute buffers" if device["bytes"] else ""
        yield f"device {i}            {_mib(device['bytes'])} of {_mib(device['budget'])}{reserve}"
    yield f"head                {'device' if report['head_on_device'] else 'CPU'}"
    yield f"time per token      {report['seconds'] * 1e3:.3f} ms, {report['tokens_per_s']:.1f} tokens/s (CPU only: {report['cpu_only_seconds'] * 1e3:.3f} ms)"
    for name, seconds in sorted(report["parts"].items(), key=lambda part: -part[1]):
        if seconds:
            yield f"  {name:<24}{seconds * 1e3:9.3f} ms {seconds / report['seconds']:7.1%}"
    yield f"limited by          {report['limit']}"
    if not any(device["bytes"] for device in report["devices"]):
        yield "Nothing is put on a device: either the budget is too small for it, or the CPU alone is as fast."
    elif not all(layer["attention_on_device"] for layer in report["layers"]):
        yield "The first layers stay wholly on the CPU: the budget does more good elsewhere, or cannot hold their keys and values."
    if not report["calibrated"]:
        yield "The file holds no neuron frequencies: every neuron is taken to fire. Convert it without --calibration none."


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}, expected a number that is not negative")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))
