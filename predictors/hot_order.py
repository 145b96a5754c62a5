"""The order of a layer's neurons, hottest first, by how often they fire or by counts made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from predictors.matrices import Floats, Tensor, plain
from runtime.model_file.structure import ARCHITECTURE
from runtime.model_file.tensor_names import EXPERT_FREQ, NEURON_FREQ, NEURON_INDEX, of_experts

Order = npt.NDArray[np.int32]
_HALVINGS = 60  # of the interval in which a scale is sought: to the last bit of a float


@dataclass(frozen=True)
class BlockOrder:
    """One block's neurons in a new order.

    order: int32 [n_ff], stored position -> position before. freq: float32 [n_ff], in the new order. tensors: what the
    file says of it.
    """

    order: Order
    freq: Floats
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelOrder:
    """A new order for all blocks of a model, and no predictors. metadata: the keys that say so."""

    blocks: tuple[BlockOrder, ...]
    metadata: dict[str, Any]

    def structure_fields(self) -> dict[str, Any]:
        """The fields of runtime.model_file.structure.Structure that it sets."""
        return {"neuron_order": "hot"}


def hottest_first(frequency: Floats) -> BlockOrder:
    """Neurons by falling frequency (share of tokens at which each fires), float32 [n_ff]; equal ones as they were."""
    order = np.argsort(-frequency, kind="stable").astype(np.int32)
    freq = frequency[order]
    return BlockOrder(order, freq, (plain(NEURON_INDEX, "i32", order), plain(NEURON_FREQ, "f32", freq)))


def hottest_in_experts(frequency: Floats, chosen: Floats) -> BlockOrder:
    """The same within each expert, whose neurons come one behind the other. frequency: given that the expert was
    chosen; chosen: how often that is, float32 [experts].
    """
    each = frequency.reshape(len(chosen), -1)
    order = np.argsort(-each, axis=1, kind="stable").astype(np.int32)
    freq = np.take_along_axis(each, order, 1)
    tensors = (
        plain(of_experts(NEURON_INDEX), "i32", order),
        plain(of_experts(NEURON_FREQ), "f32", freq),
        plain(EXPERT_FREQ, "f32", chosen),
    )
    starts = each.shape[1] * np.arange(len(each), dtype=np.int32)
    return BlockOrder((order + starts[:, None]).reshape(-1), freq.reshape(-1), tensors)


def as_it_is(frequency: Floats) -> BlockOrder:
    """Neurons where they are; the file's own tensors, if any, say it already."""
    return BlockOrder(np.arange(len(frequency), dtype=np.int32), frequency, ())


def order_by_counts(counts: Sequence[Floats]) -> ModelOrder:
    """The order that counts of each block's neurons, [n_ff], give without a look at the model."""
    blocks = tuple(hottest_first(as_frequencies(c)) for c in counts)
    keys = {"neuron_order": "hot", "calibration.method": "counts made elsewhere"}
    return ModelOrder(blocks, {f"{ARCHITECTURE}.{key}": value for key, value in keys.items()})


def as_frequencies(counts: Floats, share: float | None = None) -> Floats:
    """Counts of unknown scale as shares of tokens, float32 [n_ff] within 0 to 1, in the same order.

    share: what they have to be on average (as near as the neurons with a count allow); None: the largest count means
    always.
    """
    largest = counts.max(initial=0)
    if largest <= 0:
        return np.zeros(len(counts), np.float32)
    scaled = counts.astype(np.float64) / largest
    if share is not None:
        low, high = 0.0, 1 / scaled[scaled > 0].min()
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if np.minimum(middle * scaled, 1).mean() < share else (low, middle)
        scaled = np.minimum(high * scaled, 1)
    frequencies: Floats = scaled.astype(np.float32)
    return frequencies
