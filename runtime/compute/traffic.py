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
from runtime.compute.states import state_bytes
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
    """Which share of each block's neurons is read, where there are experts of those that are chosen, a shared one
    included; of blocks without an FFN it says nothing. fired: up and down rows (ungated: down rows); gates: gate (up)
    rows.
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
    ffn = sum(_block_bytes(s, tensors, activity, i) for i in range(s.block_count))
    head = tensors[names.weight(names.TOKEN_EMBD if s.tied_output else names.OUTPUT)].nbytes
    attention = sum(t.nbytes for name, t in tensors.items() if ".attn_" in name or ".ssm_" in name)
    by_row = (names.weight(stem) for stem in (names.TOKEN_EMBD, names.POSITION_EMBD))
    other = sum(tensors[name].nbytes / tensors[name].ne[1] for name in by_row if name in tensors)
    always = (names.OUTPUT_NORM, names.OUTPUT_PROJ, names.TOKEN_EMBD_PROJ, names.ROPE_FREQS)
    in_blocks = tuple(f".{short}" for short in (names.FFN_NORM, *names.ROUTERS, *names.LATENTS))
    other += sum(
        t.nbytes for name, t in tensors.items() if name.startswith(always) or any(short in name for short in in_blocks)
    )
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
    """Bytes of keys and values that attention reads at `n_positions` positions, all layers, within their windows; and
    of the states that Mamba blocks read and write.
    """
    seen = ((a.kv_length, min(n_positions, a.window or n_positions)) for a in s.attentions.values())
    return 2 * element_size * sum(length * n for length, n in seen) + 2 * state_bytes(s)


def ffn_bytes(ffn: FfnShape, tensors: Mapping[str, TensorInfo], activity: Activity, i: int) -> float:
    """Bytes of block `i`'s FFN, predictor included, that one token reads."""

    def size(*short: str) -> int:
        found = (tensors.get(names.in_block(i, name)) for name in short)
        return sum(tensor.nbytes for tensor in found if tensor)

    stems, reached = names.stems(ffn), ffn.n_reached / ffn.n_ff
    always: float = size(*(names.bias(stem) for stem in stems.matrices))
    if activity.ffn == "dense":
        return reached * size(*(names.weight(stem) for stem in stems.matrices)) + always
    if activity.ffn == "predicted" and not ffn.shared:
        always += size(names.weight(names.PREDICTOR_IN)) + reached * size(*names.PREDICTOR_ROWS)
    first, *rest = (names.weight(stem) for stem in names.row_matrices(ffn))
    return always + reached * (activity.gates[i] * size(first) + activity.fired[i] * size(*rest))


def _block_bytes(s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity, i: int) -> float:
    """Bytes of block `i`'s FFN and shared expert that one token reads: of both the same share."""
    parts = (s.blocks[i].ffn, s.blocks[i].shared)
    return sum(ffn_bytes(part, tensors, activity, i) for part in parts if part)


def block_bytes(s: Structure, tensors: Mapping[str, TensorInfo], activity: Activity, i: int) -> float:
    """Bytes of block `i` that one token reads: its mixer's matrices, and what it needs of the FFN."""
    of_mixer = tuple(names.in_block(i, kind) for kind in ("attn_", "ssm_"))
    mixer = sum(info.nbytes for name, info in tensors.items() if name.startswith(of_mixer))
    return mixer + _block_bytes(s, tensors, activity, i)


class BytesRead:
    """What tokens read that are computed together, by what their FFNs did. usual: how often each neuron of each block
    fires, [n_ff], which says how much tokens have in common.
    """

    def __init__(
        self, s: Structure, tensors: Mapping[str, TensorInfo], ffn: str, usual: Mapping[int, npt.NDArray[np.float64]]
    ) -> None:
        self._usual, n = usual, len(s.blocks)
        # Several tokens reach more neurons than one.
        self._most = np.array([b.n_neurons / b.n_reached if b.ffn else 1.0 for b in s.blocks])

        def read(fired: float, gates: float) -> npt.NDArray[np.float64]:
            activity = Activity.uniform(ffn, n, fired, gates)
            return np.array([_block_bytes(s, tensors, activity, i) for i in range(n)])

        nothing = read(0, 0)
        self._fired, self._gates = read(1, 0) - nothing, read(0, 1) - nothing
        self._always = bytes_per_token(s, tensors, Activity.uniform(ffn, n, 0.0, 0.0)).total
        self._common: dict[int, npt.NDArray[np.float64]] = {}

    def per_token(self, fired: Sequence[float], gates: Sequence[float], n: int, kv: float = 0.0) -> float:
        """Of each of n tokens, which read the rows that they have in common once. fired, gates: shares of each block's
        neurons, of one token; kv: bytes of its own keys and values.

        How much they have in common is estimated: neurons fire independently, each as often as usual.
        """
        each = np.array(fired), np.array(gates)
        rows = [np.minimum(self._most, share * self._growth(n)) for share in each]
        return float(self._always + rows[0] @ self._fired + rows[1] @ self._gates) / n + kv

    def _growth(self, n: int) -> npt.NDArray[np.float64]:
        """How many times as many neurons of each block n tokens need as one of them."""
        if n not in self._common:
            blocks = range(len(self._fired))
            usual = [self._usual[i] if i in self._usual else np.zeros(1) for i in blocks]
            means = [float(frequencies.mean()) for frequencies in usual]
            self._common[n] = np.array(
                [union(f, m, n) / m if m else float(n) for f, m in zip(usual, means, strict=True)]
            )
        return self._common[n]
