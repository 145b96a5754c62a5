"""What a device would hold of a model at many budgets of its memory, from nothing to all.

The planner chooses, placement.py describes; this module chooses the budgets, and writes each placement small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from runtime.analysis.placement import PlacedModel, placed_model
from runtime.hybrid.costs import PlanOptions, machine_of, model_costs
from runtime.hybrid.planner import BlockCosts, Device, Machine, Placement, Planner
from runtime.model_file.frequencies import by_expert
from runtime.model_file.reader import GgufFile

BUDGETS = 65
_EVEN = 40  # of these, at equal distances; the others where the speed changes most
_UNITS = 256  # budgets are multiples of a power of two, at least so many of which make the range
_SMALLEST, _LARGEST = 1 << 14, 1 << 30  # bytes: a budget in MiB has few digits, and is what the command line takes


@dataclass(frozen=True)
class BudgetRange:
    """Budgets in bytes. least: what buffers alone take, below which nothing can be on the device; most: enough for
    everything, or all there is.
    """

    least: int
    most: int

    @property
    def unit(self) -> int:
        """What all budgets but the last are multiples of."""
        unit = _SMALLEST
        while unit < _LARGEST and 2 * unit * _UNITS <= self.most - self.least:
            unit *= 2
        return unit


def placements(file: GgufFile, options: PlanOptions, wanted: int | None, free: int | None) -> dict[str, Any]:
    """The placements for a page's slider, by increasing budget, and where it begins.

    options: of one device; its budget does not matter. wanted: bytes that must be among the budgets, and where the
    slider begins; None for about half of what everything takes. free: bytes of the device that may be used, None for as
    many as are needed.
    """
    blocks, head = model_costs(file, options)
    whole = _whole(blocks, head, machine_of(file.structure, options))
    most = _rounded_up(whole.most) if free is None else min(free, _rounded_up(whole.most))
    span = BudgetRange(min(whole.least, most), max(most, wanted or 0) if free is None else most)
    machine = machine_of(file.structure, replace(options, budgets=(span.most,)))
    planner = Planner(blocks, head, machine)
    known: dict[int, Placement] = {}

    def speed(budget: int) -> float:
        known[budget] = known.get(budget) or planner.place(budget)
        return 1 / known[budget].seconds

    begin = (span.most // 2 + span.least // 2) // span.unit * span.unit if wanted is None else min(wanted, span.most)
    budgets = choose(span, [begin, min(span.most, _rounded_up(whole.most))], speed)
    freq = [by_expert(file, i) for i in range(len(blocks))]
    rows = [_row(placed_model(known[n], _with(machine, n), freq)) for n in budgets]
    return {
        "everything": whole.most,
        "limited": free is not None and free < whole.most,
        "reserve": whole.least,
        "cpu_only_seconds": known[0].seconds,
        "begin": budgets.index(begin),
        "neurons": [f.shape[1] for f in freq],
        "budgets": rows,
    }


def choose(span: BudgetRange, wanted: Sequence[int], speed: Callable[[int], float], n: int = BUDGETS) -> list[int]:
    """At most `n` budgets, increasing: none, all, those that are wanted, some at equal distances, and the others where
    `speed` changes most.
    """
    step = (span.most - span.least) / _EVEN
    even = [int(span.least + i * step) // span.unit * span.unit for i in range(_EVEN)]
    found = sorted({0, *even, *wanted, span.most})
    while len(found) < n:
        gaps = [(abs(speed(b) - speed(a)), a, b) for a, b in pairwise(found) if b - a > span.unit]
        change, a, b = max(gaps, default=(0.0, 0, 0))
        if not change:
            break
        found = sorted({*found, max(a // span.unit + 1, (a + b) // 2 // span.unit) * span.unit})
    for budget in found:
        speed(budget)
    return found


def _whole(blocks: Sequence[BlockCosts], head: int, machine: Machine) -> BudgetRange:
    """From a device's buffers alone to all that it can hold, with what rounding may cost."""
    reserve = machine.devices[0].reserve
    everything = reserve + head + sum(b.stored + b.predictor + b.hot[-1] for b in blocks)
    slack = Planner(blocks, head, _with(machine, everything)).place(everything).slack
    return BudgetRange(reserve, everything + slack)


def _with(machine: Machine, budget: int) -> Machine:
    (device,) = machine.devices
    return replace(machine, devices=(Device(budget, device.bandwidth, device.reserve),))


def _rounded_up(n: int) -> int:
    return -(-n // _SMALLEST) * _SMALLEST


def _row(found: PlacedModel) -> dict[str, Any]:
    """One budget's placement, with one list for each figure of the layers. waits: d or c, the side that a layer waits
    for.
    """
    (device,), layers = found.devices, found.layers
    return {
        **asdict(device),
        "seconds": found.seconds,
        "tokens_per_s": found.tokens_per_s,
        "limit": found.limit,
        "head_on_device": found.head_on_device,
        "slack_bytes": found.slack_bytes,
        "parts": found.parts,
        "resident_from": sum(not layer.attention_on_device for layer in layers),
        "hot": [round(layer.held * layer.neurons) for layer in layers],  # of experts, the mean
        "activations": [round(layer.activations, 3) for layer in layers],
        "us": [float(f"{layer.seconds * 1e6:.4g}") for layer in layers],
        "waits": "".join(layer.limit[0].lower() for layer in layers),
    }
