"""What is planned for: the options that name or describe a machine, and how a model would run on it."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from runtime.analysis.placement import MachineFigures
from runtime.base.sizes import parse_budget, parse_budgets
from runtime.cli.options import count
from runtime.cli.parser import Parser
from runtime.errors import UserError
from runtime.hybrid.disk_speed import DiskSpeed
from runtime.options import FFN_MODES, KV_TYPES, RunOptions

_OPTIONS = (
    *("device", "vram_budget", "device_bandwidth", "cpu_bandwidth", "sync_us", "threads"),
    *("ffn", "n_ctx", "kv_type", "positions"),
)
_DISK = ("ram_budget", "disk_bandwidth", "disk_reads")  # of commands that know the disk


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
    ram_budget: int | None = None,
    disk_bandwidth: float | None = None,
    disk_reads: float | None = None,
) -> MachineOptions:
    """The options as one value. Bandwidths are in GB/s, sync_us in microseconds, disk_reads in thousands each second.

    Raises UserError for one figure of a disk without the other.
    """
    run = RunOptions(ffn=ffn, threads=threads, n_ctx=n_ctx, kv_type=kv_type, ram_budget=ram_budget)
    figures = MachineFigures(
        device_bandwidths=device_bandwidth and tuple(rate * 1e9 for rate in device_bandwidth),
        cpu_bandwidth=None if cpu_bandwidth is None else cpu_bandwidth * 1e9,
        sync=None if sync_us is None else sync_us * 1e-6,
        n_positions=positions,
        disk=_disk(disk_bandwidth, disk_reads),
    )
    return MachineOptions(device, vram_budget, figures, run)


def _disk(bandwidth: float | None, reads: float | None) -> DiskSpeed | None:
    if bandwidth is None and reads is None:
        return None
    if not bandwidth or not reads:
        raise UserError("--disk-bandwidth and --disk-reads: expected both, above 0, or none of them")
    return DiskSpeed.described(bandwidth * 1e9, reads * 1e3)


def add_machine(
    parser: Parser, budget: str, device_bandwidth: str, cpu_bandwidth: str = "", disk: bool = False
) -> None:
    """What is planned for, which the command gets as `machine`. The texts explain --vram-budget, --device-bandwidth and
    --cpu-bandwidth. disk: whether it may be a budget of main memory, too.
    """
    known = (*_OPTIONS, *_DISK) if disk else _OPTIONS

    def gathered(options: dict[str, Any]) -> dict[str, Any]:
        machine = machine_options(**{name: options[name] for name in known})
        return {name: value for name, value in options.items() if name not in known} | {"machine": machine}

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
    if disk:
        _add_disk(group)
    group.add_argument("--threads", "-t", type=count, metavar="N", help="of the CPU, where its speed is measured")
    run = parser.add_argument_group("running the model")
    run.add_argument("--ffn", choices=FFN_MODES, help="predicted where the file has a predictor, else exact")
    run.add_argument("--n-ctx", "-c", type=count, metavar="N", help="context in tokens (default: the model's, <= 8192)")
    run.add_argument("--kv-type", choices=KV_TYPES, default="f16", help="numbers of the KV cache (f16)")
    run.add_argument("--positions", type=count, metavar="N", help="positions that a token sees (half the context)")


def _add_disk(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ram-budget", type=parse_budget, metavar="GIB",
        help="main memory for the model in place of a device's: what of it is read from the disk for each token",
    )  # fmt: skip
    group.add_argument(
        "--disk-bandwidth", type=_number, metavar="GB/S", help="of the disk, in order (measured with the model's file)"
    )
    group.add_argument(
        "--disk-reads", type=_number, metavar="N",
        help="thousands of reads of 8 KiB each second, 16 at the same time (measured)",
    )  # fmt: skip


def _number(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}, expected a number that is not negative")
    return number


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))
