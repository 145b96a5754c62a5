"""`python -m runtime devices`: what ggml sees that a model can be put on."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from runtime.base.processors import default_threads
from runtime.cli.options import add_json, count, print_json
from runtime.hybrid.bandwidth import speed_of
from runtime.hybrid.devices import DeviceInfo, devices

HELP = "list the devices that a model can be put on"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `devices`."""
    parser.add_argument(
        "--measure", action="store_true", help="measure how fast they are, and remember it for placing models"
    )
    parser.add_argument("--threads", "-t", type=count, metavar="N", help="of the CPU (one per physical core)")
    add_json(parser)


def show_devices(measure: bool = False, threads: int | None = None, as_json: bool = False) -> None:
    """Print each device's name for --device, its backend, memory and abilities; with measure, how fast it reads weights and exchanges hidden states."""
    found = devices()
    rows = [asdict(d) | (_speed(d, threads) if measure and d.kind != "ACCEL" else {}) for d in found]
    if as_json:
        print_json({"devices": rows})
        return
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_table(rows))
    if all(d.is_stand_in or d.kind == "ACCEL" for d in found):
        console.print(
            "No GPU: either there is none, or llama-cpp-python was installed without support for it (docs/install-gpu.md)."
        )


def _speed(device: DeviceInfo, threads: int | None) -> dict[str, float]:
    speed = speed_of(device, threads or default_threads(), anew=True)
    return {"bandwidth": speed.bandwidth, "sync": speed.sync}


def _table(rows: list[dict[str, object]]) -> Table:
    measured = any("bandwidth" in row for row in rows)
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("name", "backend", "type", "free", "of", "async", "events", *(("GB/s", "sync us") if measured else ()))
    for name in (*columns, "description"):
        table.add_column(name, justify="left" if name in ("name", "backend", "type", "description") else "right")
    for row in rows:
        cells = [str(row["name"]), str(row["backend"]), str(row["kind"])]
        cells += [_gib(row["memory_free"]), _gib(row["memory_total"])]
        cells += ["yes" if row[ability] else "no" for ability in ("asynchronous", "events")]
        if measured:
            cells += [_scaled(row.get("bandwidth"), 1e-9), _scaled(row.get("sync"), 1e6)]
        table.add_row(*cells, str(row["description"]))
    return table


def _gib(n: object) -> str:
    return f"{n / 2**30:.1f} GiB" if isinstance(n, int) else "-"


def _scaled(n: object, factor: float) -> str:
    return f"{n * factor:.1f}" if isinstance(n, float) else "-"
