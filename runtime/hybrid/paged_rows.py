"""Which rows of neurons a budget of main memory should hold, and what is read from the disk for each token without the
others.

Pure arithmetic on how often rows are wanted, bytes, and a disk's speed. docs/disk.md explains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.bindings.pager import PAGE
from runtime.compute.dense_threshold import candidate_shares, expected
from runtime.hybrid.costs import Floats, PlanOptions, candidates
from runtime.hybrid.disk_speed import DiskSpeed
from runtime.model_file import tensor_names as names
from runtime.model_file.frequencies import by_expert, of_experts
from runtime.model_file.reader import GgufFile

Bools = npt.NDArray[np.bool_]

_RUN = 64 * PAGE  # bytes of a read where all rows are read in order


@dataclass(frozen=True)
class RowCosts:
    """The rows of one block's neurons, one number of each: bytes in memory, and where it is not there the bytes, reads
    and seconds that a token waits for, on average.
    """

    sizes: Floats
    read: Floats
    reads: Floats
    seconds: Floats


def row_costs(file: GgufFile, options: PlanOptions, disk: DiskSpeed) -> list[RowCosts]:
    """Of each block with an FFN: the rows that decide whether a neuron fires, then the others."""
    bias = options.run.predictor_bias
    shares = candidate_shares(file, options.ffn, bias, expected(file, options.ffn, bias).fired)
    return [_of_block(file, i, options, disk, shares[i]) for i in file.structure.ffns]


def _of_block(file: GgufFile, i: int, options: PlanOptions, disk: DiskSpeed, share: float) -> RowCosts:
    ffn, freq, used = file.structure.ffns[i], by_expert(file, i), of_experts(file, i)
    count, per_token = (ffn.experts.count, ffn.experts.used) if ffn.experts else (1, 1)
    always = np.repeat(used, freq.shape[1])
    first, *rest = (file.tensors[names.weight_of(i, stem)].nbytes / ffn.n_ff for stem in names.row_matrices(ffn))
    if options.ffn == "predicted" and file.structure.rank(i) > 0:
        wanted = always * np.tile(candidates(freq.sum(0) / per_token, share), count)
        found = [_picked(first, wanted, disk)]
    else:  # all of them, one after the other
        found = [_in_order(first, always, disk)]
    found += [_picked(size, freq.reshape(-1), disk) for size in rest]
    return RowCosts(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _picked(size: float, wanted: Floats, disk: DiskSpeed) -> tuple[Floats, Floats, Floats, Floats]:
    """Rows here and there, each of which is a read of all its pages."""
    read = PAGE + size - 1
    return np.full(len(wanted), size), read * wanted, wanted, disk.seconds(read, 1) * wanted


def _in_order(size: float, wanted: Floats, disk: DiskSpeed) -> tuple[Floats, Floats, Floats, Floats]:
    reads = size / _RUN * wanted
    return np.full(len(wanted), size), size * wanted, reads, disk.seconds(size, size / _RUN) * wanted


def held_rows(blocks: Sequence[RowCosts], room: float) -> list[Bools]:
    """Which rows should be within `room` bytes, so that a token waits least: those that save most seconds for each of
    their bytes. What is left over is less than one row, so no choice within `room` less that row is better.
    """
    sizes, seconds = (np.concatenate([getattr(b, name) for b in blocks]) for name in ("sizes", "seconds"))
    order = np.argsort(-seconds / sizes, kind="stable")
    held = np.zeros(len(order), np.bool_)
    held[order[: int(np.searchsorted(np.cumsum(sizes[order]), room, side="right"))]] = True
    return np.split(held, np.cumsum([len(b.sizes) for b in blocks])[:-1])
