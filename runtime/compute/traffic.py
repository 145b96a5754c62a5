"""How many bytes one decoded token has to read: what bounds the speed of a machine whose memory is slower than its
arithmetic.

A pure function of a file's tensors and of how many neurons fire; knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runtime.bindings.ffn_shape import FfnShape
from runtime.model_file import tensor_names as names
from runtime.model_file.reader import TensorInfo
from runtime.model_file.structure import Structure


@dataclass(frozen=True)
class Traffic:
    """Bytes read for one token, by part."""

    ffn: float
    attention: float
    head: float
    other: float
    kv: float

    @property
    def total(self) -> float:
        """All parts together."""
        return self.ffn + self.attention + self.head + self.other + self.kv


@dataclass(frozen=True)
class Activity:
    """Which share of each block's neurons is read; of blocks without an FFN it says nothing. fired: up and down rows
    (ungated: down rows); gates: gate (up) rows.
    """

    ffn: str  # the mode
    fired: Sequence[float]
    gates: Sequence[float]

    @classmethod
    def uniform(cls, ffn: str, n_blocks: int, fired: float, gates: float = 1.0) -> Activity:
        """The same shares in every block."""
        return cls(ffn, [fired] * n_blocks, [gates] * n_blocks)


def bytes_per_token(
    s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity, kv_bytes: float = 0.0
) -> Traffic:
    """Bytes that one token reads. kv_bytes: those of keys and values, see `kv_bytes`."""
    ffn = sum(ffn_bytes(shape, tensors, activity, i) for i, shape in s.ffns.items())
    head = tensors[names.weight(names.TOKEN_EMBD if s.tied_output else names.OUTPUT)].nbytes
    attention = sum(t.nbytes for name, t in tensors.items() if ".attn_" in name)
    by_row = (names.weight(stem) for stem in (names.TOKEN_EMBD, names.POSITION_EMBD))
    other = sum(tensors[name].nbytes / tensors[name].ne[1] for name in by_row if name in tensors)
    always = (names.OUTPUT_NORM, names.OUTPUT_PROJ, names.TOKEN_EMBD_PROJ, names.ROPE_FREQS)
    other += sum(t.nbytes for name, t in tensors.items() if name.startswith(always) or f".{names.FFN_NORM}" in name)
    return Traffic(ffn=ffn, attention=attention, head=head, other=other, kv=kv_bytes)


def union(frequencies: npt.NDArray[np.float64], share: float, n: int) -> float:
    """Share of neurons that n tokens need together, of which each needs `share`, if neurons fire independently.

    frequencies: how often each fires, [n_ff]; they say how much tokens have in common.
    """
    usual = float(frequencies.mean())
    if n == 1 or not usual:
        return min(1.0, n * share)
    return min(1.0, share / usual * float(1 - np.mean((1 - frequencies) ** n)))


def kv_bytes(s: Structure, n_positions: float, element_size: int) -> float:
    """Bytes of keys and values that attention reads at `n_positions` positions, all layers; within their windows."""
    seen = ((a.kv_length, min(n_positions, a.window or n_positions)) for a in s.attentions.values())
    return 2 * element_size * sum(length * n for length, n in seen)


def ffn_bytes(ffn: FfnShape, tensors: Mapping[str, TensorInfo], activity: Activity, i: int) -> float:
    """Bytes of block `i`'s FFN, predictor included, that one token reads."""

    def size(*short: str) -> int:
        found = (tensors.get(names.in_block(i, name)) for name in short)
        return sum(tensor.nbytes for tensor in found if tensor)

    always = size(*(names.bias(stem) for stem in names.FFN_MATRICES))
    if activity.ffn == "dense":
        return size(*(names.weight(stem) for stem in names.FFN_MATRICES)) + always
    if activity.ffn == "predicted":
        always += size(names.weight(names.PREDICTOR_IN), *names.PREDICTOR_ROWS)
    first, *rest = (names.weight(stem) for stem in names.row_matrices(ffn))
    return always + activity.gates[i] * size(first) + activity.fired[i] * size(*rest)
