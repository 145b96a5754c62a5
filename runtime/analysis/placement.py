"""What devices would hold of a model, and the speed to expect: the planner's choice in plain values.

A machine that is described by numbers need not be there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from runtime.errors import UserError
from runtime.hybrid.choose import machine_options, usable
from runtime.hybrid.costs import Floats, PlanOptions, machine_of, model_costs
from runtime.hybrid.devices import find, parse_names
from runtime.hybrid.disk_speed import DiskSpeed
from runtime.hybrid.planner import Device, Machine, Placement, place
from runtime.model_file.frequencies import by_expert
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of one device's memory: what may be used, what is, and the part of it for compute buffers."""

    budget: int
    bytes: int
    reserve: int


@dataclass(frozen=True)
class PlacedLayer:
    """Where one layer is. hot: neurons on each device, of `neurons`, which are those of each expert if there are any;
    activations: the share of what fires that they are.

    seconds: for one token; limit: the side that is waited for. held: the share of the layer's neurons that are on
    devices. longer: neurons that the first device has of `longer_experts`, where it has more of these.
    """

    attention_on_device: bool
    hot: list[int]
    neurons: int
    activations: float
    seconds: float
    limit: str
    held: float
    longer: int = 0
    longer_experts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PlacedModel:
    """Where a model is, and what that is expected to cost. seconds: for one token, with its parts.

    slack_bytes: of the devices' memory that may be left over for want of smaller pieces.
    """

    seconds: float
    tokens_per_s: float
    parts: dict[str, float]
    limit: str
    head_on_device: bool
    slack_bytes: int
    devices: list[DeviceUse]
    layers: list[PlacedLayer]


@dataclass(frozen=True)
class PlanReport:
    """A placement, and what it is for. calibrated: whether the file says how often neurons fire; without, all are taken
    to.

    cpu_only_seconds: for one token without a device.
    """

    model: str
    kv_type: str
    ffn: str
    n_ctx: int
    calibrated: bool
    cpu_only_seconds: float
    placed: PlacedModel

    def as_json(self) -> dict[str, Any]:
        """The same in one dict, with the placement's values beside the others."""
        values = asdict(self)
        placed: dict[str, Any] = values.pop("placed")
        return values | placed


@dataclass(frozen=True)
class MachineFigures:
    """Some figures of a machine, as far as they are known: in bytes/s and seconds. positions: what a token is to
    see. disk: where a budget of main memory leaves neurons.
    """

    device_bandwidths: tuple[float, ...] | None = None
    cpu_bandwidth: float | None = None
    sync: float | None = None
    n_positions: int | None = None
    disk: DiskSpeed | None = None

    def known(self) -> dict[str, Any]:
        """Those that are, by the names of the fields of `PlanOptions`."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "disk"}


def plan_report(
    file: GgufFile, run: SettledOptions, device: str | None, budgets: tuple[int, ...], figures: MachineFigures
) -> PlanReport:
    """Where an open model would be.

    device: names of devices of this machine, which are measured except where `figures` says; None for one that
    `figures` describes. budgets: bytes of each. Raises UserError for a device that is not there, and for a description
    that lacks something.
    """
    if device:
        options = replace(measured_options(device, budgets, run), **figures.known())
    else:
        _check_described(budgets, figures)
        options = PlanOptions(run, budgets, **figures.known())
    machine = machine_of(file.structure, options)
    blocks, head = model_costs(file, options)
    nothing = tuple(Device(0, d.bandwidth) for d in machine.devices)
    cpu_only = place(blocks, head, Machine(nothing, machine.cpu_bandwidth, machine.sync))
    freq = [by_expert(file, i) for i in range(len(blocks))]
    return PlanReport(
        model=str(file.path),
        kv_type=run.kv_type,
        ffn=options.ffn,
        n_ctx=options.n_ctx,
        calibrated=file.structure.neuron_order == "hot",
        cpu_only_seconds=cpu_only.seconds,
        placed=placed_model(place(blocks, head, machine), machine, freq),
    )


def measured_options(device: str, budgets: tuple[int, ...], run: SettledOptions) -> PlanOptions:
    """The planner's options for devices of this machine. Raises UserError for a device that is not there."""
    found = tuple(find(parse_names(device)))
    if not found:
        raise UserError(f"no device `{device}`", "`python -m runtime devices` lists them")
    return machine_options(found, usable(budgets, found), run)


def _check_described(budgets: tuple[int, ...], figures: MachineFigures) -> None:
    missing = [] if budgets else ["--vram-budget"]
    missing += ["--device-bandwidth"] if figures.device_bandwidths is None else []
    missing += ["--cpu-bandwidth"] if figures.cpu_bandwidth is None else []
    if missing:
        raise UserError(
            f"{', '.join(missing)} missing",
            "describe a machine with these options, or name a device of this one: --device",
        )


def placed_model(placement: Placement, machine: Machine, frequencies: Sequence[Floats]) -> PlacedModel:
    """The planner's choice in plain values. frequencies: how often each neuron fires, per layer, float64 [experts,
    neurons of one].
    """
    return PlacedModel(
        seconds=placement.seconds,
        tokens_per_s=1 / placement.seconds,
        parts=placement.parts,
        limit=placement.limit,
        head_on_device=placement.head,
        slack_bytes=placement.slack,
        devices=[
            DeviceUse(d.budget, used, d.reserve if used else 0)
            for d, used in zip(machine.devices, placement.bytes, strict=True)
        ],
        layers=[_layer(freq, placement, i) for i, freq in enumerate(frequencies)],
    )


def _layer(freq: Floats, placement: Placement, i: int) -> PlacedLayer:
    hot, longer = placement.hot[i], placement.longer[i] if placement.longer else None
    there = np.zeros(freq.shape, np.bool_)
    there[:, : sum(hot)] = True
    if longer:
        there[list(longer.experts), : longer.end] = True
    return PlacedLayer(
        attention_on_device=i >= placement.resident_from,
        hot=list(hot),
        neurons=freq.shape[1],
        activations=float(freq[there].sum() / (freq.sum() or 1.0)),
        seconds=placement.block_seconds[i],
        limit=placement.block_limits[i],
        held=float(there.mean()) if there.size else 0.0,
        longer=longer.end if longer else 0,
        longer_experts=list(longer.experts) if longer else [],
    )
