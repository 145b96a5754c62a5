"""How often neurons fire, as the calibration text has it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.bindings.ffn_shape import FfnShape
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
    return _stored(file, i, ffn)


def _stored(file: GgufFile, i: int, ffn: FfnShape) -> Doubles:
    fired = _floats(file, n.in_block(i, n.stems(ffn).freq))
    if not ffn.experts:
        return fired
    chosen = _floats(file, n.in_block(i, n.EXPERT_FREQ))
    return (fired.reshape(ffn.experts.count, -1) * chosen[:, None]).reshape(-1)


def are_stored(file: GgufFile) -> bool:
    """Whether a file says how often the neurons of each block fire, whatever their order."""
    wanted = [n.in_block(i, n.stems(ffn).freq) for i, ffn in file.structure.ffns.items()]
    wanted += [n.in_block(i, n.EXPERT_FREQ) for i, ffn in file.structure.ffns.items() if ffn.experts]
    return all(name in file.tensors and file.tensors[name].type == "f32" for name in wanted)


def by_expert(file: GgufFile, i: int) -> Doubles:
    """Share of all tokens for which each neuron of block `i` fires, float64 [experts, expert_length], falling within
    each expert where the file was calibrated; all neurons of the chosen experts where it was not, and each expert as
    often as the others. Without experts there is one.
    """
    ffn, found = file.structure.blocks[i].ffn, frequencies(file, i)
    if not ffn or not ffn.experts:
        return found[None]
    count = ffn.experts.count
    if file.structure.neuron_order != "hot":
        return np.full((count, ffn.expert_length), ffn.experts.used / count)
    return found.reshape(count, -1)


def of_experts(file: GgufFile, i: int) -> Doubles:
    """Share of all tokens that use each expert of block `i`, float64 [experts]; alike where the file was not
    calibrated. Without experts: 1 of one.
    """
    ffn = file.structure.blocks[i].ffn
    if not ffn or not ffn.experts:
        return np.ones(1)
    count, used = ffn.experts.count, ffn.experts.used
    chosen = _floats(file, n.in_block(i, n.EXPERT_FREQ)) if file.structure.neuron_order == "hot" else np.ones(count)
    total = chosen.sum()
    return chosen * (used / total) if total else np.full(count, used / count)


def fired_share(file: GgufFile, i: int) -> float:
    """Of the neurons that a token may use in block `i`, which has an FFN, the share that fires, on average; of a file
    whose frequencies `are_stored`.
    """
    ffn = file.structure.ffns[i]
    return float(np.clip(_stored(file, i, ffn).sum() / ffn.n_reached, 0, 1))


def _floats(file: GgufFile, name: str) -> Doubles:
    return file.read(name).view(np.float32).astype(np.float64)
