"""How often neurons fire, as the calibration text has it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.model_file import tensor_names as n
from runtime.model_file.reader import GgufFile

Doubles = npt.NDArray[np.float64]


def frequencies(file: GgufFile, i: int) -> Doubles:
    """Share of all tokens for which each neuron of block `i` fires, float64 [n_ff], in the file's order: hottest first,
    or so within each expert, whose neurons fire as often as it is chosen and they fire then.

    1 for all where the file was not calibrated; empty without an FFN.
    """
    ffn = file.structure.blocks[i].ffn
    if ffn is None or file.structure.neuron_order != "hot":
        return np.ones(ffn.n_ff if ffn else 0)
    fired = _floats(file, n.in_block(i, n.stems(ffn).freq))
    if not ffn.experts:
        return fired
    chosen = _floats(file, n.in_block(i, n.EXPERT_FREQ))
    return (fired.reshape(ffn.experts.count, -1) * chosen[:, None]).reshape(-1)


def fired_share(file: GgufFile, i: int) -> float:
    """Of the neurons that a token may use in block `i`, which has an FFN, the share that fires, on average."""
    ffn = file.structure.ffns[i]
    return min(1.0, float(frequencies(file, i).sum()) / ffn.n_reached)


def _floats(file: GgufFile, name: str) -> Doubles:
    return file.read(name).view(np.float32).astype(np.float64)
