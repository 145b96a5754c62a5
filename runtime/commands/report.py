"""`python -m runtime report`: one HTML page that shows what a model file holds, and where a device of any size would put it."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.base.atomic import check_target, new_path, replacing
from runtime.cli.options import add_json, add_model, note, print_json
from runtime.commands.inspect import size_text
from runtime.commands.plan import add_machine, known, measured
from runtime.errors import UserError
from runtime.hybrid.bandwidth import cpu, speed_of
from runtime.hybrid.choose import usable
from runtime.hybrid.costs import PlanOptions
from runtime.hybrid.devices import DeviceInfo, find, parse_names
from runtime.model_file.reader import GgufFile
from runtime.options import AUTO, RunOptions, SettledOptions
from runtime.report.budgets import placements
from runtime.report.facts import bounds, facts_of, plain
from runtime.report.page import write_page

HELP = "write a page that shows it all: sizes, neurons, predictors, placement"
# Where there is no device and none is described: a card with 8 GB, with its published figure.
ASSUMED = 272e9  # bytes/s
ASSUMED_AS = "GeForce RTX 4060 with 8 GB (as published: GDDR6, 128 bits at 17 Gbit/s)"
_SUFFIXES = (".html", ".htm")


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    add_model(parser)
    parser.add_argument("out", metavar="OUT.html", type=new_path, help="the page")
    parser.add_argument("--force", action="store_true", help="replace OUT.html if it exists")
    add_machine(
        parser,
        "where the slider begins, e.g. 8 or 800MiB (half of what the whole model takes)",
        f"of the device's memory (measured; without a device {ASSUMED / 1e9:g} is assumed, for illustration)",
        " (measured)",
    )
    add_json(parser)


def report(
    model: Path,
    out: Path,
    force: bool = False,
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
    """Write one page, without any network, that shows a model's structure, bytes, neurons and predictors, and its placement at any budget of a device."""
    if out.suffix.lower() not in _SUFFIXES:
        raise UserError(f"`{out}`: expected a name that ends in {' or '.join(_SUFFIXES)}")
    check_target(out, 0, force, "report.html")
    if max(len(vram_budget), len(device_bandwidth or ()), len(parse_names(device) if device else ())) > 1:
        raise UserError("several devices, expected one", "`python -m runtime plan` places models on several")
    described = known(device_bandwidth, cpu_bandwidth, sync_us, positions)
    with GgufFile(model) as file:
        check_target(out, 0, force, inputs=[part.path for part in file.parts])
        run = RunOptions(ffn=ffn, threads=threads, n_ctx=n_ctx, kv_type=kv_type).for_file(file)
        options, machine, free = _machine(run, device, described, threads)
        facts = facts_of(file)
        wanted = vram_budget[0] if vram_budget else None
        placement = placements(file, options, wanted, free)
    rates = {"cpu_tokens_per_s": options.cpu_bandwidth, "device_tokens_per_s": options.device_bandwidths[0]}
    facts |= {"machine": machine, "bounds": bounds(facts, rates)}
    facts["placement"] = {"ffn": run.ffn, "n_ctx": run.n_ctx, "kv_type": kv_type, **placement}
    facts = plain(facts)
    page = write_page(facts).encode("utf-8")
    with replacing(out) as partial:
        partial.write_bytes(page)
    note(f"`{out}`: written, {size_text(len(page))}")
    if as_json:
        print_json(facts)


def _machine(
    run: SettledOptions, device: str | None, described: dict[str, Any], threads: int | None
) -> tuple[PlanOptions, dict[str, Any], int | None]:
    """The planner's options, what the page says of the machine, and the bytes that are free on its device (None: it is not there).

    A device that is named, or else the first GPU unless another one is described, is measured. Where there is none, one is assumed.
    """
    names = device or ("" if "device_bandwidths" in described else AUTO)
    found = find(parse_names(names)) if names else []
    if device or found:
        options = measured(found[0].name if found else names, (), run)
        free, name, otherwise = usable((), found)[0], found[0].description or found[0].name, "measured"
    else:
        rates = (
            described if "cpu_bandwidth" in described else described | {"cpu_bandwidth": _cpu_bandwidth(run.threads)}
        )
        options = replace(PlanOptions(run, (0,), (ASSUMED,), 0.0), **rates)
        free, name, otherwise = None, "" if "device_bandwidths" in described else ASSUMED_AS, "assumed"
    options = replace(options, **described)
    figures = {
        "device": {
            "bandwidth": options.device_bandwidths[0],
            "source": _source("device_bandwidths", described, otherwise),
        },
        "cpu": {"bandwidth": options.cpu_bandwidth, "source": _source("cpu_bandwidth", described, "measured")},
        "sync": {"seconds": options.sync, "source": _source("sync", described, otherwise)},
    }
    return options, figures | {"name": name, "arguments": _arguments(options, found, described, threads)}, free


def _source(name: str, described: dict[str, Any], otherwise: str) -> str:
    return "given" if name in described else otherwise


def _cpu_bandwidth(threads: int) -> float:
    """Measured once, in bytes/s: as many digits as the page's command repeats."""
    return round(speed_of(cpu(), threads).bandwidth / 1e9, 1) * 1e9


def _arguments(options: PlanOptions, found: list[DeviceInfo], described: dict[str, Any], threads: int | None) -> str:
    """Options that make `plan` find the page's placements, but for the budget."""
    shown = {name: value for name, value in vars(options).items() if not found or name in described}
    arguments = {
        "--device": shlex.quote(found[0].name) if found else None,
        "--threads": threads if found else None,
        "--device-bandwidth": _scaled(shown.get("device_bandwidths", (None,))[0], 1e-9),
        "--cpu-bandwidth": _scaled(shown.get("cpu_bandwidth"), 1e-9),
        "--sync-us": _scaled(shown.get("sync"), 1e6) if "sync" in described else None,
        "--ffn": options.ffn,
        "--n-ctx": options.n_ctx,
        "--kv-type": options.run.kv_type,
        "--positions": described.get("n_positions"),
    }
    return " ".join(f"{name} {value}" for name, value in arguments.items() if value is not None)


def _scaled(value: float | None, factor: float) -> str | None:
    return None if value is None else f"{value * factor:.12g}"
