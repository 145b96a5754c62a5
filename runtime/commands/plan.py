"""`python -m runtime plan`: what a device would hold of a model, and the speed to expect. A device that is described by
numbers need not be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from runtime.analysis.paged_plan import PagedLayer, PagedPlan, paged_plan
from runtime.analysis.placement import PlacedLayer, PlanReport, plan_report
from runtime.base.figures import duration, memory, number, share, size
from runtime.cli.machine import MachineOptions, add_machine
from runtime.cli.options import add_json, add_model
from runtime.cli.output import console, new_table, print_json
from runtime.cli.parser import Parser
from runtime.errors import UserError
from runtime.hybrid.disk_speed import BUNDLE, DEPTHS, USUAL
from runtime.model_file.reader import GgufFile

Layer = TypeVar("Layer", PlacedLayer, PagedLayer)

_UNCALIBRATED = (
    "The file holds no neuron frequencies: every neuron is taken to fire. Convert it without --calibration none."
)


def configure_parser(parser: Parser) -> None:
    """Options of `plan`."""
    add_model(parser)
    add_machine(
        parser,
        "memory to use on the device, e.g. 8 or 800MiB; several devices: 8,6 (with --device: what is free)",
        "of the device's memory, one number for each device",
        disk=True,
    )
    add_json(parser)


def plan(model: Path, machine: MachineOptions, as_json: bool = False) -> None:
    """Print the split of each layer between device and CPU, bytes per device, the expected time per token and what
    limits it.
    """
    if machine.run.ram_budget is not None:
        _plan_memory(model, machine, as_json)
        return
    with GgufFile(model) as file:
        found = plan_report(file, machine.run.for_file(file), machine.device, machine.budgets, machine.figures)
    if as_json:
        print_json(found.as_json())
        return
    out = console()
    out.print(_table(found))
    for line in _summary(found):
        out.print(line)


def _plan_memory(model: Path, machine: MachineOptions, as_json: bool) -> None:
    """The same for a budget of main memory and the disk. Raises UserError where there is to be a device, too."""
    figures = machine.figures
    if machine.device or machine.budgets or figures.device_bandwidths:
        raise UserError("a budget of main memory with a device, expected the CPU alone", "plan for one of them")
    with GgufFile(model) as file:
        run = machine.run.for_file(file)
        found = paged_plan(file, run, figures.cpu_bandwidth, figures.n_positions, figures.disk)
    if as_json:
        print_json(found.as_json())
        return
    out = console()
    for line in (_paged_table(found), *_paged_summary(found)):
        out.print(line)


def _paged_table(found: PagedPlan) -> Table:
    title = f"{Path(found.model).name}, {found.ffn}, context {found.n_ctx}, KV {found.kv_type}"
    table = new_table("layers", "in memory", "from the disk", "reads", "waiting", title=title)
    for first, last, layer in _alike(found.layers):
        layers = str(first) if first == last else f"{first}-{last}"
        reads = f"{layer.reads:,.0f}"
        table.add_row(layers, share(layer.held), size(layer.read), reads, duration(layer.seconds))
    return table


def _paged_summary(found: PagedPlan) -> Iterator[str]:
    used = found.weights + found.kv + found.buffers + found.neurons
    yield ""
    yield f"main memory         {memory(used)} of {memory(found.ram_budget)}"
    for name, n in (("weights", found.weights), ("keys, values", found.kv), ("buffers, at most", found.buffers)):
        yield f"  {name:<18}{memory(n)}"
    yield f"  {'neurons':<18}{memory(found.neurons)} of {memory(found.rows)}"
    reads = f"{found.disk.reads[DEPTHS.index(USUAL)]:,.0f}"
    yield f"disk                {size(found.disk.sequential)}/s in order, {reads} reads of {BUNDLE} bytes/s"
    yield f"from the disk       {size(found.read)} per token in {found.reads:,.0f} reads"
    alone = f"all in memory: {duration(found.in_memory_seconds)}"
    yield f"time per token      {duration(found.seconds)}, {number(found.tokens_per_s)} tokens/s ({alone})"
    for name, seconds in sorted(found.parts.items(), key=lambda part: -part[1]):
        yield f"  {name:<24}{duration(seconds):>9} {share(seconds / found.seconds):>8}"
    yield f"limited by          {found.limit}"
    if not found.calibrated:
        yield _UNCALIBRATED


def _table(found: PlanReport) -> Table:
    title = f"{Path(found.model).name}, {found.ffn}, context {found.n_ctx}, KV {found.kv_type}"
    columns = ("layers", "attention, KV", "hot neurons", "of all", "activations", "time per layer", "waits for")
    table = new_table(*columns, title=title)
    for first, last, layer in _alike(found.placed.layers):
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            "device" if layer.attention_on_device else "CPU",
            _hot(layer),
            share(layer.held),
            share(layer.activations),
            duration(layer.seconds),
            layer.limit,
        )
    return table


def _hot(layer: PlacedLayer) -> str:
    """The neurons on each device; of experts, those of each."""
    longer = f"; of {len(layer.longer_experts)} experts {layer.longer}" if layer.longer else ""
    return " + ".join(map(str, layer.hot)) + longer


def _alike(layers: Sequence[Layer]) -> Iterator[tuple[int, int, Layer]]:
    """Runs of layers that are the same in every column: first, last, and what they are."""
    start = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or layers[i] != layers[start]:
            yield start, i - 1, layers[start]
            start = i


def _summary(found: PlanReport) -> Iterator[str]:
    placed = found.placed
    yield ""
    for i, device in enumerate(placed.devices):
        reserve = f", {memory(device.reserve)} of it for compute buffers" if device.bytes else ""
        yield f"device {i}            {memory(device.bytes)} of {memory(device.budget)}{reserve}"
    yield f"head                {'device' if placed.head_on_device else 'CPU'}"
    alone = f"CPU only: {duration(found.cpu_only_seconds)}"
    yield f"time per token      {duration(placed.seconds)}, {number(placed.tokens_per_s)} tokens/s ({alone})"
    for name, seconds in sorted(placed.parts.items(), key=lambda part: -part[1]):
        if seconds:
            yield f"  {name:<24}{duration(seconds):>9} {share(seconds / placed.seconds):>8}"
    yield f"limited by          {placed.limit}"
    if not any(device.bytes for device in placed.devices):
        yield "Nothing is put on a device: either the budget is too small for it, or the CPU alone is as fast."
    elif not all(layer.attention_on_device for layer in placed.layers):
        yield (
            "The first layers stay wholly on the CPU: the budget does more good elsewhere, "
            "or cannot hold their keys and values."
        )
    if not found.calibrated:
        yield _UNCALIBRATED
