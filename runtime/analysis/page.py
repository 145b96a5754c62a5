"""All that the page of `python -m runtime report` shows of a model, on a machine that is there, described or
assumed.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

from runtime.analysis.budgets import placements
from runtime.analysis.page_facts import bounds, facts_of, plain
from runtime.analysis.paged_plan import memory_facts
from runtime.analysis.placement import MachineFigures, measured_options
from runtime.errors import UserError
from runtime.hybrid.bandwidth import cpu, speed_of
from runtime.hybrid.choose import usable
from runtime.hybrid.costs import PlanOptions
from runtime.hybrid.devices import DeviceInfo, find, parse_names
from runtime.model_file.reader import GgufFile
from runtime.options import AUTO, SettledOptions

# Where there is no device and none is described: a card with 8 GB, with its published figure.
ASSUMED = 272e9  # bytes/s
ASSUMED_AS = "GeForce RTX 4060 with 8 GB (as published: GDDR6, 128 bits at 17 Gbit/s)"


def page_of(
    file: GgufFile,
    run: SettledOptions,
    threads: int | None,
    device: str | None,
    budgets: tuple[int, ...],
    figures: MachineFigures,
) -> dict[str, Any]:
    """The facts of an open model, as JSON can hold them (docs/commands/runtime-report.md lists them).

    threads: as it was asked for. device: a device of this machine, None for the first GPU, if there is one. budgets:
    bytes of the one device, where the slider begins; () for about half of the model. figures: of the machine, instead
    of those that are measured. Raises UserError for several devices, and for one that is not there.
    """
    names = parse_names(device) if device else ()
    if max(len(budgets), len(figures.device_bandwidths or ()), len(names)) > 1:
        raise UserError("several devices, expected one", "`python -m runtime plan` places models on several")
    machine = _machine(run, device, figures)
    facts = facts_of(file)
    placement = placements(file, machine.options, budgets[0] if budgets else None, machine.free)
    options = machine.options
    rates = {"cpu_tokens_per_s": options.cpu_bandwidth, "device_tokens_per_s": options.device_bandwidths[0]}
    if run.ram_budget is not None:
        facts |= {"memory": memory_facts(file, run, figures)}
    made: dict[str, Any] = plain(
        facts
        | {
            "machine": _described(machine, figures, threads),
            "bounds": bounds(facts, rates),
            "placement": {"ffn": run.ffn, "n_ctx": run.n_ctx, "kv_type": run.kv_type, **placement},
        }
    )
    return made


@dataclass(frozen=True)
class _PlannedMachine:
    """What is planned for. found: its device, None for one that is not here; free: bytes of it that may be used.

    source: where figures come from that nobody gave: "measured" or "assumed".
    """

    options: PlanOptions
    found: DeviceInfo | None
    free: int | None
    name: str
    source: str


def _machine(run: SettledOptions, device: str | None, figures: MachineFigures) -> _PlannedMachine:
    """A device that is named, or else the first GPU unless another one is described, is measured. Where there is none,
    one is assumed.
    """
    names = device or ("" if figures.device_bandwidths else AUTO)
    found = find(parse_names(names)) if names else []
    known = figures.known()
    if device or found:
        first = found[0] if found else None
        options = replace(measured_options(first.name if first else names, (), run), **known)
        assert first
        return _PlannedMachine(options, first, usable((), [first])[0], first.description or first.name, "measured")
    rates = known if "cpu_bandwidth" in known else known | {"cpu_bandwidth": _cpu_bandwidth(run.threads)}
    options = replace(PlanOptions(run, (0,), (ASSUMED,), 0.0), **rates)
    return _PlannedMachine(options, None, None, "" if figures.device_bandwidths else ASSUMED_AS, "assumed")


def _described(machine: _PlannedMachine, figures: MachineFigures, threads: int | None) -> dict[str, Any]:
    options, known = machine.options, figures.known()

    def source(name: str, otherwise: str) -> str:
        return "given" if name in known else otherwise

    return {
        "device": {
            "bandwidth": options.device_bandwidths[0],
            "source": source("device_bandwidths", machine.source),
        },
        "cpu": {"bandwidth": options.cpu_bandwidth, "source": source("cpu_bandwidth", "measured")},
        "sync": {"seconds": options.sync, "source": source("sync", machine.source)},
        "name": machine.name,
        "arguments": _arguments(machine, known, threads),
    }


def _cpu_bandwidth(threads: int) -> float:
    """Measured once, in bytes/s: as many digits as the page's command repeats."""
    return round(speed_of(cpu(), threads).bandwidth / 1e9, 1) * 1e9


def _arguments(machine: _PlannedMachine, known: dict[str, Any], threads: int | None) -> str:
    """Options that make `plan` find the page's placements, but for the budget."""
    options, found = machine.options, machine.found
    shown = {name: value for name, value in vars(options).items() if not found or name in known}
    arguments = {
        "--device": shlex.quote(found.name) if found else None,
        "--threads": threads if found else None,
        "--device-bandwidth": _scaled(shown.get("device_bandwidths", (None,))[0], 1e-9),
        "--cpu-bandwidth": _scaled(shown.get("cpu_bandwidth"), 1e-9),
        "--sync-us": _scaled(shown.get("sync"), 1e6) if "sync" in known else None,
        "--ffn": options.ffn,
        "--n-ctx": options.n_ctx,
        "--kv-type": options.run.kv_type,
        "--positions": known.get("n_positions"),
    }
    return " ".join(f"{name} {value}" for name, value in arguments.items() if value is not None)


def _scaled(value: float | None, factor: float) -> str | None:
    return None if value is None else f"{value * factor:.12g}"
