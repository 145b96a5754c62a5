"""Chooses what of a model goes to the devices at hand: turns names, budgets and measured speeds into a `TensorMap`.

The planner itself is runtime/hybrid/planner.py, its inputs are runtime/hybrid/costs.py's. Knows devices and files;
computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.errors import UserError
from runtime.hybrid.bandwidth import cpu, speed_of
from runtime.hybrid.costs import MARGIN, PlanOptions, machine_of, model_costs, scratch_of
from runtime.hybrid.devices import DeviceInfo, find, parse_names
from runtime.hybrid.mamba_support import refused as refused_mambas
from runtime.hybrid.planner import BlockCosts, Machine, Placement, evaluate, place
from runtime.hybrid.tensor_map import TensorMap, of_placement
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions

_LEFT_FREE = 0.05  # of a device's free memory, for whoever else uses it


@dataclass(frozen=True)
class Arrangement:
    """Devices, the bytes that may be used on each, and what is to be there.

    placement: what the planner chose, and what it expects of it. scratch: bytes of the budget that are left to a
    device's backend itself. note: what a device cannot compute; "" for nothing.
    """

    devices: tuple[DeviceInfo, ...]
    budgets: tuple[int, ...]
    placement: Placement
    tensor_map: TensorMap
    scratch: int = 0
    note: str = ""

    @property
    def used(self) -> bool:
        """Whether anything is on a device: a small budget may leave all to the CPU."""
        return self.tensor_map.n_sides > 1


def arrange(file: GgufFile, run: SettledOptions) -> Arrangement | None:
    """The fastest arrangement within the budgets; None where no device is wanted.

    Raises UserError for unknown devices and for budgets or neurons that make no sense.
    """
    devices = tuple(find(parse_names(run.device)))
    if not devices:
        if run.vram_budget or run.hot is not None:
            raise UserError(
                "a memory budget without a device", "name one with --device; `python -m runtime devices` lists them"
            )
        return None
    options = machine_options(devices, usable(run.vram_budget, devices), run)
    blocks, head = model_costs(file, options)
    s = file.structure
    machine = machine_of(s, options)
    mambas = refused_mambas(devices[0].handle, s)
    blocks = [left_to_cpu(block, machine) if i in mambas else block for i, block in enumerate(blocks)]
    if run.hot is None:
        placement = place(blocks, head, machine)
    else:
        hot = [(k, *[0] * (len(devices) - 1)) for k in _wanted(run.hot, blocks)]
        wrong = [(k, block.cuts) for block, (k, *_) in zip(blocks, hot, strict=True) if k not in block.cuts]
        if wrong:
            k, (first, *others) = wrong[0]
            more = (
                f", {', '.join(map(str, others[:2]))} .. {others[-1]}" if others else ", since the file has no ffn_down"
            )
            raise UserError(f"{k} hot neurons, expected {'one of ' if others else ''}{first}{more}")
        placement = evaluate(blocks, head, machine, 0, True, hot)
    refused = mambas & frozenset(range(placement.resident_from, s.block_count))
    tensor_map = of_placement(s, placement, run.predicts, refused)
    note = f"device {devices[0].name} cannot compute {len(refused)} Mamba blocks: they stay on the CPU"
    return Arrangement(devices, options.budgets, placement, tensor_map, scratch_of(s, options), note if refused else "")


def left_to_cpu(block: BlockCosts, machine: Machine) -> BlockCosts:
    """The same block, where the first device cannot compute its mixer: it stays at home on the CPU among blocks that
    are on the device.

    It needs no memory there. A token takes as long for it as on the CPU, and goes there and back: that is put as bytes
    that the device would read in this time.
    """
    read = (block.read / machine.cpu_bandwidth + machine.sync) * machine.devices[0].bandwidth
    return replace(block, stored=0, read=read, spared=block.spared + read - block.read)


def machine_options(devices: Sequence[DeviceInfo], budgets: tuple[int, ...], run: SettledOptions) -> PlanOptions:
    """The planner's options for this machine, with measured speeds."""
    speeds = [speed_of(device, run.threads) for device in devices]
    return PlanOptions(
        run=run,
        budgets=budgets,
        device_bandwidths=tuple(speed.bandwidth for speed in speeds),
        cpu_bandwidth=speed_of(cpu(), run.threads).bandwidth,
        sync=max(speed.sync for speed in speeds),
        margin=0 if all(device.is_stand_in for device in devices) else MARGIN,
    )


def usable(budgets: tuple[int, ...], devices: Sequence[DeviceInfo]) -> tuple[int, ...]:
    """Bytes of each device: no more than the user allows, and no more than is free. budgets: () for no limit. Raises
    UserError for another number of them.
    """
    if len(budgets) not in (0, len(devices)):
        raise UserError(f"{len(budgets)} memory budgets for {len(devices)} devices, expected one of each")
    free = [int(device.memory_free * (1 - _LEFT_FREE)) for device in devices]
    return tuple(min(pair) for pair in zip(budgets or free, free, strict=True))


def _wanted(hot: int | tuple[int, ...], blocks: Sequence[BlockCosts]) -> tuple[int, ...]:
    """Hot neurons of each block: one number is for all that have any."""
    if isinstance(hot, int):
        return tuple(hot if block.neurons else 0 for block in blocks)
    if len(hot) != len(blocks):
        raise UserError(f"hot neurons of {len(hot)} blocks, expected one number or {len(blocks)}")
    return hot
