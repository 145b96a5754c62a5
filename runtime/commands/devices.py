"""`python -m runtime devices`: what ggml sees that a model can be put on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from runtime.analysis.devices import DeviceSpeed, device_speeds
from runtime.base.figures import NONE, duration, memory, number
from runtime.cli.options import add_json, count
from runtime.cli.output import console, new_table, print_json
from runtime.cli.parser import Parser


def configure_parser(parser: Parser) -> None:
    """Options of `devices`."""
    parser.add_argument(
        "--measure", action="store_true", help="measure how fast they are, and remember it for placing models"
    )
    parser.add_argument("--threads", "-t", type=count, metavar="N", help="of the CPU (one per physical core)")
    add_json(parser)


def show_devices(measure: bool = False, threads: int | None = None, as_json: bool = False) -> None:
    """Print each device's name for --device, its backend, memory and abilities; with measure, how fast it reads weights
    and exchanges hidden states.
    """
    found = device_speeds(measure, threads)
    if as_json:
        print_json({"devices": [_row(speed) for speed in found]})
        return
    out = console()
    out.print(_table(found))
    if all(speed.device.is_stand_in or speed.device.kind == "ACCEL" for speed in found):
        out.print(
            "No GPU: either there is none, or llama-cpp-python was installed without support for it "
            "(docs/install-gpu.md)."
        )


def _row(found: DeviceSpeed) -> dict[str, Any]:
    speed = {} if found.bandwidth is None else {"bandwidth": found.bandwidth, "sync": found.sync}
    return asdict(found.device) | speed


def _table(found: Sequence[DeviceSpeed]) -> Table:
    measured = any(speed.bandwidth is not None for speed in found)
    texts = ("name", "backend", "type", "description")
    columns = ("name", "backend", "type", "free", "of", "async", "events", *(("GB/s", "sync") if measured else ()))
    table = new_table(*columns, "description", left=texts)
    for speed in found:
        d = speed.device
        cells = [d.name, d.backend, d.kind, memory(d.memory_free), memory(d.memory_total)]
        cells += ["yes" if able else "no" for able in (d.asynchronous, d.events)]
        if measured:
            cells += [NONE if speed.bandwidth is None else number(speed.bandwidth * 1e-9)]
            cells += [NONE if speed.sync is None else duration(speed.sync)]
        table.add_row(*cells, d.description)
    return table
