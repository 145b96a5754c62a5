"""What a budget of main memory and a disk allow, by arithmetic: models of published measurements on disks of 3 and
7 GB/s.

Measures nothing. Memory and disk run at their nominal speeds, one after the other; docs/disk.md compares with what was
published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bindings.pager import PAGE
from runtime.hybrid.costs import Floats, candidates
from runtime.hybrid.disk_speed import DiskSpeed
from runtime.hybrid.paged_rows import RowCosts, held_rows

MEMORY_RATE = 60e9  # bytes/s
# NVMe by its nominal GB/s in order. Reads of 8 KiB, 16 at the same time, are assumed to reach 70 % of that.
DISKS = {f"{rate} GB/s": DiskSpeed.described(rate * 1e9, 0.7 * rate * 1e9 / 8192) for rate in (3, 7)}
BUDGETS = (0.75, 0.5, 0.35)  # of the weights


@dataclass(frozen=True)
class PagedShape:
    """What of a model matters here, in weights. always: attention, head and predictors, all of them read for each
    token. neurons: of all layers, with `matrices` rows of `width` each, in `bits`.

    active: share of the neurons that fire.
    """

    name: str
    always: float
    neurons: int
    width: int
    matrices: int
    bits: float
    active: float

    @property
    def row(self) -> float:
        """Bytes of one row."""
        return self.width * self.bits / 8

    @property
    def fixed(self) -> float:
        """Bytes that are always in memory."""
        return self.always * self.bits / 8

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return self.fixed + self.neurons * self.matrices * self.row


def simulate_disk(shape: PagedShape, often: Floats, per_active: float) -> Iterator[dict[str, Any]]:
    """One row for each disk and budget. often: how often each neuron fires, hottest first; per_active: candidates of
    the predictor for each neuron that fires.

    Tokens/s: `naive`: all weights are read from the disk for each token, and `mapped`: those that do not fit, as a
    dense program does at best; `rows`: predicted, each row by itself; `bundles`: the rows of a neuron side by side.
    """
    wanted = candidates(often, min(1.0, per_active * shape.active))
    fires = np.minimum(often, wanted)
    computing = (shape.fixed + shape.row * float(wanted.sum() + (shape.matrices - 1) * fires.sum())) / MEMORY_RATE
    for name, disk in DISKS.items():
        for share in BUDGETS:
            room = share * shape.bytes - shape.fixed
            dense, missing = shape.bytes / MEMORY_RATE, (1 - share) * shape.bytes
            by_row = [_missed(shape.row, wanted, disk)] + [_missed(shape.row, fires, disk)] * (shape.matrices - 1)
            yield {
                "model": shape.name,
                "disk": name,
                "budget": share,
                "bytes": shape.bytes,
                "naive": 1 / (dense + shape.bytes / disk.sequential),
                "mapped": 1 / (dense + missing / disk.sequential),
                "rows": 1 / (computing + _waiting(by_row, room)),
                "bundles": 1 / (computing + _waiting([_missed(shape.row * shape.matrices, wanted, disk, True)], room)),
            }


def _missed(size: float, wanted: Floats, disk: DiskSpeed, aligned: bool = False) -> RowCosts:
    read = -(-size // PAGE) * PAGE if aligned else PAGE + size - 1
    return RowCosts(np.full(len(wanted), size), read * wanted, wanted, disk.seconds(read, 1) * wanted)


def _waiting(rows: list[RowCosts], room: float) -> float:
    """Seconds for one token; infinite where not even the rest fits."""
    if room < 0:
        return float("inf")
    held = held_rows(rows, room)
    return sum(float(of.seconds[~there].sum()) for of, there in zip(rows, held, strict=True))
