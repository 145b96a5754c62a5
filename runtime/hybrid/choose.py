"""Chooses what of a model goes to the devices at hand: turns names, budgets and measured speeds into a `Residence`.

The planner itself is runtime/hybrid/planner.py, its inputs are runtime/hybrid/costs.py's. Knows devices and files; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.bindings import ggml
from runtime.errors import UserError
from runtime.hybrid.bandwidth import cpu, speed_of
from runtime.hybrid.costs import MARGIN, PlanOptions, machine_of, model_costs, scratch_of
from runtime.hybrid.devices import NONE, DeviceInfo, find
from runtime.hybrid.planner import evaluate, place
from runtime.hybrid.tensor_map import Residence
from runtime.model_file.reader import GgufFile

_LEFT_FREE = 0.05  # of a device's free memory, for whoever else uses it


@dataclass(frozen=True)
class Wish:
    """What the user wants of devices. names: as in `runtime.hybrid.devices.find`. budgets: bytes, one for each device, or () for what is free.

    hot: neurons of every block on the first device, or of each; None lets the planner choose. With it, all attention and the head are on the device.
    """

    names: tuple[str, ...] = (NONE,)
    budgets: tuple[int, ...] = ()
    hot: int | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Arrangement:
    """Devices, the bytes that may be used on each, and what is to be there. scratch: bytes of the budget that are left to a device's backend itself."""

    devices: tuple[DeviceInfo, ...]
    budgets: tuple[int, ...]
    residence: Residence
    scratch: int = 0

    @property
    def used(self) -> bool:
        """Whether anything is on a device: a small budget may leave all to the CPU."""
        placement = self.residence.placement
        return placement.head or placement.resident_from < self.residence.structure.block_count


def arrange(
    file: GgufFile,
    wish: Wish,
    threads: int,
    ffn: str,
    n_ctx: int,
    kv_type: int,
    n_batch: int,
    predictor_bias: float = 0.0,
) -> Arrangement | None:
    """The fastest arrangement within the budgets; None where no device is wanted.

    Raises UserError for unknown devices and for budgets or neurons that make no sense.
    """
    devices = tuple(find(wish.names))
    if not devices:
        if wish.budgets or wish.hot is not None:
            raise UserError(
                "a memory budget without a device", "name one with --device; `python -m runtime devices` lists them"
            )
        return None
    options = machine_options(
        devices, usable(wish.budgets, devices), threads, ffn, n_ctx, kv_type, n_batch, predictor_bias
    )
    blocks, head = model_costs(file, options)
    machine = machine_of(file.structure, options)
    if wish.hot is None:
        placement = place(blocks, head, machine)
    else:
        hot = [(k, *[0] * (len(devices) - 1)) for k in _wanted(wish.hot, len(blocks))]
        wrong = [k for block, (k, *_) in zip(blocks, hot, strict=True) if k not in block.cuts]
        if wrong:
            first, *others = map(str, blocks[0].cuts)
            more = f", {', '.join(others[:2])} .. {others[-1]}" if others else ", since the file has no ffn_down"
            raise UserError(f"{wrong[0]} hot neurons, expected {'one of ' if others else ''}{first}{more}")
        placement = evaluate(blocks, head, machine, 0, True, hot)
    residence = Residence(file.structure, placement, ffn == "predicted")
    return Arrangement(devices, options.budgets, residence, scratch_of(file.structure, options))


def machine_options(
    devices: Sequence[DeviceInfo],
    budgets: tuple[int, ...],
    threads: int,
    ffn: str,
    n_ctx: int,
    kv_type: int,
    n_batch: int,
    predictor_bias: float = 0.0,
) -> PlanOptions:
    """The planner's options for this machine, with measured speeds."""
    speeds = [speed_of(device, threads) for device in devices]
    return PlanOptions(
        ffn=ffn,
        n_ctx=n_ctx,
        budgets=budgets,
        device_bandwidths=tuple(speed.bandwidth for speed in speeds),
        cpu_bandwidth=speed_of(cpu(), threads).bandwidth,
        sync=max(speed.sync for speed in speeds),
        kv_size=ggml.ggml_row_size(kv_type, 1),
        n_batch=min(n_batch, n_ctx),
        predictor_bias=predictor_bias,
        margin=0 if all(device.is_stand_in for device in devices) else MARGIN,
    )


def usable(budgets: tuple[int, ...], devices: Sequence[DeviceInfo]) -> tuple[int, ...]:
    """Bytes of each device: no more than the user allows, and no more than is free. budgets: () for no limit. Raises UserError for another number of them."""
    if len(budgets) not in (0, len(devices)):
        raise UserError(f"{len(budgets)} memory budgets for {len(devices)} devices, expected one of each")
    free = [int(device.memory_free * (1 - _LEFT_FREE)) for device in devices]
    return tuple(min(pair) for pair in zip(budgets or free, free, strict=True))


def _wanted(hot: int | tuple[int, ...], n_blocks: int) -> tuple[int, ...]:
    wanted = (hot,) * n_blocks if isinstance(hot, int) else hot
    if len(wanted) != n_blocks:
        raise UserError(f"hot neurons of {len(wanted)} blocks, expected one number or {n_blocks}")
    return wanted
