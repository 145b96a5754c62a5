"""What a budget of main memory would hold of a model, what is read from the disk for each token, and the speed to
expect, as plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.analysis.placement import MachineFigures
from runtime.base.figures import memory
from runtime.compute.kv_cache import cache_bytes
from runtime.errors import UserError
from runtime.hybrid.bandwidth import cpu, speed_of
from runtime.hybrid.costs import PlanOptions, model_costs
from runtime.hybrid.disk_speed import DiskSpeed, disk_speed
from runtime.hybrid.held_weights import choose_held
from runtime.hybrid.paged_rows import Bools, RowCosts, held_rows, row_costs
from runtime.hybrid.planner import Device, Machine, place
from runtime.hybrid.tensor_map import cpu_alone
from runtime.model_file.reader import GgufFile
from runtime.options import SettledOptions

DISK = "disk"  # the part of a token's time
_SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)  # of the file's size: budgets that a page shows


@dataclass(frozen=True)
class PagedLayer:
    """held: the share of the bytes of a layer's neurons that is in memory. read: bytes from the disk for one token;
    reads: in so many reads; seconds: of waiting.
    """

    held: float
    read: float
    reads: float
    seconds: float


@dataclass(frozen=True)
class PagedPlan:
    """A budget of main memory in bytes, and what it is for. calibrated: whether the file says how often neurons fire;
    without, all are taken to. weights, kv, buffers: what is always there; neurons: those that are held of all `rows`.

    in_memory_seconds: for one token where all is in memory. seconds: with the waiting for the disk, one after the
    other, with its parts. read, reads: from the disk for one token.
    """

    model: str
    kv_type: str
    ffn: str
    n_ctx: int
    calibrated: bool
    ram_budget: int
    weights: int
    kv: int
    buffers: int
    neurons: int
    rows: int
    disk: DiskSpeed
    in_memory_seconds: float
    seconds: float
    tokens_per_s: float
    parts: dict[str, float]
    limit: str
    read: float
    reads: float
    layers: list[PagedLayer]

    def as_json(self) -> dict[str, Any]:
        """The same in one dict."""
        return asdict(self)


def paged_plan(
    file: GgufFile,
    run: SettledOptions,
    cpu_bandwidth: float | None,
    n_positions: int | None = None,
    disk: DiskSpeed | None = None,
) -> PagedPlan:
    """What the budget in `run` would hold of an open model. cpu_bandwidth: bytes/s, None to measure it, as `disk`.

    Raises UserError for a budget that is too small.
    """
    bandwidth = cpu_bandwidth or speed_of(cpu(), run.threads).bandwidth
    disk = disk or disk_speed([part.path for part in file.parts])
    options = PlanOptions(run, (0,), (bandwidth,), bandwidth, n_positions=n_positions)
    blocks, head = model_costs(file, options)
    machine = Machine((Device(0, bandwidth),), bandwidth, 0.0)
    parts = {name: seconds for name, seconds in place(blocks, head, machine).parts.items() if seconds}
    budget, kept = run.ram_budget or 0, _kept(file, run)
    rows = row_costs(file, options, disk)
    room = budget - sum(kept)
    _check_room(file, rows, room)
    held = held_rows(rows, room)
    layers = [_layer(b, there) for b, there in zip(rows, held, strict=True)]
    in_memory, waiting = sum(parts.values()), sum(layer.seconds for layer in layers)
    parts |= {DISK: waiting} if waiting else {}
    return PagedPlan(
        str(file.path),
        run.kv_type,
        options.ffn,
        options.n_ctx,
        file.structure.neuron_order == "hot",
        budget,
        *kept,
        neurons=sum(round(float(b.sizes[there].sum())) for b, there in zip(rows, held, strict=True)),
        rows=round(sum(float(b.sizes.sum()) for b in rows)),
        disk=disk,
        in_memory_seconds=in_memory,
        seconds=in_memory + waiting,
        tokens_per_s=1 / (in_memory + waiting),
        parts=parts,
        limit=max(parts, key=parts.__getitem__),
        read=sum(layer.read for layer in layers),
        reads=sum(layer.reads for layer in layers),
        layers=layers,
    )


def memory_facts(file: GgufFile, run: SettledOptions, figures: MachineFigures) -> dict[str, Any]:
    """For a page: the budget in `run` and shares of the file's size, as far as they suffice, largest first.

    Raises UserError where the budget in `run` is too small.
    """
    wanted = run.ram_budget or 0
    disk = figures.disk or disk_speed([part.path for part in file.parts])

    def planned(budget: int) -> PagedPlan | None:
        try:
            return paged_plan(file, replace(run, ram_budget=budget), figures.cpu_bandwidth, figures.n_positions, disk)
        except UserError:
            if budget == wanted:
                raise
            return None

    budgets = sorted({wanted, *(int(share * file.size) for share in _SHARES)}, reverse=True)
    plans = [plan for plan in map(planned, budgets) if plan]
    shown = ("ram_budget", "neurons", "rows", "read", "reads", "seconds", "tokens_per_s", "limit")
    return {
        "wanted": wanted,
        "disk": asdict(disk),
        "plans": [{name: getattr(plan, name) for name in shown} for plan in plans],
    }


def _kept(file: GgufFile, run: SettledOptions) -> tuple[int, int, int]:
    """Bytes that are always in memory: weights, keys and values (and states), buffers of the largest batch. The last is
    an upper estimate: what an FFN computes for each token, and four vectors as wide as the model.
    """
    s = file.structure
    kv = cache_bytes(s, run)
    held = choose_held(file, cpu_alone(s, run.predicts), run, kv, 0.0).held
    widest = max(block.n_reached for block in s.blocks)
    buffers = 4 * min(run.n_batch, run.n_ctx) * (2 * widest + 4 * s.embedding_length)
    return sum(part.length for part in held.values()), kv, buffers


def _check_room(file: GgufFile, rows: Sequence[RowCosts], room: int) -> None:
    least = round(max(float(b.sizes.sum()) for b in rows))
    if room < least:
        raise UserError(
            f"`{file.path}`: {memory(max(0, room))} of the memory budget are left for neurons, expected at least "
            f"{memory(least)}",
            "raise --ram-budget, or use a smaller --n-ctx",
        )


def _layer(rows: RowCosts, held: Bools) -> PagedLayer:
    share = float(rows.sizes[held].sum() / rows.sizes.sum())
    return PagedLayer(share, *(float(of[~held].sum()) for of in (rows.read, rows.reads, rows.seconds)))
