"""How unevenly the neurons of each layer fire, and what its predictor achieves: what the file says of the calibration
text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.bindings.ffn_shape import FfnShape
from runtime.errors import UserError
from runtime.model_file.frequencies import frequencies
from runtime.model_file.reader import GgufFile
from runtime.model_file.structure import ARCHITECTURE
from runtime.model_file.tensor_names import EXPERT_FREQ, in_block

CARRIED = 0.8  # of the activations: how many of the hottest neurons carry that
RARE = 0.01  # a neuron that fires for fewer tokens than this

Frequencies = npt.NDArray[np.float32]  # [n_ff], of one layer: the share of the tokens for which each neuron fires


@dataclass(frozen=True)
class LayerFiring:
    """Shares of one layer's neurons. active: firing for a token, on average, of those that it may use; hot: the
    hottest, that carry 80 % of the activations; rare: those that fire for less than 1 % of the tokens.
    """

    active: float
    hot: float
    rare: float


@dataclass(frozen=True)
class ExpertUse:
    """How unevenly one layer's experts are chosen. most, least: the share of the tokens that choose the most and the
    least chosen one; hot: the share of the experts that carry 80 % of the choices."""

    most: float
    least: float
    hot: float


@dataclass(frozen=True)
class PredictorFigures:
    """One layer's predictor, as measured on calibration text that its fit did not see. rank: 0 where it has none.

    predicted_share: of the neurons; recall: the share of the firing ones that is predicted; precision: the share of the
    predicted ones that fires; energy_kept: the share of the FFN's output energy. type: the format of its matrices.
    The last two are None in files that do not say.
    """

    rank: int
    predicted_share: float
    recall: float
    precision: float
    energy_kept: float | None = None
    type: str | None = None

    def as_json(self) -> dict[str, Any]:
        """What is known of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_frequencies(file: GgufFile) -> list[Frequencies]:
    """How often each neuron fires, for each layer, hottest first; empty without an FFN. Raises UserError where the file
    does not say.
    """
    if file.structure.neuron_order != "hot":
        raise UserError(
            f"`{file.path}`: holds no neuron frequencies: it was converted without calibration",
            "convert it again without --calibration none",
        )
    blocks = range(file.structure.block_count)
    return [np.sort(frequencies(file, i))[::-1].astype(np.float32) for i in blocks]


def layer_firing(freq: Frequencies, ffn: FfnShape | None, beside: FfnShape | None = None) -> LayerFiring:
    """How unevenly one layer's neurons fire; all 0 where there are none. freq: hottest first. beside: a shared expert
    whose neurons are among them.
    """
    if ffn is None or not len(freq):
        return LayerFiring(0.0, 0.0, 0.0)
    active = float(freq.sum(dtype=np.float64)) / (ffn.n_reached + (beside.n_ff if beside else 0))
    return LayerFiring(active, _hot_share(freq), float((freq < RARE).mean()))


def expert_use(file: GgufFile, i: int) -> ExpertUse | None:
    """How unevenly the experts of block `i` are chosen; None without experts, or without calibration."""
    ffn = file.structure.blocks[i].ffn
    if ffn is None or not ffn.experts or file.structure.neuron_order != "hot":
        return None
    return use_of(file.read(in_block(i, EXPERT_FREQ)).view(np.float32))


def use_of(frequency: Frequencies) -> ExpertUse:
    """How unevenly experts are chosen. frequency: of each, the share of the tokens that choose it, in any order."""
    chosen = np.sort(frequency)[::-1]
    return ExpertUse(float(chosen[0]), float(chosen[-1]), _hot_share(chosen))


def _hot_share(freq: Frequencies) -> float:
    """The share of the hottest ones that carry 80 % of all. freq: hottest first."""
    carried = np.cumsum(freq, dtype=np.float64)
    return float((np.searchsorted(carried, CARRIED * carried[-1]) + 1) / len(freq)) if carried[-1] else 0.0


def carried_shares(freq: Frequencies) -> npt.NDArray[np.float64]:
    """The share of the activations that the hottest 1, 2, ... neurons carry; all 0 where none ever fires."""
    carried = np.cumsum(freq, dtype=np.float64)
    total = carried[-1] if len(carried) else 0.0
    shares: npt.NDArray[np.float64] = carried / (total or 1.0)
    return shares


def predictor_figures(metadata: Mapping[str, Any], n_layers: int) -> list[PredictorFigures] | None:
    """What a file's metadata say of each layer's predictor; None where they say nothing."""
    names = [field.name for field in fields(PredictorFigures)]
    ranks, predicted, recall, precision, kept, types = (metadata.get(f"{ARCHITECTURE}.predictor.{n}") for n in names)
    if ranks is None or predicted is None or recall is None or precision is None:
        return None
    return [
        PredictorFigures(
            int(ranks[i]),
            float(predicted[i]),
            float(recall[i]),
            float(precision[i]),
            float(kept[i]) if kept is not None and len(kept) else None,
            str(types[i]) if types is not None and len(types) else None,
        )
        for i in range(n_layers)
    ]
