"""What is planned for: the options that name or describe a machine, and how a model would run on it."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from runtime.analysis.placement import MachineFigures
from runtime.base.sizes import parse_budgets
from runtime.cli.options import count
from runtime.cli.parser import Parser
from runtime.options import FFN_MODES, KV_TYPES, RunOptions

_OPTIONS = (
    *("device", "vram_budget", "device_bandwidth", "cpu_bandwidth", "sync_us", "threads"),
    *("ffn", "n_ctx", "kv_type", "positions"),
)


@dataclass(frozen=True)
class MachineOptions:
    """device: names of devices of this machine, None for one that `figures` describes. budgets: bytes of each."""

    device: str | None
    budgets: tuple[int, ...]
    figures: MachineFigures
    run: RunOptions


def machine_options(
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
) -> MachineOptions:
    """The options as one value. Bandwidths are in GB/s, sync_us in microseconds."""
    figures = MachineFigures(
        device_bandwidths=device_bandwidth and tuple(rate * 1e9 for rate in device_bandwidth),
        cpu_bandwidth=None if cpu_bandwidth is None else cpu_bandwidth * 1e9,
        sync=None if sync_us is None else sync_us * 1e-6,
        n_positions=positions,
    )
    return MachineOptions(
        device, vram_budget, figures, RunOptions(ffn=ffn, threads=threads, n_ctx=n_ctx, kv_type=kv_type)
    )


def add_machine(parser: Parser, budget: str, device_bandwidth: str, cpu_bandwidth: str = "") -> None:
    """What is planned for, which the command gets as `machine`. The texts explain --vram-budget, --device-bandwidth and
    --cpu-bandwidth.
    """

    def gathered(options: dict[str, Any]) -> dict[str, Any]:
        machine = machine_options(**{name: options[name] for name in _OPTIONS})
        return {name: value for name, value in options.items() if name not in _OPTIONS} | {"machine": machine}

    parser.then(gathered)
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


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}, expected a number that is not negative")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))
